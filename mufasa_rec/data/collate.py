"""Rows to a finished batch: slices of Arrow memory become item rows, embedding keys and a KeyedJaggedTensor.

A batch's rows come from several row groups (one or two per virtual reader); the loops here are over those and over
features, none is over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.data.batch import DRAWN, ITEM, Batch, salted
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.parquet import RowGroup

NOT_CATEGORICAL = {"item", "timestamp", "action", "weight", "label"}


@dataclass(frozen=True)
class Windows:
    """The part of each row's stream that a batch reads: `window = history + the next event`.

    Attributes:
        columns: Values of the list columns over all windows, each `[W]`.
        lengths: Events of each window, `[B]`.
        start_position: Position of each window's first event in its stream, `[B]`.
        target_from: First target of each row, counted from the window's start, `[B]`.
        user: `[B]`.
        row_id: `[B]`.
        num_cut: Targets of the rows that lie before their windows.
    """

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    start_position: np.ndarray
    target_from: np.ndarray
    user: np.ndarray
    row_id: np.ndarray
    num_cut: int = 0


def ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """`[0..l0), [0..l1), ...` end to end.

    Example:
        >>> ragged_arange(np.array([2, 0, 3])).tolist()
        [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def cut_windows(pieces: Sequence[tuple[RowGroup, np.ndarray]], max_history: int | None, *, align: int = 1) -> Windows:
    """Cut each row's newest events out of its row group.

    Args:
        pieces: Row groups and the rows wanted of each, `[k]` int64.
        max_history: Events of history that a row keeps beside its last target; None for all.
        align: Windows begin at a multiple of it, counted from the stream's start, so that whole blocks are dropped: up
            to `align - 1` more events are kept.

    Returns:
        The windows, rows in the order of the pieces.
    """
    fields = ("history_end", "stream_start", "target_from", "user", "row_id")
    chosen = [[getattr(group, name)[rows] for name in fields] for group, rows in pieces]
    end, stream_start, target_from, user, row_id = (np.concatenate(part) for part in zip(*chosen, strict=True))
    start = np.zeros_like(end) if max_history is None else np.maximum(end - (max_history + 1), 0)
    start -= start % align
    lengths = end - start
    index = np.repeat(stream_start + start, lengths) + ragged_arange(lengths)
    last_rows = np.cumsum([len(rows) for _, rows in pieces])
    borders = np.r_[0, np.cumsum(lengths)][np.r_[0, last_rows]].tolist()
    columns = {}
    for name, like in pieces[0][0].columns.items():
        columns[name] = values = np.empty(len(index), like.dtype)
        for (group, _), a, b in zip(pieces, borders[:-1], borders[1:], strict=True):
            # Clipping changes nothing (rows were checked when they were read) and spares numpy a buffer.
            np.take(group.columns[name], index[a:b], out=values[a:b], mode="clip")
    num_cut = int(np.maximum(start + 1 - np.maximum(target_from, 1), 0).sum())
    return Windows(columns, lengths, start, np.maximum(target_from - start, 0), user, row_id, num_cut)


def distinct(rows: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct item rows, ascending, and the place of each entry among them.

    A flag per item beats sorting until the catalog is many times larger than the batch.
    """
    if num_items > 16 * len(rows):
        return np.unique(rows, return_inverse=True)
    flag = np.zeros(num_items, dtype=bool)
    flag[rows] = True
    found = np.flatnonzero(flag)
    place = np.empty(num_items, dtype=np.int64)
    place[found] = np.arange(len(found))
    return found, place[rows]


@dataclass(frozen=True)
class ItemFeatures:
    """What a batch says of its items, `[U]`.

    Attributes:
        ids: Ids to look up, by feature.
        present: Which have each modality, `[U]` bool.
        counts: Values of each multi-valued categorical, `[U]`.
        content: Vectors of the modalities that travel with the batch, each `[U, P]` float16.
    """

    ids: dict[str, np.ndarray]
    present: dict[str, torch.Tensor]
    counts: dict[str, torch.Tensor]
    content: dict[str, torch.Tensor]


def id_features(feature: str, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Embedding keys `[n]`, or `[n, salts]` with a feature for each salt."""
    columns = keys[:, None] if keys.ndim == 1 else keys
    return {salted(feature, salt): columns[:, salt] for salt in range(columns.shape[1])}


def seen_first(rows: np.ndarray, place: np.ndarray, num_seen: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Batch items in an order in which those that the first entries refer to come first.

    Args:
        rows: Item row of each batch item, `[U]`.
        place: Batch item of each entry.
        num_seen: Entries that were seen, not drawn.

    Returns:
        The same two in that order, and how many batch items were seen.

    Example:
        >>> rows, place, seen = seen_first(np.array([5, 6, 7]), np.array([2, 2, 0, 1]), 2)
        >>> rows.tolist(), place.tolist(), seen
        ([7, 5, 6], [0, 0, 1, 2], 1)
    """
    drawn = np.ones(len(rows), dtype=bool)
    drawn[place[:num_seen]] = False
    order = np.argsort(drawn, kind="stable")
    moved = np.empty_like(order)
    moved[order] = np.arange(len(order))
    return rows[order], moved[place], len(rows) - int(drawn.sum())


def item_features(catalog: ItemLookup, rows: np.ndarray, num_seen: int | None = None) -> ItemFeatures:
    """What a batch says of items `rows [U]`, of which the first `num_seen` were seen and the others drawn."""
    keys = catalog.keys[rows]
    if catalog.keys_are_ids:
        ids = {ITEM: keys[:num_seen], ITEM + DRAWN: keys[len(keys) if num_seen is None else num_seen :]}
    else:
        ids = id_features(ITEM, keys)
    counts: dict[str, torch.Tensor] = {}
    present: dict[str, torch.Tensor] = {}
    content: dict[str, torch.Tensor] = {}
    for name, column in catalog.items.categoricals.items():
        if column.offsets is None:
            ids[f"{ITEM}.{name}"] = column.values[rows].astype(np.int64)
            continue
        start = column.offsets[rows]
        size = column.offsets[rows + 1] - start
        ids[f"{ITEM}.{name}"] = column.values[np.repeat(start, size) + ragged_arange(size)].astype(np.int64)
        counts[name] = torch.from_numpy(size)
    for name, content_rows in catalog.content_rows.items():
        row = content_rows[rows]
        if name in catalog.carried:
            content[name] = catalog.stores[name].halves(row)
        else:
            ids[f"content.{name}"] = np.maximum(row, 0)
        present[name] = torch.from_numpy(row >= 0)
    return ItemFeatures(ids, present, counts, content)


def keyed_jagged(ids: dict[str, np.ndarray]) -> KeyedJaggedTensor:
    """One list of ids per feature, as a KeyedJaggedTensor of stride 1."""
    lengths = torch.tensor([len(values) for values in ids.values()], dtype=torch.int32)
    values = torch.from_numpy(np.concatenate(list(ids.values())).astype(np.int64, copy=False))
    return KeyedJaggedTensor(keys=list(ids), values=values, lengths=lengths, stride=1)


def collate(
    windows: Windows,
    catalog: ItemLookup,
    candidate_rows: np.ndarray,
    candidate_bias: np.ndarray,
    *,
    seen: Windows | None = None,
    target_actions: np.ndarray | None = None,
    dedup: bool = True,
) -> Batch:
    """Build a finished batch from windows and candidates.

    Args:
        windows: Events of the batch's rows.
        catalog: Items of the data set.
        candidate_rows: Item rows of the candidates of this rank, `[C]`.
        candidate_bias: Their `-log Q`, `[C]`.
        seen: The rows' whole streams, when the batch must know everything that was seen.
        target_actions: Codes of the actions that are targets; all when None.
        dedup: Look each distinct item up once; False looks every event up.

    Returns:
        The batch, on the CPU.
    """
    window_rows = catalog.rows_of(windows.columns["item"])
    everything = np.concatenate([window_rows, candidate_rows])
    if dedup:
        rows, place = distinct(everything, len(catalog))
    else:
        rows, place = everything, np.arange(len(everything))
    num_seen = len(window_rows)
    if dedup and catalog.keys_are_ids:
        rows, place, num_seen = seen_first(rows, place, num_seen)
    items = item_features(catalog, rows, num_seen)
    ids = items.ids
    layout = _layout(windows)
    for name in sorted(windows.columns.keys() - NOT_CATEGORICAL):
        ids[f"event.{name}"] = windows.columns[name][layout.history].astype(np.int64, copy=False)
    weight = layout.is_target.astype(np.float32)
    if target_actions is not None:
        weight[~np.isin(windows.columns["action"][layout.history + 1], target_actions)] = 0.0
    if "weight" in windows.columns:
        weight = weight * windows.columns["weight"][layout.history + 1].astype(np.float32)
    seen_rows, seen_offsets = _seen(catalog, seen, len(windows.lengths))
    return Batch(
        features=keyed_jagged(ids),
        item_row=torch.from_numpy(rows),
        event_item=torch.from_numpy(place[layout.history]),
        next_item=torch.from_numpy(place[layout.history + 1]),
        target_weight=torch.from_numpy(weight),
        offsets=torch.from_numpy(layout.offsets),
        start_position=torch.from_numpy(windows.start_position),
        candidate_item=torch.from_numpy(place[len(window_rows) :]),
        candidate_bias=torch.from_numpy(candidate_bias),
        user=torch.from_numpy(windows.user),
        target_row=torch.from_numpy(_last_rows(window_rows, windows.lengths, layout.last)),
        seen_row=torch.from_numpy(seen_rows),
        seen_offsets=torch.from_numpy(seen_offsets),
        timestamps_ms=_taken(windows, "timestamp", layout.history),
        actions=_taken(windows, "action", layout.history),
        present=items.present,
        content=items.content,
        category_lengths=items.counts,
        num_targets=int((weight > 0).sum()),
        num_asked=len(everything),
        num_rows=len(windows.lengths),
    )


@dataclass(frozen=True)
class _Layout:
    """Where the histories lie in the windows: every event of a window but its last."""

    history: np.ndarray
    last: np.ndarray
    offsets: np.ndarray
    is_target: np.ndarray


def _layout(windows: Windows) -> _Layout:
    lengths = np.maximum(windows.lengths - 1, 0)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    starts = np.cumsum(windows.lengths) - windows.lengths
    step = ragged_arange(lengths)
    history = np.repeat(starts, lengths) + step
    is_target = step + 1 >= np.repeat(windows.target_from, lengths)
    return _Layout(history, starts + windows.lengths - 1, offsets, is_target)


def _last_rows(window_rows: np.ndarray, lengths: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Item row of each window's last event, -1 for an empty window."""
    if not len(window_rows):
        return np.full(len(lengths), -1, dtype=np.int64)
    return np.where(lengths > 0, window_rows[np.maximum(last, 0)], -1)


def _taken(windows: Windows, column: str, index: np.ndarray) -> torch.Tensor | None:
    values = windows.columns.get(column)
    return None if values is None else torch.from_numpy(values[index].astype(np.int64, copy=False))


def _seen(catalog: ItemLookup, seen: Windows | None, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Item rows of all events before each row's target, and their offsets."""
    if seen is None:
        return np.zeros(0, np.int64), np.zeros(num_rows + 1, np.int64)
    layout = _layout(seen)
    return catalog.rows_of(seen.columns["item"][layout.history]), layout.offsets
