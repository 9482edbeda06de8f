"""The same job without TorchX or Volcano on the cluster: an indexed Job and a headless service, for `kubectl apply`.

Pods of an indexed Job have the host names `<job>-0`, `<job>-1`, ..., which the service puts into the cluster's DNS.
What it lacks beside Volcano: pods start one by one as room is found for them (no gang), there are no queues, and a
failed pod starts again alone: the others fail at their next collective and come back too, each of which costs a retry.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torchx.specs import AppDef, Role, macros

from mufasa_rec.launch.kubernetes.options import PodOptions
from mufasa_rec.launch.kubernetes.pods import finished_pod

FIRST_HOST = "RANK0_HOST"
_PLACEHOLDER = "@pod-index@"
# Our own, since Kubernetes' JOB_COMPLETION_INDEX comes last and variables are filled in from those before them.
_INDEX_VARIABLE = {
    "name": "POD_INDEX",
    "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}},
}
# Without a gang the first node may come minutes after the others: they wait as long as for the rest of a gang.
_PATIENCE = {"PET_RDZV_CONF": "read_timeout=600,join_timeout=600"}
_REPLICA_LABEL = "torchx.pytorch.org/replica-id"


def indexed_jobs(resource: Mapping[str, Any], app: AppDef, options: PodOptions) -> list[dict[str, Any]]:
    """Return a service and a Job per role.

    Args:
        resource: The Volcano job as TorchX makes it, as plain maps and lists: its pods are taken over.
        app: What is started.
        options: Of its pods.

    Returns:
        Manifests in the order in which they are to be applied.
    """
    name = resource["metadata"]["name"]
    first_task, jobs = 0, []
    for number, role in enumerate(app.roles):
        template = resource["spec"]["tasks"][first_task]["template"]
        first_task += role.num_replicas
        # The name of the only role's job is the app's: short host names, and no digit doubled.
        job_name = name if len(app.roles) == 1 else f"{name}-{number}"
        first_job = name if len(app.roles) == 1 else f"{name}-0"
        pod = _pod(template, role, app_id=name, first_host=f"{first_job}-0.{name}")
        jobs.append(_job(job_name, name, role, finished_pod(pod, options), options))
    return [_service(name, app), *jobs]


def _pod(template: Mapping[str, Any], role: Role, app_id: str, first_host: str) -> dict[str, Any]:
    """One template for all pods of a role: TorchX's of the first, with the command line as any pod needs it."""
    pod = copy.deepcopy(dict(template))
    values = macros.Values(img_root="", app_id=app_id, replica_id=_PLACEHOLDER, rank0_env=FIRST_HOST)
    filled = values.apply(role)
    container = pod["spec"]["containers"][0]
    container["name"] = role.name.lower().replace("_", "-")
    container["command"] = [filled.entrypoint, *filled.args]
    env = {**_PATIENCE, **filled.env, FIRST_HOST: first_host}
    container["env"] = [{"name": key, "value": value} for key, value in env.items()]
    pod["metadata"]["labels"].pop(_REPLICA_LABEL, None)
    pod["metadata"]["labels"]["job"] = app_id
    pod["spec"]["subdomain"] = app_id
    return pod


def _job(name: str, app_id: str, role: Role, pod: dict[str, Any], options: PodOptions) -> dict[str, Any]:
    _fill_in_index(pod["spec"]["containers"][0])
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"job": app_id}},
        "spec": {
            "completionMode": "Indexed",
            "completions": role.num_replicas,
            "parallelism": role.num_replicas,
            # Kubernetes counts pods, not starts of the job: one failure costs every pod.
            "backoffLimit": role.max_retries * role.num_replicas,
            # A pod that had to give way (a drained node, a higher priority) has not failed and costs no retry.
            "podFailurePolicy": {
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            "ttlSecondsAfterFinished": options.ttl_s,
            "template": pod,
        },
    }


def _fill_in_index(container: dict[str, Any]) -> None:
    """Put the pod's index where the app asked for its replica's id."""
    # An overlay may have put anything here; it is checked once the job is whole.
    texts = [variable for variable in container["env"] if isinstance(variable.get("value"), str)]
    if not any(_PLACEHOLDER in text for text in [*container["command"], *(one["value"] for one in texts)]):
        return
    index = f"$({_INDEX_VARIABLE['name']})"
    container["command"] = [part.replace(_PLACEHOLDER, index) for part in container["command"]]
    for variable in texts:
        variable["value"] = variable["value"].replace(_PLACEHOLDER, index)
    container["env"].insert(0, _INDEX_VARIABLE)


def _service(name: str, app: AppDef) -> dict[str, Any]:
    ports = sorted({port for role in app.roles for port in role.port_map.values()})
    service: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"job": name}},
        # Nodes meet before any of them is ready.
        "spec": {"clusterIP": "None", "selector": {"job": name}, "publishNotReadyAddresses": True},
    }
    if ports:
        service["spec"]["ports"] = [{"name": f"port-{port}", "port": port} for port in ports]
    return service
