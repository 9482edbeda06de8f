"""Requests to a finished batch for ranking. No loop is over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mufasa_rec.data import raw
from mufasa_rec.data.collate import (
    NOT_CATEGORICAL,
    Windows,
    cut_windows,
    distinct,
    id_features,
    item_features,
    keyed_jagged,
    ragged_arange,
)
from mufasa_rec.data.id_keys import HashedKeys, RawKeys
from mufasa_rec.data.item_lookup import ItemLookup, ItemVocabulary
from mufasa_rec.data.parquet import RowGroup
from mufasa_rec.data.ranking_batch import USER, RankingBatch
from mufasa_rec.data.requests import CANDIDATE, IMPRESSION, WEIGHT
from mufasa_rec.data.schema import ImpressionsInfo

Pieces = Sequence[tuple[RowGroup, np.ndarray]]


@dataclass(frozen=True)
class ShownFeatures:
    """What the candidates of a data set come with.

    Attributes:
        info: What `dataset.json` says of impressions.
        users: Embedding keys of users.
    """

    info: ImpressionsInfo
    users: ItemVocabulary | HashedKeys | RawKeys

    @property
    def columns(self) -> tuple[str, ...]:
        """Candidates' columns to read."""
        return (
            CANDIDATE,
            IMPRESSION,
            *(raw.LABEL_PREFIX + task for task in self.info.tasks),
            *(raw.CONTEXT_PREFIX + name for name in self.info.context),
            *(raw.DENSE_PREFIX + name for name in self.info.dense),
            *([WEIGHT] if self.info.weighted else []),
        )


@dataclass(frozen=True)
class Shown:
    """Candidates of some requests, end to end.

    Attributes:
        columns: Their columns, each `[C]`.
        lengths: Candidates of each request, `[R]`.
        time: Time of each request, `[R]`.
        request: Number of each request, `[R]`.
        history_length: Events before each request, `[R]`.
    """

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    time: np.ndarray
    request: np.ndarray
    history_length: np.ndarray


def take_shown(pieces: Pieces) -> Shown:
    """Candidates of the requests of `pieces`, in their order."""
    parts: dict[str, list[np.ndarray]] = {}
    lengths, time, request, end = [], [], [], []
    for group, rows in pieces:
        shown = group.shown
        assert shown is not None
        size = shown.length[rows]
        place = np.repeat(shown.start[rows], size) + ragged_arange(size)
        for name, values in shown.columns.items():
            parts.setdefault(name, []).append(values[place])
        lengths.append(size)
        time.append(shown.time[rows])
        request.append(shown.request[rows])
        end.append(group.history_end[rows])
    joined = [np.concatenate(part) for part in (lengths, time, request, end)]
    return Shown({name: np.concatenate(values) for name, values in parts.items()}, *joined)


def keep_shown(shown: Shown, keep: np.ndarray) -> Shown:
    """Only the candidates of `keep [C]`; requests stay, some without candidates."""
    owner = np.repeat(np.arange(len(shown.lengths)), shown.lengths)
    lengths = np.bincount(owner[keep], minlength=len(shown.lengths))
    columns = {name: values[keep] for name, values in shown.columns.items()}
    return Shown(columns, lengths, shown.time, shown.request, shown.history_length)


def one_by_one(pieces: Pieces, shown: Shown) -> tuple[Pieces, Shown]:
    """The same candidates, each as a request of its own; requests without candidates vanish."""
    repeats = np.split(shown.lengths, np.cumsum([len(rows) for _, rows in pieces])[:-1])
    again = [(group, np.repeat(rows, times)) for (group, rows), times in zip(pieces, repeats, strict=True)]
    spread = (np.repeat(values, shown.lengths) for values in (shown.time, shown.request, shown.history_length))
    return again, Shown(shown.columns, np.ones(int(shown.lengths.sum()), np.int64), *spread)


def labels_of(shown: Shown, tasks: Sequence[str]) -> np.ndarray:
    """Labels `[C, T]` float32."""
    return np.stack([shown.columns[raw.LABEL_PREFIX + task] for task in tasks], axis=1).astype(np.float32)


def collate_requests(
    pieces: Pieces,
    shown: Shown,
    catalog: ItemLookup,
    features: ShownFeatures,
    *,
    max_history: int,
    align: int = 1,
    dedup: bool = True,
) -> RankingBatch:
    """Build a finished batch.

    Args:
        pieces: Row groups, and the requests wanted of each.
        shown: Their candidates.
        catalog: Items of the data set.
        features: What candidates come with.
        max_history: Events of history that a row keeps.
        align: Histories begin at a multiple of it in their stream.
        dedup: Look each distinct item up once.

    Returns:
        The batch, on the CPU; weights are the data's, logit offsets 0.
    """
    info = features.info
    windows = cut_windows(pieces, max_history - 1, align=align)  # which counts one more event: a target
    event_rows = catalog.rows_of(windows.columns["item"])
    candidate_rows = catalog.rows_of(shown.columns[CANDIDATE])
    everything = np.concatenate([event_rows, candidate_rows])
    if dedup:
        rows, place = distinct(everything, len(catalog))
    else:
        rows, place = everything, np.arange(len(everything))
    items = item_features(catalog, rows)
    ids = items.ids
    for name in sorted(windows.columns.keys() - NOT_CATEGORICAL):
        ids[f"event.{name}"] = windows.columns[name].astype(np.int64, copy=False)
    ids |= id_features(USER, features.users.keys_of(windows.user))
    for name in info.context:
        ids[raw.CONTEXT_PREFIX + name] = shown.columns[raw.CONTEXT_PREFIX + name]
    number = len(candidate_rows)
    weight = shown.columns.get(WEIGHT, np.ones(number, np.float32))
    return RankingBatch(
        features=keyed_jagged(ids),
        item_row=torch.from_numpy(rows),
        event_item=torch.from_numpy(place[: len(event_rows)]),
        offsets=_offsets(windows.lengths),
        start_position=torch.from_numpy(windows.start_position),
        candidate_item=torch.from_numpy(place[len(event_rows) :]),
        candidate_offsets=_offsets(shown.lengths),
        dense=torch.from_numpy(_dense(shown, info)),
        labels=torch.from_numpy(labels_of(shown, info.tasks)),
        weight=torch.from_numpy(weight.astype(np.float32)),
        logit_offset=torch.zeros(number),
        user=torch.from_numpy(windows.user),
        request=torch.from_numpy(shown.request),
        impression=torch.from_numpy(shown.columns[IMPRESSION]),
        item_count=torch.from_numpy(catalog.counts[candidate_rows].astype(np.int64)),
        history_length=torch.from_numpy(shown.history_length),
        request_time_ms=torch.from_numpy(np.repeat(shown.time, shown.lengths)),
        timestamps_ms=_column(windows, raw.TIMESTAMP),
        actions=_column(windows, raw.ACTION),
        present=items.present,
        content=items.content,
        category_lengths=items.counts,
        num_targets=number,
        num_asked=len(everything),
        num_rows=len(windows.lengths),
    )


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.r_[0, np.cumsum(lengths)].astype(np.int64))


def _column(windows: Windows, name: str) -> torch.Tensor | None:
    values = windows.columns.get(name)
    return None if values is None else torch.from_numpy(values.astype(np.int64, copy=False))


def _dense(shown: Shown, info: ImpressionsInfo) -> np.ndarray:
    """Standardised numbers `[C, F]` float32; a missing one is at the mean."""
    result = np.zeros((int(shown.lengths.sum()), len(info.dense)), np.float32)
    for column, (name, about) in enumerate(info.dense.items()):
        values = (shown.columns[raw.DENSE_PREFIX + name].astype(np.float64) - about.mean) / about.std
        result[:, column] = np.where(np.isfinite(values), values, 0.0)
    return result
