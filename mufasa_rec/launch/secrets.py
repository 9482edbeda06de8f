"""Secrets of a job, by name: a value is in no command line, script, manifest or dry run.

NAME                 a variable of the shell that submits, which sbatch hands on to the job
NAME=secret/key      a variable from a key of a Kubernetes secret
/folder=secret       a Kubernetes secret as a folder of files, one per key
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mufasa_rec.launch.refusal import LaunchRefusedError

_FORMS = (
    "NAME of a variable of your shell (Slurm)",
    "NAME=secret/key or /folder=secret of a Kubernetes secret (Kubernetes)",
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # a subdomain of DNS
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")


@dataclass(frozen=True, kw_only=True)
class Secret:
    """Where a job gets a secret from.

    Attributes:
        target: The variable, or the folder, by which the program reads it.
        secret: Name of a Kubernetes secret; None for a variable of the shell that submits.
        key: Key of that secret; None for all of them, as files.
    """

    target: str
    secret: str | None = None
    key: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is read as files."""
        return self.target.startswith("/")

    def __str__(self) -> str:
        source = "" if self.secret is None else f"={self.secret}"
        return self.target + source + ("" if self.key is None else f"/{self.key}")


def parse_secrets(entries: Iterable[str]) -> tuple[Secret, ...]:
    """Read the entries of `--secrets`.

    Raises:
        LaunchRefusedError: An entry has none of the forms, or a target is given twice. The message repeats no more of
            an entry than its target: what stands behind may be a value that was given by mistake.

    Example:
        >>> [str(one) for one in parse_secrets(["TOKEN", "KEY=store/key", "/keys=store"])]
        ['TOKEN', 'KEY=store/key', '/keys=store']
    """
    secrets = tuple(_parse(entry) for entry in entries)
    targets = [one.target for one in secrets]
    for target in targets:
        if targets.count(target) > 1:
            raise LaunchRefusedError(f"secrets: {target} is given twice; give it once")
    return secrets


def _parse(entry: str) -> Secret:
    target, given, source = entry.partition("=")
    if not given and _VARIABLE.fullmatch(target):
        return Secret(target=target)
    secret, of, key = source.partition("/")
    if _SECRET.fullmatch(secret):
        if _VARIABLE.fullmatch(target) and of and _KEY.fullmatch(key):
            return Secret(target=target, secret=secret, key=key)
        if target.startswith("/") and len(target) > 1 and not of:
            return Secret(target=target, secret=secret)
    raise LaunchRefusedError(
        f"secrets: the entry for {target!r} names no secret; give {', or '.join(_FORMS)}. A value goes in no argument."
    )


def add_to_pod(spec: dict[str, Any], secrets: Iterable[Secret]) -> dict[str, Any]:
    """Return a pod's spec whose first container gets secrets.

    Raises:
        LaunchRefusedError: For a variable of the shell that submits: its value would have to be in the manifest.
    """
    first, *others = spec["containers"]
    variables, mounts, volumes = [], [], []
    for number, one in enumerate(secrets):
        if one.secret is None:
            raise LaunchRefusedError(
                f"secrets: {one.target} is a variable of your shell, whose value a manifest would show; put it into a"
                f" secret of the namespace (kubectl create secret generic NAME --from-literal=KEY=...) and give"
                f" {one.target}=NAME/KEY"
            )
        if one.is_folder:
            volumes.append({"name": f"secret-{number}", "secret": {"secretName": one.secret}})
            mounts.append({"name": f"secret-{number}", "mountPath": one.target, "readOnly": True})
        else:
            source = {"secretKeyRef": {"name": one.secret, "key": one.key}}
            variables.append({"name": one.target, "valueFrom": source})
    first = {
        **first,
        "env": [*first.get("env", []), *variables],
        "volumeMounts": [*first.get("volumeMounts", []), *mounts],
    }
    return {**spec, "containers": [first, *others], "volumes": [*spec.get("volumes", []), *volumes]}
