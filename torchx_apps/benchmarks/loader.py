"""The loader: events per second and core into finished KeyedJaggedTensors, beside a bare read of the same columns.

The data set is generated here: a million events (6,000 users, 4,000 items, genres, one modality), popularity by Zipf's
law. One thread reads, decodes, cuts windows, draws negatives and finishes batches; the bare read decodes the
same Parquet columns row group by row group and throws them away.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mufasa_rec.config import RunConfig
from mufasa_rec.data.loader import DataConfig, Loader
from mufasa_rec.data.negatives import NegativesConfig
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.distributed.env import DistributedEnv
from torchx_apps import assembly
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured

_READ = "bare read of the same columns"


def run(settings: Settings) -> list[Measured]:
    """Measure full and sampled softmax batches beside the bare read."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-benchmark-") as folder:
        dataset = _make_dataset(Path(folder), num_users=150 if settings.small else 6000)
        loaders = {f"finished batches, {softmax} softmax": _loader(dataset, softmax) for softmax in ("full", "sampled")}
        for loader in loaders.values():
            check(loader, dataset)
        events = {name: _read_epoch(loader) for name, loader in loaders.items()}
        competitors = {name: partial(_read_epoch, loader) for name, loader in loaders.items()}
        seconds = in_turn({**competitors, _READ: partial(_bare_read, dataset)}, settings.rounds)
        events[_READ] = _bare_read(dataset)
        shape = {"events": events[_READ], "batch rows": 128, "history": 200, "row groups": len(loader.groups)}
    rows = [
        measured(name, "million events/s", [events[name] / s / 1e6 for s in times], shape)
        for name, times in seconds.items()
    ]
    share = [read / made for read, made in zip(seconds[_READ], next(iter(seconds.values())), strict=True)]
    return [*rows, measured("finished batches, full softmax, of the bare read's rate", "", share)]


def _make_dataset(folder: Path, num_users: int) -> str:
    """Write and prepare a source with about 165 events a user."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.7, 0.8, num_users), 20, 2000).astype(np.int64)
    user = np.repeat(np.arange(num_users), lengths)
    num_items = 4000
    share = 1.0 / np.arange(10, num_items + 10)
    item = rng.choice(rng.permutation(num_items), len(user), p=share / share.sum())
    source = folder / "source"
    source.mkdir()
    times = 1_600_000_000 + np.arange(len(user)) * 60
    pq.write_table(pa.table({"user": user, "item": item, "timestamp": times}), source / "interactions.parquet")
    genres = [[f"genre {g}" for g in rng.choice(18, rng.integers(1, 4), replace=False)] for _ in range(num_items)]
    pq.write_table(pa.table({"item": np.arange(num_items), "genres": genres}), source / "items.parquet")
    vectors = rng.normal(size=(num_items, 32)).astype(np.float32)
    np.savez(source / "title.npz", item_id=np.arange(num_items), vector=vectors)
    output = str(folder / "dataset")
    prepare(PrepareConfig(input=str(source), output=output))
    return output


def _loader(dataset: str, softmax: str) -> Loader:
    data = DataConfig(dataset=dataset, prefetch=0)
    config = RunConfig(data=replace(data, negatives=NegativesConfig(softmax=softmax)))  # type: ignore[arg-type]
    env = DistributedEnv(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    return assembly.make_loader(config, assembly.open_dataset(config), "train", env)


def _read_epoch(loader: Loader) -> int:
    """Make all batches of an epoch; returns their events."""
    order = loader.order(0)
    loader._open.clear()  # every round reads all row groups
    return sum(loader.make(order, step).num_events for step in range(order.num_steps))


def _files(dataset: str) -> tuple[Path, Path]:
    name = "base/bucket-00000.parquet"
    return Path(dataset, "events", name), Path(dataset, "splits/leave_one_out/train", name)


def _bare_read(dataset: str) -> int:
    """Decode the columns that the loader reads, row group by row group; returns the events."""
    events, rows = (pq.ParquetFile(file) for file in _files(dataset))
    count = 0
    for group in range(events.num_row_groups):
        table = events.read_row_group(group, columns=["user", "item", "timestamp"], use_threads=False)
        rows.read_row_group(group, use_threads=False)
        count += len(table.column("item").combine_chunks().values)
    return count


def check(loader: Loader, dataset: str) -> None:
    """Compare an epoch's batches with a reading of the files row by row.

    Raises:
        AssertionError: When a batch says something else.
    """
    events, rows = (pq.read_table(file).to_pydict() for file in _files(dataset))
    items = dict(zip(events["user"], events["item"], strict=True))
    ends = dict.fromkeys(zip(rows["user"], rows["history_end"], strict=True), 0)
    ids = np.asarray(loader.catalog.items.ids)
    keys = loader.catalog.keys
    for batch in loader.batches(0):
        assert torch.equal(batch.features["item"].values(), torch.from_numpy(keys[batch.item_row.numpy()]))
        raw = ids[batch.item_row.numpy()]
        history, following = raw[batch.event_item.numpy()], raw[batch.next_item.numpy()]
        for row, user in enumerate(batch.user.tolist()):
            a, b = batch.offsets[row : row + 2].tolist()
            start = int(batch.start_position[row])
            end = start + b - a + 1
            ends[user, end] += 1
            assert history[a:b].tolist() == items[user][start : end - 1]
            assert following[a:b].tolist() == items[user][start + 1 : end]
            assert b - a == min(end - 1, loader.config.max_history)
    assert set(ends.values()) == {1}
