"""The endless, resumable stream under every loader: which rows come when, whatever the number of ranks and workers."""

from __future__ import annotations

import abc
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mufasa_rec.data.batch import Moving
from mufasa_rec.data.order import EpochOrder, plan_epoch, readers_of
from mufasa_rec.data.parquet import RowGroup, RowGroupReader, RowGroupRef, ShownGroup
from mufasa_rec.data.randomness import generator

_PERMUTATION_STREAM = 4
T = TypeVar("T", bound=Moving)


class StreamConfig(Protocol):
    """What the stream reads of a configuration."""

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        ...

    @property
    def num_readers(self) -> int:
        """Virtual readers."""
        ...

    @property
    def prefetch(self) -> int:
        """Batches made ahead."""
        ...


@dataclass(frozen=True)
class LoaderState:
    """Where the data stands after a trained batch: enough to continue with the next row, on any number of ranks.

    Attributes:
        epoch: Epoch of the batch.
        step: Steps trained in that epoch.
        readers: Per virtual reader the row group being read and the offset of the next row in it; (-1, 0) at its end.
    """

    epoch: int
    step: int
    readers: list[tuple[int, int]]


class RowLoader(abc.ABC, Generic[T]):
    """Batches of one part of a split for one rank; what a batch is made of is said by `make`.

    Args:
        groups: Row groups of the part.
        config: Batch size, virtual readers, batches made ahead.
        files: Reads row groups.
        shuffle: Whether the order is drawn anew in each epoch; evaluation keeps that of the files.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the run.

    Attributes:
        pin_memory: Whether batches are made in page-locked memory, from which copies to a GPU run beside computation.
    """

    pin_memory = False

    def __init__(
        self,
        groups: list[RowGroupRef],
        config: StreamConfig,
        files: RowGroupReader,
        *,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.groups, self._stream, self._files, self.shuffle = groups, config, files, shuffle
        self.columns = files.columns
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.readers = readers_of(rank, world_size, config.num_readers)
        self._open: dict[int, tuple[tuple[int, int], RowGroup, np.ndarray]] = {}

    @abc.abstractmethod
    def make(self, order: EpochOrder, step: int) -> T:
        """Make this rank's share of one step."""

    def order(self, epoch: int) -> EpochOrder:
        """The plan of an epoch: the same on every rank."""
        return plan_epoch(
            [group.num_rows for group in self.groups],
            num_readers=self._stream.num_readers,
            rows_per_step=self._stream.batch_size // self._stream.num_readers,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
        )

    def state(self, epoch: int, step: int) -> LoaderState:
        """The state after `step` batches of `epoch` were trained."""
        order = self.order(epoch)
        following = [order.pieces(reader, step) for reader in range(self._stream.num_readers)]
        return LoaderState(epoch, step, [(p[0].group, p[0].start) if p else (-1, 0) for p in following])

    def batches(self, epoch: int, first_step: int = 0, num_steps: int | None = None) -> Iterator[T]:
        """Yield the batches of an epoch from `first_step` on, at most `num_steps` of them, made ahead by a thread."""
        order = self.order(epoch)
        last = order.num_steps if num_steps is None else min(order.num_steps, first_step + num_steps)
        steps = range(first_step, last)
        if not self._stream.prefetch:
            yield from (self._finished(order, step) for step in steps)
            return
        yield from _ahead((lambda step=step: self._finished(order, step) for step in steps), self._stream.prefetch)

    def _finished(self, order: EpochOrder, step: int) -> T:
        batch = self.make(order, step)
        return batch.pin_memory() if self.pin_memory else batch

    def _pieces(self, order: EpochOrder, step: int) -> tuple[list[tuple[RowGroup, np.ndarray]], bool]:
        """Row groups and rows of this rank's share of a step, and whether it has any.

        A rank that has run out of rows gets one row without events, which keeps it in the collectives.
        """
        pieces = []
        for reader in self.readers:
            for piece in order.pieces(reader, step):
                group, permutation = self._group(reader, order.epoch, piece.group)
                pieces.append((group, permutation[piece.start : piece.stop]))
        if pieces:
            return pieces, True
        group, _ = self._group(self.readers[0], order.epoch, 0)
        return [(_without_rows(group), np.zeros(1, np.int64))], False

    def _group(self, reader: int, epoch: int, index: int) -> tuple[RowGroup, np.ndarray]:
        """The row group that a reader is in, and the order of its rows in this epoch; readers in one group share it."""
        held = self._open.get(reader)
        if held is None or held[0] != (epoch, index):
            held = next((other for other in self._open.values() if other[0] == (epoch, index)), None)
            if held is None:
                group = self._files.read(self.groups[index])
                permutation = np.arange(self.groups[index].num_rows)
                if self.shuffle:
                    permutation = generator(self.seed, epoch, index, _PERMUTATION_STREAM).permutation(len(permutation))
                held = ((epoch, index), group, permutation)
            self._open[reader] = held
        return held[1], held[2]


def _without_rows(group: RowGroup) -> RowGroup:
    """A row group of one row with no events, of the columns of `group`."""
    zero = np.zeros(1, dtype=np.int64)
    columns = {name: values[:1].repeat(0) for name, values in group.columns.items()}
    shown = None
    if group.shown is not None:
        nothing = {name: values[:0] for name, values in group.shown.columns.items()}
        shown = ShownGroup(zero, zero, zero, zero, nothing)
    return RowGroup(zero, zero, zero, zero, zero, zero, columns, shown)


def _ahead(makers: Iterator, depth: int) -> Iterator[Any]:
    """Run the makers in a thread, `depth` batches ahead; its errors are raised here, and closing here ends it."""
    results: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for make in makers:
                if not put(make()):
                    return
            put(None)
        except BaseException as error:  # handed over whole: the consumer raises it
            put(error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
