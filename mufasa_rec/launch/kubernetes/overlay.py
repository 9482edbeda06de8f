"""The pod overlay: what a cluster wants of every pod and TorchX has no option for.

A YAML file with up to three parts, each optional:

    metadata:                      # labels and annotations of every pod
      annotations: {example.com/team: ranking}
    spec:                          # of every pod, as Kubernetes spells it
      tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
      imagePullSecrets: [{name: registry}]
    container:                     # merged into the job's container
      envFrom: [{secretRef: {name: object-store}}]
      resources: {limits: {rdma/ib: 8}}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mufasa_rec.launch.kubernetes.field_types import problems_of
from mufasa_rec.launch.refusal import LaunchRefusedError

_PARTS = {"metadata": "V1ObjectMeta", "spec": "dict(str, object)", "container": "dict(str, object)"}
# What tells the entries of a list apart, as in Kubernetes' own strategic merge; every other list is replaced.
_KEYS = {
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}


def merge(base: Any, change: Any, name: str = "") -> Any:
    """Return a value changed by another: maps key by key, lists of named entries entry by entry; null takes away.

    Example:
        >>> base = {"env": [{"name": "A", "value": "1"}], "hostIPC": True, "tolerations": [{"key": "a"}]}
        >>> merge(base, {"env": [{"name": "B", "value": "2"}], "hostIPC": None, "tolerations": []})
        {'env': [{'name': 'A', 'value': '1'}, {'name': 'B', 'value': '2'}], 'tolerations': []}
    """
    if isinstance(base, dict) and isinstance(change, dict):
        # The order of the base, then what is new: a manifest changes only where it was changed.
        merged = {key: merge(value, change[key], key) if key in change else value for key, value in base.items()}
        merged |= {key: value for key, value in change.items() if key not in base}
        return {key: value for key, value in merged.items() if value is not None}
    key = _KEYS.get(name)
    if key and isinstance(base, list) and isinstance(change, list):
        entries = {entry[key]: entry for entry in base}
        for entry in change:
            if not isinstance(entry, dict) or key not in entry:
                raise LaunchRefusedError(f"overlay: an entry of {name} is {entry!r}: give it a {key}")
            # An entry given whole takes the old one's place: a variable has a value or a source, a volume one source.
            entries[entry[key]] = entry
        return list(entries.values())
    return change


def read_overlay(path: str | None) -> dict[str, Any]:
    """Read an overlay file; none gives an empty overlay.

    Args:
        path: The file.

    Returns:
        Its parts.

    Raises:
        LaunchRefusedError: It cannot be read, or has a part that no overlay has.
    """
    if not path:
        return {}
    try:
        overlay = yaml.safe_load(Path(path).expanduser().read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise LaunchRefusedError(f"overlay is {path!r}: cannot be read as YAML ({error})") from error
    if not isinstance(overlay, dict):
        raise LaunchRefusedError(f"overlay {path!r} is a {type(overlay).__name__}: give a map of {', '.join(_PARTS)}")
    wrong = [f"{part}: no part of an overlay; give {', '.join(_PARTS)}" for part in overlay if part not in _PARTS]
    wrong += [line for part, of in _PARTS.items() for line in problems_of(overlay.get(part), of, part)]
    if "containers" in (overlay.get("spec") or {}):
        wrong.append("spec.containers: the job's container is named by the job; change it under `container`")
    if wrong:
        raise LaunchRefusedError("\n  ".join([f"overlay {path!r} is wrong:", *wrong]))
    return overlay


def apply_overlay(template: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pod template with an overlay merged in."""
    spec = dict(template["spec"])
    first, *others = spec["containers"]
    spec["containers"] = [_with_amounts_as_text(merge(first, overlay.get("container") or {})), *others]
    return {
        **template,
        "metadata": merge(template.get("metadata") or {}, overlay.get("metadata") or {}),
        "spec": merge(spec, overlay.get("spec") or {}),
    }


def _with_amounts_as_text(container: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes takes `rdma/ib: 8` as well as `"8"`; the client's types know the text alone."""
    resources = container.get("resources")
    if not isinstance(resources, dict):
        return container
    amounts = {
        kind: {name: str(amount) if type(amount) is int else amount for name, amount in of.items()}
        for kind, of in resources.items()
        if kind in ("limits", "requests") and isinstance(of, dict)
    }
    return {**container, "resources": {**resources, **amounts}}
