"""Scored impressions: rows on every rank, gathered while they fit a budget, spilled to files by user beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# One impression: its id and user, its logit, its label, and one bit for each slice that it belongs to.
ROW = np.dtype([("row", "<i8"), ("user", "<i8"), ("slices", "<u4"), ("logit", "<f4"), ("label", "u1")])
_PARTS = 64


class Gathering(Protocol):
    """What metrics need from the other ranks."""

    world_size: int

    def host(self) -> Gathering:
        """Return the same, for tensors in host memory."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank; `x` may be changed in place."""
        ...

    def counts(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's `values`."""
        ...

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return all ranks' rows end to end."""
        ...


class Alone:
    """A world of one rank."""

    world_size = 1

    def host(self) -> Alone:
        """Return itself."""
        return self

    def sum(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def counts(self, values: Sequence[int]) -> list[list[int]]:
        """Return `values` as the one rank's."""
        return [list(values)]

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return `x`."""
        return x


@dataclass(frozen=True)
class Scored:
    """Impressions with their scores, ordered by `row`, so that those of two models are compared one by one.

    Attributes:
        row: Id of the impression, `[n]` int64, ascending.
        user: `[n]` int64.
        logit: `[n]` float32.
        label: 0 or 1, `[n]` uint8.
    """

    row: np.ndarray
    user: np.ndarray
    logit: np.ndarray
    label: np.ndarray

    def taken(self, mask: np.ndarray) -> Scored:
        """Those of the impressions where `mask [n]` holds."""
        return Scored(self.row[mask], self.user[mask], self.logit[mask], self.label[mask])


class RowStore:
    """Rows of this rank, in memory up to a budget and then in files by user.

    Args:
        budget_rows: Rows that this rank may hold in memory.
        folder: Where the files are made when they are needed; the system's folder for temporary files when None.
    """

    def __init__(self, budget_rows: int, folder: str | None = None) -> None:
        self.budget_rows, self._folder = budget_rows, folder
        self.num_rows = 0
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._spilled: tempfile.TemporaryDirectory[str] | None = None

    def add(self, rows: np.ndarray) -> None:
        """Take rows, `[n]` of `ROW`."""
        self._held.append(rows)
        self._num_held += len(rows)
        self.num_rows += len(rows)
        if self._num_held > self.budget_rows:
            self._spill()

    def all(self) -> np.ndarray:
        """Every row; only for a store that has not spilled."""
        assert self._spilled is None
        return np.concatenate([np.zeros(0, ROW), *self._held])

    def parts(self) -> Iterator[np.ndarray]:
        """The rows in a fixed number of parts, a user's rows all in the same part whatever the rank."""
        if self._num_held:
            self._spill()
        for part in range(_PARTS):
            path = self._path(part)
            yield np.fromfile(path, ROW) if path is not None and path.exists() else np.zeros(0, ROW)

    def _spill(self) -> None:
        rows = np.concatenate(self._held)
        if self._spilled is None:
            self._spilled = tempfile.TemporaryDirectory(prefix="mufasa-rec-metrics-", dir=self._folder)
        part = (rows["user"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(58)
        order = np.argsort(part, kind="stable")
        borders = np.searchsorted(part[order], np.arange(_PARTS + 1))
        for index in range(_PARTS):
            path = self._path(index)
            assert path is not None
            with path.open("ab") as file:
                rows[order[borders[index] : borders[index + 1]]].tofile(file)
        self._held, self._num_held = [], 0

    def _path(self, part: int) -> Path | None:
        return None if self._spilled is None else Path(self._spilled.name) / f"{part:02d}.rows"


def gathered(rows: np.ndarray, exchange: Gathering) -> np.ndarray:
    """Rows of all ranks, on every rank; collective."""
    if exchange.world_size == 1:
        return rows
    sizes = [size for (size,) in exchange.counts([len(rows)])]
    mine = torch.from_numpy(rows.view(np.uint8).reshape(len(rows), ROW.itemsize).copy())
    return exchange.gather(mine, sizes).cpu().numpy().reshape(-1).view(ROW)
