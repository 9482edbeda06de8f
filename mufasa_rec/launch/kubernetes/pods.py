"""The pod template of a role: TorchX's own, with what is lost there, and with the command line as the app gives it."""

import logging
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from torchx.specs import AppDef

from mufasa_rec.launch.kubernetes.options import PodOptions
from mufasa_rec.launch.kubernetes.overlay import apply_overlay
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.secrets import add_to_pod

logger = logging.getLogger(__name__)
SHM_PATH = "/dev/shm"
ROLE_LABEL = "torchx.pytorch.org/role-name"


def refuse_unusable_names(app: AppDef) -> None:
    """Refuse a role whose name would keep its nodes from finding each other.

    Raises:
        LaunchRefusedError: A role's name has a `-`: the variable with the first node's host, made of the name, could
            not be read by a shell, and every node would take itself for the first.
    """
    for role in app.roles:
        if not role.name.isidentifier() or not role.name.isascii():
            raise LaunchRefusedError(
                f"role is {role.name!r}: the first node's host comes in a variable of that name; give letters, digits"
                " and underscores, not a digit first"
            )


def warn_of_local_python(app: AppDef) -> None:
    """Say once that an image will hardly have the interpreter of this machine, which is the components' default."""
    for role in app.roles:
        if any(shlex.quote(sys.executable) in part for part in (role.entrypoint, *role.args)):
            logger.warning(
                "role %s starts %s, which image %r has to have; `--python python` starts the image's own",
                role.name, sys.executable, role.image,
            )  # fmt: skip
            return


def literal(text: str) -> str:
    """Return a text that a container gets as it stands: Kubernetes fills in `$(NAME)` and makes one `$` of two.

    Example:
        >>> literal("echo $$ $(date) $HOME")
        'echo $$$$ $$(date) $HOME'
    """
    return text.replace("$$", "$$$$").replace("$(", "$$(")


def finished_pod(template: Mapping[str, Any], options: PodOptions) -> dict[str, Any]:
    """Return a pod template with a job's options and overlay.

    Args:
        template: As TorchX makes it.
        options: Of the job.

    Returns:
        A new template.
    """
    spec: dict[str, Any] = {**template["spec"], "terminationGracePeriodSeconds": options.grace_s}
    spec["containers"] = [_as_given(container) for container in spec["containers"]]
    if options.shm_size:
        spec["volumes"] = [_sized(volume, spec, options.shm_size) for volume in spec["volumes"]]
    if options.pull_secret:
        spec["imagePullSecrets"] = [{"name": options.pull_secret}]
    secrets = options.secrets[template["metadata"]["labels"][ROLE_LABEL]] if options.secrets else ()
    spec = add_to_pod(spec, secrets) if secrets else spec
    return apply_overlay({**template, "spec": _without_empty(spec)}, options.overlay)


def _as_given(container: Mapping[str, Any]) -> dict[str, Any]:
    """A container whose command line and variables Kubernetes leaves alone."""
    variables = [{**one, "value": literal(one["value"])} if "value" in one else one for one in container["env"]]
    return {**container, "command": [literal(part) for part in container["command"]], "env": variables}


def _sized(volume: Mapping[str, Any], spec: Mapping[str, Any], size: str) -> dict[str, Any]:
    mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    if mounts.get(volume["name"]) != SHM_PATH:
        return dict(volume)
    return {**volume, "emptyDir": {**volume["emptyDir"], "sizeLimit": size}}


def _without_empty(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Drop maps that say nothing, as TorchX leaves them."""
    return {key: value for key, value in spec.items() if value not in ({}, None)}
