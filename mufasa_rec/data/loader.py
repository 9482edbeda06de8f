"""The loader: an endless, resumable stream of finished batches whose content does not depend on the number of ranks."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mufasa_rec.data.batch import Batch
from mufasa_rec.data.collate import Windows, collate, cut_windows, ragged_arange
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.negatives import NegativeSampler, NegativesConfig
from mufasa_rec.data.order import EpochOrder, plan_epoch, readers_of
from mufasa_rec.data.parquet import RowGroup, RowGroupReader, RowGroupRef
from mufasa_rec.data.randomness import generator

logger = logging.getLogger(__name__)
_PERMUTATION_STREAM = 4


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which batches.

    Attributes:
        dataset: Folder or URL of a prepared data set.
        split: Split to train and evaluate on.
        modalities: Content modalities to use; all when None.
        batch_size: Rows of a global batch, over all ranks.
        num_readers: Virtual readers that a global batch takes equal numbers of rows from; part of the data's order.
        max_history: Events of history that a row keeps; with sparse attention, and the rest of the block that the
            oldest of them lies in.
        target_actions: Actions that are targets, by name; all when None.
        min_count: Training events that an item needs for an embedding of its own; rarer items share one.
        negatives: How targets are contrasted.
        prefetch: Batches made ahead of the step, by one thread; 0 makes them when they are asked for.
        dedup: Look each distinct item of a batch up once.
    """

    dataset: str = ""
    split: str = "leave_one_out"
    modalities: tuple[str, ...] | None = None
    batch_size: int = 128
    num_readers: int = 64
    max_history: int = 200
    target_actions: tuple[str, ...] | None = None
    min_count: int = 5
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    prefetch: int = 2
    dedup: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_readers", "max_history", "min_count", "prefetch"):
            least = 0 if name == "prefetch" else 1
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: choose {least} or more.")
        if self.batch_size % self.num_readers:
            raise ValueError(
                f"data.batch_size={self.batch_size}: must be a multiple of data.num_readers={self.num_readers}, "
                "because a global batch takes the same number of rows from each virtual reader."
            )


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


class Loader:
    """Batches of one part of a split for one rank.

    Args:
        groups: Row groups of the part.
        catalog: Items of the data set.
        config: What is read.
        columns: List columns to read beside `item`.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the run.
        sampler: Draws candidates in training; None for evaluation, which has none.
        target_actions: Codes of the actions that are targets in training; all when None.
        align: Histories begin at a multiple of this many events of their stream.
    """

    def __init__(  # noqa: PLR0913  what it reads, from where it stands, and how it draws
        self,
        groups: list[RowGroupRef],
        catalog: ItemLookup,
        config: DataConfig,
        *,
        columns: tuple[str, ...] = (),
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        sampler: NegativeSampler | None = None,
        target_actions: np.ndarray | None = None,
        align: int = 1,
    ) -> None:
        self.target_actions, self.align = target_actions, align
        self.groups, self.catalog, self.config, self.sampler = groups, catalog, config, sampler
        self.columns = ("item", *columns)
        self._files = RowGroupReader(self.columns)
        self._told = False
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.readers = readers_of(rank, world_size, config.num_readers)
        self._open: dict[int, tuple[tuple[int, int], RowGroup, np.ndarray]] = {}

    def order(self, epoch: int) -> EpochOrder:
        """The plan of an epoch: the same on every rank."""
        return plan_epoch(
            [group.num_rows for group in self.groups],
            num_readers=self.config.num_readers,
            rows_per_step=self.config.batch_size // self.config.num_readers,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.sampler is not None,
        )

    def state(self, epoch: int, step: int) -> LoaderState:
        """The state after `step` batches of `epoch` were trained."""
        order = self.order(epoch)
        following = [order.pieces(reader, step) for reader in range(self.config.num_readers)]
        return LoaderState(epoch, step, [(p[0].group, p[0].start) if p else (-1, 0) for p in following])

    def batches(self, epoch: int, first_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch from `first_step` on, at most `num_steps` of them, made ahead by a thread."""
        order = self.order(epoch)
        last = order.num_steps if num_steps is None else min(order.num_steps, first_step + num_steps)
        steps = range(first_step, last)
        if not self.config.prefetch:
            yield from (self.make(order, step) for step in steps)
            return
        yield from _ahead((lambda step=step: self.make(order, step) for step in steps), self.config.prefetch)

    def make(self, order: EpochOrder, step: int) -> Batch:
        """Make this rank's share of one step."""
        pieces = []
        for reader in self.readers:
            for piece in order.pieces(reader, step):
                group, permutation = self._group(reader, order.epoch, piece.group)
                pieces.append((group, permutation[piece.start : piece.stop]))
        real = bool(pieces)
        if not real:  # this rank has run out of rows: one row without events keeps it in the collectives
            group, _ = self._group(self.readers[0], order.epoch, 0)
            pieces = [(_without_rows(group), np.zeros(1, np.int64))]
        windows = cut_windows(pieces, self.config.max_history, align=self.align)
        if real and self.sampler is None and not windows.lengths.all():
            row = int(windows.row_id[np.flatnonzero(windows.lengths == 0)[0]])
            raise ValueError(f"rows: row {row} of an evaluation part has no event to rank; leave such rows out.")
        seen = cut_windows(pieces, None) if self.sampler is None else None
        self._tell_cut_targets(windows)
        rows, bias = self._candidates(windows, order, step)
        actions = None if self.sampler is None else self.target_actions
        batch = collate(windows, self.catalog, rows, bias, seen=seen, target_actions=actions, dedup=self.config.dedup)
        batch.epoch, batch.step = order.epoch, step
        batch.num_rows = batch.num_rows if real else 0
        return batch

    def _tell_cut_targets(self, windows: Windows) -> None:
        """Say once that rows have targets further back than the history that they keep."""
        if not windows.num_cut or self.sampler is None or self._told or self.rank:
            return
        self._told = True
        logger.warning(
            "data.max_history=%d: rows have targets further back than that (%d in this batch), never trained on; "
            "raise data.max_history, or prepare the data with no more targets per row (split.targets_per_row)",
            self.config.max_history,
            windows.num_cut,
        )

    def _candidates(self, windows: Windows, order: EpochOrder, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Item rows and `-log Q` of the candidates that this rank brings to the step."""
        if self.sampler is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        rows = self.sampler.shared(order.epoch, step, self.rank, self.world_size)
        num_rows = order.num_rows(step)
        position = ragged_arange(windows.lengths)
        is_target = position >= np.repeat(np.maximum(windows.target_from, 1), windows.lengths)
        if self.sampler.full:
            self.sampler.check_targets(self.catalog.rows_of(windows.columns["item"][is_target]))
        else:
            row_id = np.repeat(windows.row_id, windows.lengths)
            stream = position + np.repeat(windows.start_position, windows.lengths)
            taken = is_target & self.sampler.in_batch(order.epoch, row_id, stream, num_rows)
            rows = np.concatenate([rows, self.catalog.rows_of(windows.columns["item"][taken])])
        return rows, self.sampler.bias(rows, num_rows)

    def _group(self, reader: int, epoch: int, index: int) -> tuple[RowGroup, np.ndarray]:
        """The row group that a reader is in, and the order of its rows in this epoch; readers in one group share it."""
        held = self._open.get(reader)
        if held is None or held[0] != (epoch, index):
            held = next((other for other in self._open.values() if other[0] == (epoch, index)), None)
            if held is None:
                group = self._files.read(self.groups[index])
                permutation = np.arange(self.groups[index].num_rows)
                if self.sampler is not None:
                    permutation = generator(self.seed, epoch, index, _PERMUTATION_STREAM).permutation(len(permutation))
                held = ((epoch, index), group, permutation)
            self._open[reader] = held
        return held[1], held[2]


def _without_rows(group: RowGroup) -> RowGroup:
    """A row group of one row with no events, of the columns of `group`."""
    zero = np.zeros(1, dtype=np.int64)
    columns = {name: values[:1].repeat(0) for name, values in group.columns.items()}
    return RowGroup(zero, zero, zero, zero, zero, zero, columns)


def _ahead(makers: Iterator, depth: int) -> Iterator[Batch]:
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
