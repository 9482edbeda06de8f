"""The job as Volcano runs it: all pods start together, and a failed one starts all of them again."""

import copy
from collections.abc import Mapping
from typing import Any

from torchx.specs import AppDef

from mufasa_rec.launch.kubernetes.options import PodOptions
from mufasa_rec.launch.kubernetes.pods import finished_pod

GROUP, VERSION, PLURAL = "batch.volcano.sh", "v1alpha1", "jobs"
MANAGED_BY = "app.kubernetes.io/managed-by"
_FAILURES = ("PodEvicted", "PodFailed")


def volcano_job(resource: Mapping[str, Any], app: AppDef, options: PodOptions) -> dict[str, Any]:
    """Return TorchX's Volcano job with what it loses.

    Args:
        resource: The job as TorchX makes it, as plain maps and lists.
        app: What is started.
        options: Of its pods.

    Returns:
        A new job.
    """
    job = copy.deepcopy(dict(resource))
    spec = job["spec"]
    job["metadata"]["labels"] = {MANAGED_BY: "torchx.pytorch.org", "app.kubernetes.io/name": app.name}
    # Volcano counts a restart before it compares: with a maxRetry of 1 a job would fail instead of starting again. And
    # it takes 0 for its default of 3.
    spec["maxRetry"] = min(role.max_retries for role in app.roles) + 1
    spec["ttlSecondsAfterFinished"] = options.ttl_s
    elastic = {role.name.lower().replace("_", "") for role in app.roles if role.min_replicas is not None}
    for task in spec["tasks"]:
        task["template"] = finished_pod(task["template"], options)
        # A job that is not started again ends with its first lost pod. The others could only wait for it, on paid
        # machines, until their collectives time out. An elastic job goes on with fewer.
        if not task.get("policies") and task["name"].rpartition("-")[0] not in elastic:
            task["policies"] = [{"event": event, "action": "TerminateJob"} for event in _FAILURES]
    return job
