"""The scheduler `slurm`: `torchx run -s slurm`, with and without accounting.

A job is one plain sbatch job, as many nodes as the role has replicas and one task a node, which Slurm can preempt,
requeue, signal and account as a whole.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream
from torchx.specs import AppDef, AppDryRunInfo, ReplicaStatus, Role, RoleStatus, is_terminal, macros, runopts
from torchx.workspace.dir_workspace import DirWorkspaceMixin

from mufasa_rec.launch import preflight
from mufasa_rec.launch.notes import notes_of
from mufasa_rec.launch.refusal import LaunchRefusedError
from mufasa_rec.launch.slurm import rules
from mufasa_rec.launch.slurm.jobs import SlurmJob, call, find_job, list_jobs, node_memory_mb
from mufasa_rec.launch.slurm.script import RANK0_ENV, SlurmRequest, log_name

POLL_S = 0.5
LEAST_MEMORY_MB = 1000
# Passed on to sbatch as they are.
OPTIONS: Mapping[str, str] = {
    "partition": "partition to run in",
    "account": "account that pays",
    "qos": "quality of service",
    "reservation": "reservation to run in",
    "constraint": "features that the nodes must have",
    "time": "longest time of a run, such as 30 (minutes), 4:00:00 or 2-0 (days-hours)",
    "comment": "comment of the job",
    "mail-user": "whom to mail",
    "mail-type": "what to mail about, such as END or FAIL",
}


class SlurmScheduler(DirWorkspaceMixin, Scheduler[Any]):
    """Runs an app of one role as one Slurm job.

    Args:
        session_name: TorchX's session; part of a job's handle.
    """

    def __init__(self, session_name: str) -> None:
        super().__init__("slurm", session_name)

    def _run_opts(self) -> runopts:
        opts = runopts()
        for name, text in OPTIONS.items():
            opts.add(name, type_=str, default=None, help=text)
        opts.add("exclusive", type_=bool, default=False, help="whole nodes, shared with no other job")
        opts.add("requeue", type_=bool, default=True, help="start again after preemption, a lost node, or a failure")
        opts.add(
            "signal", type_=str, default="USR1@120", help="signal to save, and how many seconds before `time` ends"
        )
        opts.add("extra", type_=str, default=None, help="more options of sbatch, such as '--nice=10 --exclude=n7'")
        opts.add("log_dir", type_=str, default=None, help="folder of the logs, seen by all nodes; default: this one")
        opts.add(
            "job_dir", type_=str, default=None, help="new folder, seen by all nodes, into which the code is copied"
        )
        preflight.add_option(opts)
        return opts

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[SlurmRequest]:
        if len(app.roles) != 1:
            raise LaunchRefusedError(
                f"app {app.name}: has {len(app.roles)} roles, a job of the scheduler slurm has one; "
                "use the scheduler torchx_slurm, which makes a heterogeneous job of several."
            )
        role = app.roles[0]
        for kind, name in (("app", app.name), ("role", role.name)):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise LaunchRefusedError(f"{kind} name {name!r}: use letters, digits, _ and - only.")
        if cfg.get("job_dir") and role.image != cfg["job_dir"]:
            raise LaunchRefusedError(
                f"job_dir is {cfg['job_dir']!r}: no folder was given to copy there; add --workspace file://$PWD."
            )
        if preflight.is_wanted(role, cfg):
            preflight.check_role(role, rules.site_of(role, cfg))
        folder = os.path.abspath(cfg.get("log_dir") or cfg.get("job_dir") or ".")
        request = SlurmRequest(
            name=app.name,
            role=_with_values(role),
            sbatch=_sbatch_options(app.name, role, cfg, folder),
            extra=tuple(shlex.split(cfg.get("extra") or "")),
            log_folder=folder,
            requeue=cfg["requeue"],
            secrets=rules.variables_of(notes_of(role).secrets),
        )
        return AppDryRunInfo(request, str)

    def _validate(self, app: AppDef, scheduler: str, *cfg: Any) -> None:
        """Sbatch itself says what a cluster lacks; newer releases of TorchX hand over the options too."""

    def schedule(self, dryrun_info: AppDryRunInfo[SlurmRequest]) -> str:
        """Submit a job; returns its number."""
        request = dryrun_info.request
        rules.refuse_missing_secrets(request.secrets)
        os.makedirs(request.log_folder, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(request.script())
            file.flush()
            # With several clusters sbatch adds the name of the one that took the job.
            return call(*request.command, file.name).strip().split(";")[0]

    def _cancel_existing(self, app_id: str) -> None:
        call("scancel", app_id)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """What is known of a job; None when it is unknown to the cluster."""
        job = find_job(app_id)
        if job is None:
            return None
        role = Role(name=_role_name(job), image="", num_replicas=job.num_nodes)
        hosts = [*job.hosts, *[""] * (job.num_nodes - len(job.hosts))]
        replicas = [
            ReplicaStatus(id=k, role=role.name, state=job.app_state, hostname=host) for k, host in enumerate(hosts)
        ]
        return DescribeAppResponse(
            app_id=app_id,
            state=job.app_state,
            num_restarts=job.restarts,
            msg=": ".join(part for part in (job.state, job.reason) if part),
            roles=[role],
            roles_statuses=[RoleStatus(role.name, replicas)],
        )

    def list(self, *cfg: Any) -> list[ListAppResponse]:
        """This user's jobs."""
        return [ListAppResponse(app_id=job, state=state) for job, state in list_jobs()]

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """The lines of a node: of all attempts, one after the other.

        Raises:
            LaunchRefusedError: When one stream alone is asked for, or a span of time, or nothing was written.
        """
        if streams not in (None, Stream.COMBINED):
            raise LaunchRefusedError(f"streams is {streams.value!r}: a node's log holds both; leave --streams away.")
        if since or until:
            raise LaunchRefusedError("since, until: the lines have no time that could be trusted; leave them away.")
        lines = self._lines(app_id, log_name(app_id, role_name, str(k)), should_tail)
        return (line for line in lines if regex is None or re.search(regex, line))

    def _lines(self, app_id: str, name: str, should_tail: bool) -> Iterator[str]:
        job = find_job(app_id)
        path = os.path.join(os.path.dirname(job.log_file) if job and job.log_file else "", name)
        while should_tail and not os.path.exists(path) and not self._has_ended(app_id):
            time.sleep(POLL_S)
        if not os.path.exists(path):
            raise LaunchRefusedError(
                f"job {app_id}: no log {path!r}; see by `torchx status` whether it has begun, and in its own output, "
                f"{job.log_file if job else 'slurm-<job>.out in the folder of the logs'}, what went wrong."
            )
        with open(path, errors="replace") as file:
            begun = ""
            while True:
                ended = not should_tail or self._has_ended(app_id)  # before reading: what came in between is read
                for piece in file:
                    begun += piece
                    if begun.endswith("\n"):
                        yield begun
                        begun = ""
                if ended:
                    break
                time.sleep(POLL_S)
            if begun:
                yield begun

    def _has_ended(self, app_id: str) -> bool:
        job = find_job(app_id)
        return job is None or is_terminal(job.app_state)


def create_scheduler(session_name: str, **kwargs: Any) -> SlurmScheduler:
    """What TorchX calls; the options of a session are those of other schedulers."""
    return SlurmScheduler(session_name)


def _with_values(role: Role) -> Role:
    """Fill in all macros but the job's id; refuse what a Slurm job could not keep."""
    if role.mounts:
        raise LaunchRefusedError(
            f"role {role.name}: has mounts, but its Slurm job runs in no container; leave --mounts away, "
            "paths are those of the nodes."
        )
    if any(macros.replica_id in text for text in (role.entrypoint, *role.args, *role.env.values())):
        raise LaunchRefusedError(
            f"role {role.name}: uses {macros.replica_id}, but all nodes of a Slurm job run one line; "
            "use the variable SLURM_NODEID, which each node sets."
        )
    values = macros.Values(img_root=role.image, app_id=macros.app_id, replica_id=macros.replica_id, rank0_env=RANK0_ENV)
    return values.apply(role)


def _sbatch_options(name: str, role: Role, cfg: Mapping[str, Any], folder: str) -> dict[str, str | None]:
    resource = role.resource
    least = role.min_replicas or role.num_replicas
    memory = node_memory_mb(cfg.get("partition"))
    # Some clusters name no memory for their nodes, which Slurm takes for 1 MB: any request would be refused.
    has_memory = resource.memMB > 0 and (memory is None or memory > LEAST_MEMORY_MB)
    asked: dict[str, str | bool | None] = {
        "job-name": name if name == role.name else f"{name}.{role.name}",
        **{option: cfg.get(option) or False for option in OPTIONS},
        "nodes": str(role.num_replicas) if least == role.num_replicas else f"{least}-{role.num_replicas}",
        "ntasks-per-node": "1",
        "cpus-per-task": resource.cpu > 0 and str(resource.cpu),
        "mem": has_memory and f"{resource.memMB}M",
        # Not --gpus-per-task, which Slurm 23.11 and newer refuse without --ntasks.
        "gpus-per-node": resource.gpu > 0 and str(resource.gpu),
        "exclusive": None if cfg["exclusive"] else False,
        ("requeue" if cfg["requeue"] else "no-requeue"): None,
        "signal": cfg.get("signal") or False,
        "chdir": cfg.get("job_dir") or False,
        "output": f"{folder}/slurm-%j.out",
        "open-mode": "append",
    }
    return {key: value for key, value in asked.items() if not isinstance(value, bool)}


def _role_name(job: SlurmJob) -> str:
    return job.name.rpartition(".")[2]
