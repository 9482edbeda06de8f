"""What of a job its cluster would take and then not do: be queued again, have the time to save, know a secret."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from torchx.specs import Role

from mufasa_rec.launch.preflight import Site
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.secrets import Secret
from mufasa_rec.launch.slurm.jobs import Preemption, preemption_of

logger = logging.getLogger(__name__)
_SIGNAL = re.compile(r"(?:[RB]+:)?\w+(?:@(\d+))?")
_SIGNAL_LEAD_S = 60  # sbatch's own, when --signal names none
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def site_of(role: Role, cfg: Mapping[str, Any]) -> Site:
    """What is known of the cluster's nodes, for the checks before a job is queued.

    Args:
        role: What is started.
        cfg: Options of the scheduler.

    Returns:
        Where the job runs. Paths are those of this machine where it is one of the cluster's.

    Raises:
        LaunchRefusedError: The job would be lost when it is preempted, or is told to save as soon as it begins.
    """
    partition = cfg.get("partition")
    preemption = preemption_of(partition)
    times = [_lead_s(cfg.get("signal"), cfg.get("time"))]
    if preemption is not None:
        _refuse_loss(preemption, cfg["requeue"])
        times.append(preemption.grace_s or None)
        if not preemption.grace_s:
            logger.warning(
                "pre-flight: partition %s ends a preempted job at once: what it did since its newest checkpoint is "
                "lost (checkpoint.every_minutes)", preemption.partition,
            )  # fmt: skip
        if not role.max_retries:
            logger.warning(
                "pre-flight: partition %s may preempt the job, which costs no retry, but with --max_retries 0 any "
                "other failure ends it", preemption.partition,
            )  # fmt: skip
    known = [time for time in times if time is not None]
    of_cluster = shutil.which("sbatch") is not None
    return Site(same_paths=of_cluster, folder=cfg.get("job_dir") or ".", save_s=min(known, default=None))


def variables_of(secrets: Iterable[Secret]) -> tuple[str, ...]:
    """Names of the variables that hold a job's secrets.

    Raises:
        LaunchRefusedError: For a secret of Kubernetes.
    """
    secrets = tuple(secrets)
    for one in secrets:
        if one.secret is not None:
            raise LaunchRefusedError(
                f"secrets: {one} is one of Kubernetes; on Slurm give the NAME of a variable that your shell exports"
            )
    return tuple(one.target for one in secrets)


def refuse_missing_secrets(names: Iterable[str]) -> None:
    """Refuse a job whose secrets sbatch could not hand on.

    Raises:
        LaunchRefusedError: A variable is not set here.
    """
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise LaunchRefusedError(
            f"secrets: {', '.join(missing)} not set in this shell, whose environment sbatch hands on to the job; "
            "export it first, or leave it out of --secrets"
        )


def _refuse_loss(preemption: Preemption, requeue: bool) -> None:
    if not requeue:
        raise LaunchRefusedError(
            f"requeue is False, but jobs of partition {preemption.partition!r} may be preempted "
            f"(PreemptMode={preemption.mode}): this one would not come back; leave requeue=False away, or choose a "
            "partition that nobody preempts"
        )


def _lead_s(signal: str | None, time: str | None) -> float | None:
    """How long before the end of its time a job is told to save; None when it is not, or the time has no end."""
    found = _SIGNAL.fullmatch(signal or "")
    if not found or not time:
        return None
    lead_s, whole_s = float(found[1] or _SIGNAL_LEAD_S), seconds(time)
    if whole_s is not None and lead_s >= whole_s:
        raise LaunchRefusedError(
            f"signal is {signal!r} and time is {time!r}: the job would be told to save {lead_s:.0f} s before the end "
            f"of its {whole_s:.0f} s, as soon as it begins; give a longer time, or -cfg signal=USR1@{whole_s / 4:.0f}"
        )
    return lead_s


def seconds(time: str) -> float | None:
    """Length of a time as sbatch takes it; None for one that it does not take, or that has no end.

    Example:
        >>> seconds("30"), seconds("4:00:00"), seconds("2-0"), seconds("1:30"), seconds("UNLIMITED")
        (1800.0, 14400.0, 172800.0, 90.0, None)
    """
    found = _TIME.fullmatch(time)
    if not found:
        return None
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found["days"] is not None:
        return float(((days * 24 + first) * 60 + second) * 60 + third)
    if found["third"] is not None:
        return float((first * 60 + second) * 60 + third)
    return float(first * 60 + second)
