"""A batch the slow way: one Python loop per row and event, straight from the row groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mufasa_rec.data.batch import Batch
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.parquet import RowGroup


@dataclass
class Naive:
    """What a batch says, in lists of item ids instead of places."""

    history: list[list[int]] = field(default_factory=list)
    following: list[list[int]] = field(default_factory=list)
    weight: list[list[float]] = field(default_factory=list)
    columns: dict[str, list[int]] = field(default_factory=dict)
    start_position: list[int] = field(default_factory=list)
    user: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)


def naive_batch(
    rows: Sequence[tuple[RowGroup, int]], max_history: int, target_actions: Sequence[int] | None = None
) -> Naive:
    """Build the rows one by one."""
    out = Naive()
    for group, row in rows:
        begin, end = int(group.stream_start[row]), int(group.history_end[row])
        stream = {name: values[begin : begin + end].tolist() for name, values in group.columns.items()}
        first = max(0, end - max_history - 1)
        history = list(range(first, end - 1)) if end else []
        out.history.append([stream["item"][i] for i in history])
        out.following.append([stream["item"][i + 1] for i in history])
        out.weight.append([_weight(stream, i + 1, int(group.target_from[row]), target_actions) for i in history])
        for name in stream.keys() - {"item", "weight", "label"}:
            out.columns.setdefault(name, []).extend(int(stream[name][i]) for i in history)
        out.start_position.append(first)
        out.user.append(int(group.user[row]))
        out.target.append(stream["item"][end - 1] if end else -1)
        out.seen.append(stream["item"][: max(end - 1, 0)])
    return out


def _weight(stream: dict[str, list], event: int, target_from: int, actions: Sequence[int] | None) -> float:
    if event < target_from or (actions is not None and stream["action"][event] not in actions):
        return 0.0
    return float(stream["weight"][event]) if "weight" in stream else 1.0


def check_batch(batch: Batch, catalog: ItemLookup, expected: Naive) -> None:
    """Compare a finished batch with the slow one, its lookups with the item store."""
    ids = np.asarray(catalog.items.ids)
    raw = ids[batch.item_row.numpy()]
    offsets = batch.offsets.tolist()
    cut = [slice(a, b) for a, b in zip(offsets[:-1], offsets[1:])]
    per_row: list[tuple[str, Any, Any]] = [
        ("history", raw[batch.event_item.numpy()], expected.history),
        ("following", raw[batch.next_item.numpy()], expected.following),
        ("weight", batch.target_weight.numpy(), expected.weight),
    ]
    for name, found, wanted in per_row:
        assert [found[part].tolist() for part in cut] == wanted, name
    assert batch.start_position.tolist() == expected.start_position
    assert batch.user.tolist() == expected.user
    assert [int(ids[row]) if row >= 0 else -1 for row in batch.target_row.tolist()] == expected.target
    assert batch.num_targets == sum(weight > 0 for row in expected.weight for weight in row)
    tensors = {"action": batch.actions, "timestamp": batch.timestamps_ms}
    for name, wanted in expected.columns.items():
        found = tensors[name] if name in tensors else batch.features[f"event.{name}"].values()
        assert found is not None
        assert found.tolist() == wanted, name
    check_lookups(batch, catalog)


def check_lookups(batch: Batch, catalog: ItemLookup) -> None:
    """Compare the features of every batch item with the item store and the content stores."""
    features = batch.features.to_dict()
    assert batch.features.stride() == 1
    places: dict[str, int] = {}
    for place, row in enumerate(batch.item_row.tolist()):
        assert int(features["item"].values()[place]) == int(catalog.keys[row])
        for name, column in catalog.items.categoricals.items():
            values = features[f"item.{name}"].values()
            if column.offsets is None:
                assert int(values[place]) == int(column.values[row])
                continue
            size = int(batch.category_lengths[name][place])
            begin = places.get(name, 0)
            places[name] = begin + size
            wanted = column.values[column.offsets[row] : column.offsets[row + 1]].tolist()
            assert values[begin : begin + size].tolist() == wanted
        for name, rows in catalog.content_rows.items():
            assert bool(batch.present[name][place]) == (rows[row] >= 0)
            assert int(features[f"content.{name}"].values()[place]) == max(int(rows[row]), 0)
