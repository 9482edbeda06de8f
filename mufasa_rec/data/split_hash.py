"""The hash that names a split: everything learned or counted from its training part carries it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def files_hash(files: Mapping[str, str]) -> str:
    """sha256 over the files' relative paths and their own sha256."""
    return _sha256(sorted(files.items()))


def split_hash(policy: str, borders: Mapping[str, int], events_hash: str, files: Mapping[str, str]) -> str:
    """sha256 over policy, borders, events and row files."""
    return _sha256([policy, sorted(borders.items()), events_hash, sorted(files.items())])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
