"""A job as an sbatch script that is complete by itself: the scheduler submits it, and so can a user without TorchX."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchx.specs import Role, macros

from mufasa_rec.launch.preflight import PATIENCE_ENV

RANK0_ENV = "RANK0_HOST"
GRACE_S = 60
# What ends the job's script. A job that is cancelled or past its time has another state by then and is left alone; one
# that is being warned may still be SIGNALING when it has saved and ended.
ENDING = """\
code=$?
[ "$code" -eq 0 ] && exit 0

# Slurm starts a preempted job again only if the job is still alive when the grace is over; one that has saved is not.
# Any other failure counts as a retry. Either way the program goes on from its newest checkpoint.
for attempt in 1 2 3; do job=$(scontrol --oneliner show job "$SLURM_JOB_ID") && break; sleep "$attempt"; done
state=${{job#*JobState=}} preempted=${{job#*PreemptTime=}}
state=${{state%% *}} preempted=${{preempted%% *}}
restarts=${{SLURM_RESTART_COUNT:-0}}
again=no
[ "$restarts" -lt {max_retries} ] && again=retry
[[ $preempted == [0-9]* ]] && again=preempted
[[ $state == RUNNING || $state == SIGNALING ]] || again=no
echo "$(date +%T) srun ended: code $code, restarts $restarts, state $state, preempted $preempted; again: $again"
[ "$again" = no ] && exit "$code"
for attempt in 1 2 3; do scontrol requeue "$SLURM_JOB_ID" && break; sleep "$attempt"; done
exit "$code"
"""
# With --no-requeue Slurm refuses to take the job back.
ENDING_WITHOUT_REQUEUE = "exit $?\n"


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """One job of one role.

    Attributes:
        name: Name of the job.
        role: What each node runs, its macros filled in but for the job's id.
        sbatch: Options of the job, as `--key=value`; None for a flag.
        extra: More options, as written by the user.
        log_folder: Folder of the logs.
        secrets: Variables that come from the environment of sbatch, by name.
    """

    name: str
    role: Role
    sbatch: Mapping[str, str | None]
    log_folder: str
    extra: tuple[str, ...] = ()
    requeue: bool = True
    secrets: tuple[str, ...] = ()
    command: tuple[str, ...] = field(default=("sbatch", "--parsable"))

    def script(self) -> str:
        """The whole script."""
        role = self.role
        options = [*(_option(key, value) for key, value in self.sbatch.items()), *self.extra]
        ending = ENDING.format(max_retries=role.max_retries) if self.requeue else ENDING_WITHOUT_REQUEUE
        return "\n".join(
            [
                "#!/bin/bash",
                f"# Job {self.name!r}, role {role.name!r}. Complete by itself: sbatch takes it without TorchX.",
                *(f"#SBATCH {option}" for option in options),
                "",
                *(f"export {key}={quoted(value)}" for key, value in sorted(role.env.items())),
                *self._secrets(),
                "# The nodes meet at the first one, by its name.",
                f'{RANK0_ENV}=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
                f"export {RANK0_ENV}",
                "",
                "# One task a node. When one has ended the others get this many seconds to do so.",
                f"{' '.join(self._srun())} \\",
                f"  {' '.join(quoted(part) for part in (role.entrypoint, *role.args))}",
                ending,
            ]
        )

    def _secrets(self) -> list[str]:
        if not self.secrets:
            return []
        missing = "is not set in this job: export it before sbatch, which hands the environment on (--export=ALL)"
        lines = [f': "${{{name}:?{missing}}}"' for name in self.secrets]
        return [
            "# Secrets come from the environment that sbatch was called in; their values are nowhere in here.",
            *lines,
        ]

    def _srun(self) -> list[str]:
        log = quoted(f"{self.log_folder}/{log_name('%j', self.role.name, '%n')}")
        # Slurm 22.05 and newer no longer hand the job's cores on to srun.
        cores = self.sbatch.get("cpus-per-task")
        return [
            "srun --ntasks-per-node=1",
            *([f"--cpus-per-task={cores}"] if cores else []),
            # Not --kill-on-bad-exit, which cuts short the node that still saves.
            f"--wait={self.role.env.get(PATIENCE_ENV, GRACE_S)} --output={log} --open-mode=append",
        ]

    def __str__(self) -> str:
        return f"$ {shlex.join(self.command)} FILE\n\nFILE, which sbatch takes without TorchX too:\n\n{self.script()}"

    # TorchX's dry run prints the form that is meant for programs.
    __repr__ = __str__


def log_name(job: str, role: str, node: str) -> str:
    """File name of a node's log: both streams, every attempt after the other.

    Example:
        >>> log_name("17", "train", "0")
        'slurm-17-train-0.log'
    """
    return f"slurm-{job}-{role}-{node}.log"


def quoted(text: str) -> str:
    """Quote for a shell, but let it fill in the job's id, which nobody knows before the job is queued.

    Example:
        >>> print(quoted("a b ${app_id}"))
        'a b '"$SLURM_JOB_ID"
    """
    parts = text.split(macros.app_id)
    return '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part or len(parts) == 1 else "" for part in parts)


def _option(key: str, value: str | None) -> str:
    return f"--{key}" if value is None else f"--{key}={quoted(value)}"
