"""The state of a Volcano job in TorchX's words."""

from collections.abc import Mapping
from typing import Any

from torchx.schedulers.api import DescribeAppResponse
from torchx.specs import AppState, ReplicaStatus, Role, RoleStatus

_JOB_STATES = {
    "Pending": AppState.PENDING,
    "Running": AppState.RUNNING,
    "Restarting": AppState.RUNNING,
    "Aborting": AppState.RUNNING,
    "Completing": AppState.RUNNING,
    "Terminating": AppState.RUNNING,
    "Completed": AppState.SUCCEEDED,
    "Aborted": AppState.CANCELLED,
    "Terminated": AppState.FAILED,
    "Failed": AppState.FAILED,
}
_POD_STATES = {
    "Pending": AppState.PENDING,
    "Running": AppState.RUNNING,
    "Succeeded": AppState.SUCCEEDED,
    "Failed": AppState.FAILED,
}
_ROLE_LABEL = "torchx.pytorch.org/role-name"
_REPLICA_LABEL = "torchx.pytorch.org/replica-id"


def state_of(job: Mapping[str, Any]) -> AppState:
    """Return a job's state; one that Volcano has not looked at yet is pending."""
    phase = _phase(job)
    return _JOB_STATES.get(phase, AppState.UNKNOWN) if phase else AppState.PENDING


def describe_job(app_id: str, job: Mapping[str, Any]) -> DescribeAppResponse:
    """Describe a job: state, starts so far, and the state of each replica.

    Args:
        app_id: TorchX's name of it.
        job: As Volcano keeps it.

    Returns:
        The description.
    """
    status = job.get("status") or {}
    state = state_of(job)
    roles: dict[str, Role] = {}
    replicas: dict[str, RoleStatus] = {}
    for task in job["spec"]["tasks"]:
        labels = task["template"]["metadata"].get("labels") or {}
        name = labels.get(_ROLE_LABEL) or task["name"].rpartition("-")[0]
        number = int(labels.get(_REPLICA_LABEL) or task["name"].rpartition("-")[2])
        role = roles.setdefault(name, Role(name=name, image=task["template"]["spec"]["containers"][0]["image"]))
        role.num_replicas = max(role.num_replicas if name in replicas else 0, number + 1)
        phases = ((status.get("taskStatusCount") or {}).get(task["name"]) or {}).get("phase") or {}
        # Pods of a job that has ended may be gone: they ended as it did.
        known = _POD_STATES.get(next(iter(phases), ""), AppState.PENDING if state == AppState.PENDING else state)
        replicas.setdefault(name, RoleStatus(name, [])).replicas.append(
            ReplicaStatus(id=number, role=name, state=known, hostname="")
        )
    details = status.get("state") or {}
    return DescribeAppResponse(
        app_id=app_id,
        roles=list(roles.values()),
        roles_statuses=list(replicas.values()),
        state=state,
        num_restarts=int(status.get("retryCount") or 0),
        msg=": ".join(filter(None, [_phase(job), details.get("reason"), details.get("message")])),
    )


def _phase(job: Mapping[str, Any]) -> str:
    return ((job.get("status") or {}).get("state") or {}).get("phase") or ""
