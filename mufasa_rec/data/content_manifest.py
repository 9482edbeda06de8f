"""The manifest of a content generation: encoder, numeric form, segments, and the checksums that runs pin."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mufasa_rec.data import paths

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One file of a generation and the checksum of its bytes."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ContentManifest:
    """What a generation is: its encoder, its numeric form and its segments."""

    name: str
    generation: str
    encoder: str
    encoder_version: str
    width: int
    dtype: str
    normalisation: str
    source_hash: str
    split: dict[str, str] | None
    segments: tuple[Segment, ...]
    rows: int
    dropped_unknown: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def checksums(self) -> tuple[str, ...]:
        """A checksum after each segment: the last is the generation's, the others are those of its earlier states."""
        encoding = (self.name, self.generation, self.encoder, self.encoder_version, self.width, self.dtype)
        digest = hashlib.sha256(json.dumps([*encoding, self.normalisation, self.split], sort_keys=True).encode())
        found = []
        for segment in self.segments:
            digest.update(json.dumps([segment.file, segment.rows, segment.sha256]).encode())
            found.append(digest.hexdigest())
        return tuple(found)

    @property
    def checksum(self) -> str:
        """The checksum that data sets and runs pin."""
        return self.checksums[-1]

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({**asdict(self), "checksum": self.checksum}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: str) -> ContentManifest:
        """Reads and checks `manifest.json` of a generation.

        Args:
            folder: The generation's folder, local or remote.

        Returns:
            The manifest.

        Raises:
            ValueError: The file is missing, was edited by hand, or is of another format version.
        """
        url = paths.join(folder, MANIFEST)
        if not paths.exists(url):
            raise ValueError(f"content generation {folder}: {MANIFEST} is missing; run prepare, or correct the path")
        try:
            with paths.open_file(url, "rb") as file:
                return cls._from_json(json.loads(file.read()))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"content manifest {url}: {error}; write the generation again") from error

    @classmethod
    def _from_json(cls, raw: Any) -> ContentManifest:
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        if raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version is {raw.get('format_version')!r}, this program reads {FORMAT_VERSION}")
        checksum = raw.pop("checksum", None)
        names = {field.name for field in fields(cls)}
        if raw.keys() != names:
            raise ValueError(f"fields {sorted(raw.keys() ^ names)} are unknown or missing")
        segments = tuple(Segment(**segment) for segment in raw.pop("segments"))
        manifest = cls(**raw, segments=segments)
        files = [segment.file for segment in segments]
        if files != [segment_file(number) for number in range(len(files))] or not files:
            raise ValueError(f"segments are {files}, expected {segment_file(0)} and following")
        if manifest.rows != sum(segment.rows for segment in segments):
            raise ValueError(f"rows is {manifest.rows}, but the segments hold {sum(s.rows for s in segments)}")
        if checksum != manifest.checksum:
            raise ValueError(f"checksum is {checksum}, but the fields give {manifest.checksum}")
        return manifest


def segment_file(number: int) -> str:
    """File name of a generation's segment, `segment-00000.safetensors` being the first."""
    return f"segment-{number:05d}.safetensors"


def generation_folder(dataset_url: str | Path, name: str, generation: str) -> str:
    """Folder of a modality's generation inside a data set; both names must be plain words.

    Raises:
        ValueError: A name could leave the data set's folder.
    """
    for field, value in (("modality", name), ("generation", generation)):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
            raise ValueError(f"{field} {value!r}: use letters, digits, '_', '-' and '.', not starting with '.' or '-'")
    return paths.join(str(dataset_url), "content", name, generation)


def require_same(name: str, pinned: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Refuses a modality that is not what was pinned: another width, dtype, normalisation or encoder.

    Args:
        name: The modality.
        pinned: Fields and values of the pinned generation.
        found: Fields and values of what is at hand; fields that ``pinned`` lacks are not compared.

    Raises:
        ValueError: Fields differ; all of them are named.
    """
    changed = [
        f"{field} is {found[field]!r}, pinned is {value!r}"
        for field, value in pinned.items()
        if field in found and found[field] != value
    ]
    if changed:
        raise ValueError(
            f"modality `{name}` changed: {'; '.join(changed)}; give vectors of the pinned encoder and form, "
            "or write a new generation and train on that"
        )


def generations(dataset_folder: str | Path, name: str) -> list[str]:
    """The numbered generations of a modality, oldest first."""
    found: list[str] = []
    while paths.exists(generation_folder(dataset_folder, name, str(len(found) + 1))):
        found.append(str(len(found) + 1))
    return found
