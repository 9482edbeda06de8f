"""What a Slurm cluster says about jobs: by `scontrol` and `squeue`, and by `sacct` where the cluster keeps accounts.

The controller forgets a job some minutes after its end (MinJobAge, 300 s unless the site chose otherwise). Accounts
keep it for ever, but many clusters have none.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchx.specs import AppState

from mufasa_rec.launch.refusal import LaunchRefusedError

STATES: Mapping[str, AppState] = {
    "PENDING": AppState.PENDING,
    "CONFIGURING": AppState.PENDING,
    "REQUEUED": AppState.PENDING,
    "REQUEUE_FED": AppState.PENDING,
    "REQUEUE_HOLD": AppState.PENDING,
    "RESV_DEL_HOLD": AppState.PENDING,
    "RESIZING": AppState.PENDING,
    "SUSPENDED": AppState.PENDING,
    "RUNNING": AppState.RUNNING,
    "COMPLETING": AppState.RUNNING,
    "SIGNALING": AppState.RUNNING,
    "STAGE_OUT": AppState.RUNNING,
    "STOPPED": AppState.RUNNING,
    "COMPLETED": AppState.SUCCEEDED,
    "CANCELLED": AppState.CANCELLED,
    "BOOT_FAIL": AppState.FAILED,
    "DEADLINE": AppState.FAILED,
    "FAILED": AppState.FAILED,
    "NODE_FAIL": AppState.FAILED,
    "OUT_OF_MEMORY": AppState.FAILED,
    "PREEMPTED": AppState.FAILED,
    "REVOKED": AppState.FAILED,
    "SPECIAL_EXIT": AppState.FAILED,
    "TIMEOUT": AppState.FAILED,
}
ACCOUNT_FIELDS = ("JobID", "JobName", "State", "NNodes", "NodeList", "ExitCode", "WorkDir")
TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job as its cluster knows it.

    Attributes:
        id: Number of the job.
        name: Name of the job.
        state: Slurm's word for its state.
        reason: Why it waits or ended so; empty where nothing is to be said.
        restarts: How often it was started again; at least, where only accounts know it.
        num_nodes: Nodes that it has or asks for.
        hosts: Their names, in the order of their numbers.
        log_file: The job's own output; the logs of the nodes lie beside it. None where it is not known.
    """

    id: str
    name: str
    state: str
    reason: str
    restarts: int
    num_nodes: int
    hosts: tuple[str, ...]
    log_file: str | None

    @property
    def app_state(self) -> AppState:
        """The state in TorchX's words."""
        return STATES.get(self.state, AppState.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """How a partition treats jobs that have to give way.

    Attributes:
        partition: Its name.
        mode: Slurm's word for what becomes of them, such as REQUEUE.
        grace_s: Seconds that they are given to end.
    """

    partition: str
    mode: str
    grace_s: int


def find_job(job_id: str) -> SlurmJob | None:
    """What the controller knows of a job, or else the accounts; None when neither knows it."""
    if not job_id.isdecimal():
        return None
    shown = _ask("scontrol", "--oneliner", "show", "job", job_id)
    lines = [line for line in (shown or "").splitlines() if line.startswith("JobId=")]
    if lines:
        return _of_controller(lines[0])
    rows = _accounts("--duplicates", "--jobs", job_id)
    return _of_accounts(rows) if rows else None


def list_jobs() -> list[tuple[str, AppState]]:
    """Number and state of this user's jobs: of today's where the cluster keeps accounts, and of all that are queued."""
    states = {row["JobID"]: row["State"].split()[0] for row in _accounts() if row["JobID"].isdecimal()}
    queue = _ask("squeue", "--me", "--noheader", "--states=all", "--format=%A %T") or ""
    for line in queue.splitlines():
        job, state = line.split()
        states[job] = state
    return [(job, STATES.get(states[job], AppState.UNKNOWN)) for job in sorted(states, key=int)]


def node_memory_mb(partition: str | None) -> int | None:
    """The least memory of a node in a partition (None: the default one); None when it cannot be told."""
    choice = [f"--partition={partition}"] if partition else []
    shown = _ask("sinfo", "--noheader", "--noconvert", "--format=%P %m", *choice)
    rows = [line.split() for line in (shown or "").splitlines()]
    sizes = [int(size.rstrip("+M")) for name, size in rows if partition or name.endswith("*")]
    return min(sizes, default=None)


def preemption_of(partition: str | None) -> Preemption | None:
    """How a partition (None: the default one) treats jobs that have to give way; None where none has to, or unknown."""
    shown = _ask("scontrol", "--oneliner", "show", "partition", *([partition] if partition else []))
    for line in (shown or "").splitlines():
        found = _values(line)
        mode = found.get("PreemptMode", "OFF")
        # A suspended job goes on by itself.
        if (partition or found.get("Default") == "YES") and re.search("REQUEUE|CANCEL", mode):
            grace = found.get("GraceTime", "0")
            return Preemption(
                partition=found["PartitionName"], mode=mode, grace_s=int(grace) if grace.isdecimal() else 0
            )
    return None


def call(*command: str) -> str:
    """Run one of Slurm's programs.

    Raises:
        LaunchRefusedError: When it is not there or refuses; its own words say why.
    """
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise LaunchRefusedError(
            f"scheduler slurm: {command[0]!r} is not on the PATH; give the command on a machine that has Slurm's "
            "programs, or save the script that `torchx run --dryrun` prints and take it to one."
        ) from None
    if ran.returncode:
        raise LaunchRefusedError(f"scheduler slurm: {command[0]} refused: {ran.stderr.strip() or ran.stdout.strip()}")
    return ran.stdout


def _ask(*command: str) -> str | None:
    """The answer of a program; None where it is not there or knows nothing."""
    try:
        return call(*command)
    except LaunchRefusedError:
        return None


def _accounts(*choice: str) -> list[dict[str, str]]:
    shown = _ask("sacct", "--noheader", "--parsable2", "--allocations", f"--format={','.join(ACCOUNT_FIELDS)}", *choice)
    return [dict(zip(ACCOUNT_FIELDS, line.split("|"))) for line in (shown or "").splitlines()]


def _values(line: str) -> dict[str, str]:
    # Values may hold blanks, but none of those that are read here.
    return dict(re.findall(r"(?:^| )([\w:/]+)=(\S*)", line))


def _of_controller(line: str) -> SlurmJob:
    found = _values(line)
    reason = "" if found.get("Reason") == "None" else found.get("Reason", "")
    return SlurmJob(
        id=found["JobId"],
        name=found["JobName"],
        state=found["JobState"],
        reason=reason,
        restarts=int(found.get("Restarts", 0)),
        num_nodes=int(found["NumNodes"].split("-")[-1]),
        hosts=_hosts(found.get("NodeList", "")),
        log_file=found.get("StdOut"),
    )


def _of_accounts(rows: Sequence[Mapping[str, str]]) -> SlurmJob:
    """The rows are the job's attempts, one after the other."""
    last = rows[-1]
    return SlurmJob(
        id=last["JobID"],
        name=last["JobName"],
        state=last["State"].split()[0],
        reason="",
        restarts=len(rows) - 1,
        num_nodes=int(last["NNodes"]),
        hosts=_hosts(last["NodeList"]),
        log_file=f"{last['WorkDir']}/slurm-{last['JobID']}.out",
    )


def _hosts(node_list: str) -> tuple[str, ...]:
    if node_list in ("", "(null)", "None assigned"):
        return ()
    return tuple((_ask("scontrol", "show", "hostnames", node_list) or "").split())
