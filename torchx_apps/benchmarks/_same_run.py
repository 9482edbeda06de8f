"""Whether two runs are the same: weights, optimizer state, metrics and rows, bit for bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mufasa_rec.training.checkpoint import find_checkpoint
from mufasa_rec.training.checkpoint_manifest import read_manifest
from mufasa_rec.training.checkpoint_reader import open_reader

_TIMES = ("time_s", "samples_per_s", "events_per_s", "step_ms", "data_wait_share")
Place = tuple[int, int]  # epoch, step in it


def differences(found: Path, wanted: Path) -> list[str]:
    """Compare two runs with their journals.

    Args:
        found: Folder of `run` and journals.
        wanted: Folder of the run that nobody disturbed.

    Returns:
        What differs, for a reader; empty when nothing does.
    """
    said: list[str] = []
    for which in ("newest", "best"):
        places = [find_checkpoint(folder / "run/checkpoints", which) for folder in (found, wanted)]
        said += differences_of_checkpoints(*places)
    lines, expected = _metrics(found / "run"), _metrics(wanted / "run")
    if lines != expected:
        first = next((i for i, (a, b) in enumerate(zip(lines, expected)) if a != b), min(len(lines), len(expected)))
        said.append(f"metrics.jsonl from line {first + 1} on ({len(lines)} lines, {len(expected)} wanted)")
    results = [json.loads((folder / "run/summary.json").read_text()) for folder in (found, wanted)]
    if _without_times(results[0]["best"]) != _without_times(results[1]["best"]):
        said.append("the best validation")
    return said + _of_rows(found, wanted)


def differences_of_checkpoints(found: str, wanted: str) -> list[str]:
    """Compare two checkpoints: names and bits of all tensors, and the state that is no tensor."""
    tensors, expected = _tensors(found), _tensors(wanted)
    kind = f"checkpoint {Path(found).name}"
    if tensors.keys() != expected.keys():
        return [f"{kind}: other tensors"]
    said = [
        f"{kind}: {name}" for name, value in expected.items() if not torch.equal(_bits(tensors[name]), _bits(value))
    ]
    states = [_state(read_manifest(folder).state) for folder in (found, wanted)]
    return said + [f"{kind}: {name}" for name in states[1] if states[0].get(name) != states[1][name]]


def _tensors(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together from their shards."""
    reader = open_reader(folder)
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is meant: one process reads
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _state(state: dict[str, Any]) -> dict[str, Any]:
    """A manifest's state without what two runs may not share: times, and how often a step was saved."""
    kept = {name: value for name, value in state.items() if name != "metrics_bytes"}
    progress = {name: value for name, value in state["progress"].items() if name != "seconds"}
    return {**kept, "progress": {**progress, "best": _without_times(progress["best"])}}


def _without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in (*_TIMES, "checkpoint")}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [_without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _of_rows(found: Path, wanted: Path) -> list[str]:
    """What differs between the rows of two runs, also in steps that were lost and trained again."""
    said = []
    ranks = sorted({path.suffix for path in wanted.glob("journal-*")})
    for rank in ranks:
        (expected,) = _attempts(wanted, rank)
        of_place = dict(expected)
        for number, attempt in enumerate(_attempts(found, rank), 1):
            said += [f"rows of {place} in attempt {number}" for place, rows in attempt if of_place.get(place) != rows]
        if rows_that_count(found, rank) != expected:
            said.append(f"rows seen by {rank[1:]}")
    return said


def rows_that_count(folder: Path, rank: str) -> list[tuple[Place, Any]]:
    """The steps of a run with the rows of one rank: what an attempt trains replaces what it had lost.

    Args:
        folder: Folder of the journals.
        rank: Their suffix, such as `.rank-0`.
    """
    kept: list[tuple[Place, Any]] = []
    for attempt in _attempts(folder, rank):
        kept = [step for step in kept if not attempt or step[0] < attempt[0][0]] + attempt
    return kept


def _attempts(folder: Path, rank: str) -> Iterator[list[tuple[Place, Any]]]:
    """Steps and their rows of every process: one for each attempt, and one more for each restart in place."""
    for path in sorted(folder.glob(f"journal-*{rank}")):
        found: list[tuple[Place, Any]] = []
        for text in path.read_text().splitlines(keepends=True):
            line = json.loads(text) if text.endswith("\n") else {}
            if "pid" in line and found:
                yield found
                found = []
            if "rows" in line:
                found.append(((line["epoch"], line["step"]), line["rows"]))
        yield found
