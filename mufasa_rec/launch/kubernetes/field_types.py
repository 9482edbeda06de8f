"""Every field of a manifest against the types of the Kubernetes client, and of Volcano's job.

An API server drops a field that it does not know (or refuses it, as it is configured): a `toleration` in place of
`tolerations` would be noticed on the cluster, or never. The client package holds the same types as the server.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PLAIN: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "datetime": (str,),
}
_LIST = re.compile(r"list\[(.+)\]")
_MAP = re.compile(r"dict[(\[][^,]+, (.+)[)\]]")

VOLCANO_API = "batch.volcano.sh/v1alpha1"
# The fields of Volcano's job (1.4 to 1.13) that a job of ours may use: name -> type. `!` marks what must be there.
_VOLCANO: Mapping[str, Mapping[str, str]] = {
    "VolcanoJob": {"apiVersion!": "str", "kind!": "str", "metadata!": "V1ObjectMeta", "spec!": "VolcanoSpec"},
    "VolcanoSpec": {
        "schedulerName": "str",
        "minAvailable": "int",
        "minSuccess": "int",
        "queue": "str",
        "maxRetry": "int",
        "ttlSecondsAfterFinished": "int",
        "priorityClassName": "str",
        "plugins": "dict(str, list[str])",
        "policies": "list[VolcanoPolicy]",
        "tasks!": "list[VolcanoTask]",
    },
    "VolcanoTask": {
        "name!": "str",
        "replicas!": "int",
        "minAvailable": "int",
        "maxRetry": "int",
        "policies": "list[VolcanoPolicy]",
        "template!": "V1PodTemplateSpec",
    },
    "VolcanoPolicy": {"action!": "str", "event": "str", "events": "list[str]", "exitCode": "int", "timeout": "str"},
}
_KINDS: Mapping[tuple[str, str], str] = {
    (VOLCANO_API, "Job"): "VolcanoJob",
    ("batch/v1", "Job"): "V1Job",
    ("v1", "Service"): "V1Service",
    ("v1", "Pod"): "V1Pod",
}


def type_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Give what in a manifest is no field, is missing, or has a value of another type, each with its path.

    Args:
        manifest: A Volcano job, a Job, a Service or a Pod, as plain maps and lists.

    Yields:
        A line per problem.
    """
    kind = (str(manifest.get("apiVersion")), str(manifest.get("kind")))
    if kind not in _KINDS:
        yield f"apiVersion and kind are {' '.join(kind)!r}: one of {', '.join(map(' '.join, _KINDS))}"
        return
    yield from problems_of(manifest, _KINDS[kind], "")


def problems_of(value: Any, type_name: str, path: str) -> Iterator[str]:
    """Give the problems of a value that should be of a type, named as the client names types.

    Example:
        >>> list(problems_of([{"key": "gpu", "operater": "Exists"}], "list[V1Toleration]", "spec.tolerations"))
        ['spec.tolerations[0].operater: V1Toleration has no such field']
    """
    if value is None:
        return
    listed, mapped = _LIST.fullmatch(type_name), _MAP.fullmatch(type_name)
    if listed:
        if isinstance(value, list):
            for number, item in enumerate(value):
                yield from problems_of(item, listed[1], f"{path}[{number}]")
        else:
            yield f"{path} is {value!r}: a list is expected"
    elif mapped:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from problems_of(item, mapped[1], f"{path}.{key}")
        else:
            yield f"{path} is {value!r}: a map is expected"
    elif type_name in _PLAIN:
        # In Python a bool is an int; YAML's `yes` where a number is expected is a mistake all the same.
        if not isinstance(value, _PLAIN[type_name]) or (isinstance(value, bool) and type_name != "bool"):
            yield f"{path} is {value!r}: {type_name} is expected" + (", in quotes" if type_name == "str" else "")
    elif type_name != "object":  # an object: anything, such as a port by number or by name
        yield from _problems_of_fields(value, type_name, path)


def _problems_of_fields(value: Any, type_name: str, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path} is {value!r}: a map of {type_name}'s fields is expected"
        return
    fields, required = _fields(type_name)
    prefix = f"{path}." if path else ""
    for key, item in value.items():
        if key in fields:
            yield from problems_of(item, fields[key], f"{prefix}{key}")
        else:
            yield f"{prefix}{key}: {type_name} has no such field"
    for key in sorted(required):
        if value.get(key) is None:
            yield f"{prefix}{key} is missing: {type_name} needs it"


def _fields(type_name: str) -> tuple[dict[str, str], set[str]]:
    """The type of each field of a type, and the fields that must be there."""
    if type_name in _VOLCANO:
        fields = _VOLCANO[type_name]
        return {name.rstrip("!"): of for name, of in fields.items()}, {n[:-1] for n in fields if n.endswith("!")}
    from kubernetes.client import Configuration, models

    cls = getattr(models, type_name)
    names = cls.attribute_map
    fields = {names[attribute]: of for attribute, of in cls.openapi_types.items()}
    # The client says only in its setters which fields must be there.
    lenient = Configuration()
    lenient.client_side_validation = False
    empty, strict = cls(local_vars_configuration=lenient), Configuration()
    empty.local_vars_configuration = strict
    return fields, {names[attribute] for attribute in cls.openapi_types if _refuses_none(empty, attribute)}


def _refuses_none(instance: Any, attribute: str) -> bool:
    try:
        setattr(instance, attribute, None)
    except ValueError:
        return True
    return False
