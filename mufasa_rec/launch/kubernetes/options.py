"""How a job is to run on Kubernetes: the options of the scheduler, resolved for one app."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchx.specs import AppDef

from mufasa_rec.launch.kubernetes.overlay import read_overlay
from mufasa_rec.launch.notes import notes_of
from mufasa_rec.launch.preflight import patience_s
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.secrets import Secret

# From the launcher's patience to the end of the pod: the logs are closed and the program's exit code is kept.
MARGIN_S = 15
_KUBERNETES_GRACE_S = 30


@dataclass(frozen=True, kw_only=True)
class PodOptions:
    """What every pod of a job gets beyond what the app says.

    Args:
        grace_s: Seconds from the request to end to the kill.
        ttl_s: Seconds that a finished job stays on the cluster, with its logs.
        shm_size: Size of /dev/shm; none: as much as the container's memory.
        pull_secret: Secret that the image is pulled with.
        overlay: Parts of the overlay file.
        secrets: Of each role, by its name.
    """

    grace_s: int
    ttl_s: int
    shm_size: str | None = None
    pull_secret: str | None = None
    overlay: Mapping[str, Any] = field(default_factory=dict)
    secrets: Mapping[str, tuple[Secret, ...]] = field(default_factory=dict)


def pod_options(app: AppDef, cfg: Mapping[str, Any]) -> PodOptions:
    """Resolve the scheduler's options for an app.

    Args:
        app: What is started.
        cfg: Options as TorchX hands them over.

    Returns:
        The options.

    Raises:
        LaunchRefusedError: An option is wrong, or the pods would be killed before the program has saved.
    """
    wait_s = max(patience_s(role.env) or _KUBERNETES_GRACE_S - MARGIN_S for role in app.roles)
    grace_s = cfg.get("grace_s")
    if grace_s is None:
        grace_s = wait_s + MARGIN_S
    elif grace_s < wait_s:
        raise LaunchRefusedError(
            f"grace_s is {grace_s}: the launcher waits {wait_s} s for its processes to save, and the pod would be"
            f" killed before; give at least {wait_s + MARGIN_S}, or the component a shorter --grace_s"
        )
    ttl_s = cfg.get("ttl_s")
    if ttl_s is not None and ttl_s < 0:
        raise LaunchRefusedError(f"ttl_s is {ttl_s}: give the seconds that a finished job stays, 0 or more")
    return PodOptions(
        grace_s=grace_s,
        ttl_s=7 * 24 * 3600 if ttl_s is None else ttl_s,
        shm_size=cfg.get("shm_size"),
        pull_secret=cfg.get("pull_secret"),
        overlay=read_overlay(cfg.get("overlay")),
        secrets={role.name: notes_of(role).secrets for role in app.roles},
    )
