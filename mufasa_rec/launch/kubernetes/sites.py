"""What a pod says about the place where a program runs: volumes, time to save, and whether nodes are taken back."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torchx.specs import Role

from mufasa_rec.launch.kubernetes.options import PodOptions
from mufasa_rec.launch.kubernetes.pods import ROLE_LABEL, SHM_PATH
from mufasa_rec.launch.preflight import Site
from mufasa_rec.launch.refusal import LaunchRefusedError

_DEFAULT_IMAGE = "mufasa_rec"  # of the components: a name that no registry has
# In labels and taints by which clouds and provisioners mark nodes that they may take back.
_RECLAIMED = re.compile(r"(?<![a-z])(spot|preemptible)(?![a-z])", re.IGNORECASE)
_OTHERS = ("NotIn", "DoesNotExist")
_PREEMPTABLE = "volcano.sh/preemptable"


def pod_of(role: Role, job: Mapping[str, Any]) -> Mapping[str, Any]:
    """The template of a role's first pod in a Volcano job."""
    templates = (task["template"] for task in job["spec"]["tasks"])
    return next(pod for pod in templates if pod["metadata"]["labels"][ROLE_LABEL] == role.name)


def site_of(role: Role, pod: Mapping[str, Any], options: PodOptions) -> Site:
    """What is known of the place where a role runs.

    Args:
        role: What is started.
        pod: Its pod, whole.
        options: Of the job.

    Returns:
        The place, whose paths are those of the container.

    Raises:
        LaunchRefusedError: No image was given, or the job would end with the first node that is taken back.
    """
    if role.image == _DEFAULT_IMAGE:
        raise LaunchRefusedError(
            f"image is {role.image!r}, the component's default, which no registry has; build and push one (Dockerfile) "
            "and give --image REGISTRY/mufasa_rec:TAG"
        )
    mark = next(_marks(pod), None)
    if mark is not None and not role.max_retries:
        raise LaunchRefusedError(
            f"max_retries is 0, but {mark} lets the job run where it may have to give way: it would end with the first "
            "node that is lost; give --max_retries 1 or more, and it goes on from its newest checkpoint"
        )
    mounts = pod["spec"]["containers"][0].get("volumeMounts") or []
    folders = [f"{one['mountPath']}:ro" if one.get("readOnly") else one["mountPath"] for one in mounts]
    return Site(
        same_paths=False, mounts=tuple(one for one in folders if one != SHM_PATH), save_s=float(options.grace_s)
    )


def _marks(pod: Mapping[str, Any]) -> Iterator[str]:
    """What in a pod says that its node may be taken back, in words."""
    metadata, spec = pod.get("metadata") or {}, pod["spec"]
    for kind in ("annotations", "labels"):
        if (metadata.get(kind) or {}).get(_PREEMPTABLE) == "true":
            yield f"{_PREEMPTABLE} of the {kind}"
    for label, value in (spec.get("nodeSelector") or {}).items():
        if _RECLAIMED.search(f"{label} {value}") and value != "false":
            yield f"nodeSelector {label}: {value}"
    for one in spec.get("tolerations") or []:
        if _RECLAIMED.search(f"{one.get('key', '')} {one.get('value', '')}") and one.get("value") != "false":
            yield f"the toleration of {one.get('key')}"
    affinity = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    for term in affinity.get("nodeSelectorTerms") or []:
        for one in term.get("matchExpressions") or []:
            words = " ".join([one["key"], *(one.get("values") or [])])
            if one["operator"] not in _OTHERS and _RECLAIMED.search(words):
                yield f"nodeAffinity {words}"
