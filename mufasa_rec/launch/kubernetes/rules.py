"""What a manifest must keep beyond the types of its fields: names, quantities, and parts that refer to each other.

An API server checks the same when it takes a job, or, for the pods of a Volcano job, only when they are made: the job
would be accepted and never start.
"""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from mufasa_rec.launch.kubernetes.field_types import VOLCANO_API, type_problems
from mufasa_rec.launch.refusal import LaunchRefusedError

_LABEL_OF_DNS = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_UNITS = ("k", "M", "G", "T", "P", "E")
# As the registry's specification has it: host, path, tag, digest; upper case is for tags alone.
_IMAGE = re.compile(
    r"([a-zA-Z0-9.-]+(:\d+)?/)?[a-z0-9]+((\.|_{1,2}|-+|/)[a-z0-9]+)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
    r"|sha256:[0-9a-f]{64}"
)
_FACTORS = {
    None: Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** (power + 1) for power, unit in enumerate(_UNITS)},
    **{f"{unit.upper()}i": Decimal(1024) ** (power + 1) for power, unit in enumerate(_UNITS)},
}


def quantity(text: Any) -> Decimal:
    """Return the number that a resource quantity stands for.

    Raises:
        ValueError: The text is no quantity.

    Example:
        >>> int(quantity("1500m") * 2), int(quantity("1Gi")), int(quantity("1G"))
        (3, 1073741824, 1000000000)
    """
    found = _QUANTITY.fullmatch(str(text))
    if not found:
        raise ValueError(f"quantity is {text!r}: give a number and a unit, such as 500m, 8 or 16Gi")
    return Decimal(found[1]) * _FACTORS[found[2]]


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """Return everything for which a cluster would refuse a manifest, or take it and never run it; a line each."""
    wrong = list(type_problems(manifest))
    if wrong:
        return wrong
    metadata, spec = manifest["metadata"], manifest["spec"]
    name = metadata.get("name", "")
    found = [*_name_problems(name, "metadata.name"), *_label_problems(metadata, "metadata")]
    if manifest["apiVersion"] == VOLCANO_API:
        found += _volcano_problems(name, spec)
    elif manifest["kind"] == "Job":
        # A pod's host name is <job>-<index>, one label of DNS.
        found += _name_problems(f"{name}-{spec['completions'] - 1}", "name of the last pod")
        found += _pod_problems(spec["template"], "spec.template")
    elif manifest["kind"] == "Pod":
        found += _pod_problems(manifest, "")
    return found


def refuse_if_wrong(manifest: Mapping[str, Any]) -> None:
    """Check a manifest before it is shown or sent.

    Raises:
        LaunchRefusedError: It would be refused or never run; the message has a line per problem.
    """
    found = problems(manifest)
    if found:
        where = f"{manifest.get('kind')} {manifest.get('metadata', {}).get('name')!r}"
        raise LaunchRefusedError("\n  ".join([f"{where} would not run on a cluster:", *found]))


def _volcano_problems(name: str, spec: Mapping[str, Any]) -> Iterator[str]:
    names = [task["name"] for task in spec["tasks"]]
    if not names:
        yield "spec.tasks is empty: a job needs one"
    for twice in sorted({one for one in names if names.count(one) > 1}):
        yield f"spec.tasks: {twice!r} is there twice; a task's name is its own"
    for number, task in enumerate(spec["tasks"]):
        path = f"spec.tasks[{number}]"
        # Volcano names a pod <job>-<task>-<index>, and the host after the pod.
        yield from _name_problems(f"{name}-{task['name']}-{task['replicas'] - 1}", f"name of the pod of {path}")
        yield from _pod_problems(task["template"], f"{path}.template")


def _pod_problems(pod: Mapping[str, Any], path: str) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    yield from _label_problems(pod.get("metadata") or {}, f"{prefix}metadata")
    spec = pod["spec"]
    for key, value in (spec.get("nodeSelector") or {}).items():
        if not _LABEL_VALUE.fullmatch(value):
            yield f"{prefix}spec.nodeSelector.{key} is {value!r}: no node has such a label"
    volumes = [volume["name"] for volume in spec.get("volumes") or []]
    for volume in volumes:
        yield from _name_problems(volume, f"{prefix}spec.volumes: name")
    for number, container in enumerate([*spec["containers"], *(spec.get("initContainers") or [])]):
        yield from _container_problems(container, volumes, f"{prefix}spec.containers[{number}]")
    for volume in spec.get("volumes") or []:
        limit = (volume.get("emptyDir") or {}).get("sizeLimit")
        if limit is not None and not _QUANTITY.fullmatch(limit):
            yield f"{prefix}spec.volumes: sizeLimit of {volume['name']!r} is {limit!r}: give one such as 16Gi"


def _container_problems(container: Mapping[str, Any], volumes: list[str], path: str) -> Iterator[str]:
    yield from _name_problems(container["name"], f"{path}.name")
    if not container.get("image"):
        yield f"{path}.image is {container.get('image')!r}: give the component an --image"
    elif not _IMAGE.fullmatch(container["image"]):
        yield f"{path}.image is {container['image']!r}: no name of an image; give REGISTRY/NAME:TAG, NAME in a-z"
    mounts = container.get("volumeMounts") or []
    for number, mount in enumerate(mounts):
        if mount["name"] not in volumes:
            yield f"{path}.volumeMounts[{number}].name is {mount['name']!r}: the pod has no such volume ({volumes})"
    for twice in _twice([mount["mountPath"] for mount in mounts]):
        yield f"{path}.volumeMounts: {twice!r} is mounted twice"
    variables = [variable["name"] for variable in container.get("env") or []]
    for variable in variables:
        if not _VARIABLE.fullmatch(variable):
            yield f"{path}.env: {variable!r} is no name of a variable; give letters, digits and underscores"
    for twice in _twice(variables):
        yield f"{path}.env: {twice!r} is set twice"
    for port in container.get("ports") or []:
        if not _PORT_NAME.fullmatch(port.get("name") or "x"):
            yield f"{path}.ports: {port['name']!r} is no name of a port; give 1 to 15 of a-z, 0-9 and -"
        if not 0 < port["containerPort"] < 65536:
            yield f"{path}.ports: {port['containerPort']} is no port; give 1 to 65535"
    yield from _resource_problems(container.get("resources") or {}, f"{path}.resources")


def _resource_problems(resources: Mapping[str, Any], path: str) -> Iterator[str]:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    readable = True
    for kind, amounts in (("limits", limits), ("requests", requests)):
        for name, amount in amounts.items():
            if not _QUANTITY.fullmatch(str(amount)):
                readable = False
                yield f"{path}.{kind}.{name} is {amount!r}: give a number and a unit, such as 500m, 8 or 16Gi"
            # A device is a name with a vendor's domain; it has no half, and is not promised twice.
            elif "/" in name and quantity(amount) % 1:
                yield f"{path}.{kind}.{name} is {amount!r}: devices are whole; give a number without a unit"
    for name in sorted(requests.keys() & limits.keys()) if readable else ():
        if quantity(requests[name]) > quantity(limits[name]):
            yield f"{path}: the request of {name} is {requests[name]}, above its limit {limits[name]}"
        elif "/" in name and quantity(requests[name]) != quantity(limits[name]):
            yield f"{path}: {name} has request {requests[name]} and limit {limits[name]}; devices need the same"
    for name in sorted(requests.keys() - limits.keys()):
        if "/" in name or name.startswith("hugepages-"):
            yield f"{path}: {name} has a request and no limit; give the limit"


def _name_problems(name: str, path: str) -> Iterator[str]:
    if not _LABEL_OF_DNS.fullmatch(name):
        yield f"{path} is {name!r}, {len(name)} characters: give 1 to 63 of a-z, 0-9 and -, no - at an end"


def _label_problems(metadata: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in (metadata.get("labels") or {}).items():
        if not _LABEL_VALUE.fullmatch(value):
            yield f"{path}.labels.{key} is {value!r}: give at most 63 letters, digits, -, _ and ., alphanumeric ends"


def _twice(items: list[str]) -> list[str]:
    return sorted({item for item in items if items.count(item) > 1})
