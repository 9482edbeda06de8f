"""`checkpoint.json`: what a checkpoint holds and how to know that it is whole.

It is written last, so a folder with a manifest is a complete checkpoint; it names every file with its size and
checksum, so a checkpoint that was damaged later is found out before one byte of it is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from mufasa_rec.data import paths

MANIFEST = "checkpoint.json"
FORMAT_VERSION = 2
_CHUNK_BYTES = 1 << 23


class DamagedCheckpointError(ValueError):
    """A checkpoint is not as it was written."""


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and XXH3-128 checksum of a file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `checkpoint.json` says.

    Attributes:
        name: Name of the checkpoint, that of its folder.
        step: Optimizer steps done.
        state: Everything of the run's state that is not a tensor.
        about: The run: its configuration, plan, data set, versions.
        files: Every other file of the folder.
        world_size: Ranks that wrote it.
        format_version: Version of this layout.
    """

    name: str
    step: int
    state: dict[str, Any]
    about: dict[str, Any]
    files: dict[str, FileFacts] = field(default_factory=dict)
    world_size: int = 1
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The manifest with its own checksum, as text."""
        content = asdict(self)
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1)


def read_manifest(folder: paths.Location) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        DamagedCheckpointError: When it is missing or not as it was written.
        ValueError: When it is of another format version.
    """
    file = paths.join(folder, MANIFEST)
    if not paths.exists(file):
        raise DamagedCheckpointError(f"{file}: missing; the folder holds no complete checkpoint.")
    with paths.open_file(file) as handle:
        text = handle.read()
    try:
        content = json.loads(text)
        version = content.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{file}: damaged, it is no manifest ({error}).") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version={version}, this version reads {FORMAT_VERSION}; use the version of mufasa_rec "
            "that wrote it."
        )
    try:
        said = content.pop("checksum")
        content["files"] = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        manifest = Manifest(**content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{file}: damaged, it lacks fields or has strange ones ({error}).") from error
    if said != _checksum(asdict(manifest)):
        raise DamagedCheckpointError(f"{file}: damaged, it does not have the checksum that it states.")
    return manifest


def file_facts(file: paths.Location) -> FileFacts:
    """Read a file to its end for its size and checksum."""
    digest, size = xxhash.xxh3_128(), 0
    with paths.open_file(file) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileFacts(size, digest.hexdigest())


def damage(folder: paths.Location, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Compare files with the manifest; returns what is wrong with the first bad one, None when all are as written."""
    for name in names:
        file = paths.join(folder, name)
        try:
            found = file_facts(file)
        except (ValueError, OSError) as error:
            return f"{file} cannot be read ({error})"
        wanted = manifest.files[name]
        if found.bytes != wanted.bytes:
            return f"{file} has {found.bytes:,} bytes, {wanted.bytes:,} were written"
        if found != wanted:
            return f"{file} does not have the checksum with which it was written"
    return None


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
