"""A stream of very many distinct ids into a bounded table with managed rows: speed, memory, hits, and a kill.

    python -m torchx_apps.benchmark ids [--distinct 1e9] [--rows 20e6] [--dim 16] [--batch 65536] [--interval 256]
        [--eviction distance_lfu] [--min-count 1] [--lifetime 16000] [--processes 1] [--kill-at STEP] [--folder FOLDER]
        [--json FILE] [--small]

Ids are Zipf-distributed and drift. Each step looks a batch up, and updates it by a small loss with fused row-wise
Adagrad, through the tables that a run has. With `--kill-at` the processes save at that step, go on for two intervals,
are killed, and start again from what was saved: after the same two intervals the table must be the same, bit for bit.
`all` leaves this one out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mufasa_rec.data import paths
from mufasa_rec.distributed import id_keys, sharding
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import hide_library_noise
from mufasa_rec.distributed.host_memory import keep_freed_memory
from mufasa_rec.distributed.id_policy import ManagedIdsConfig
from mufasa_rec.distributed.managed_collision import managed_ids, start_rows_like
from mufasa_rec.distributed.managed_history import history, restore_history
from mufasa_rec.distributed.managed_ids import COUNTERS, ManagedIds
from mufasa_rec.distributed.table_config import TableOptimizerConfig
from mufasa_rec.modules.sparse_arch import SparseArch, TableConfig
from mufasa_rec.training.checkpoint import load_tensors, model_state
from mufasa_rec.training.checkpoint_manifest import Manifest, read_manifest
from mufasa_rec.training.checkpoint_writer import write_checkpoint
from torchx_apps.benchmarks._measure import Measured, as_json, measured, resident_bytes, surroundings
from torchx_apps.benchmarks._stream import Stream
from torchx_apps.benchmarks._table import FEATURE, Lookup, features_of

_FREQUENT, _WARM_UP = 10.0, 2  # expected count of a frequent id in the last interval; intervals before memory counts
_TABLE = f"t_{FEATURE}"


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    folder: str
    distinct: float
    rows: int
    dim: int
    batch: int
    interval: int
    eviction: Any
    min_count: int
    lifetime: int
    processes: int
    kill_at: int | None

    @property
    def stream(self) -> Stream:
        """The ids."""
        return Stream(batch=self.batch, lifetime=self.lifetime)

    @property
    def compared_at(self) -> int | None:
        """Step after which the table of before the kill is compared with that of after it."""
        return None if self.kill_at is None else self.kill_at + 2 * self.interval


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run, print a table."""
    task, file = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-ids-", dir=task.folder or None) as folder:
        rows = run(Task(**{**asdict(task), "folder": folder}))
    where = surroundings()
    print(f"{where['device']} · {task.processes} process(es) of 1 thread · commit {where['commit'] or 'unknown'}")
    for row in rows:
        print(f"{row.case:<66} {row.median:>12,.6g} {row.p10:>12,.6g} {row.p90:>12,.6g}  {row.unit}")
    if file:
        with paths.atomic_write(file) as path:
            path.write_text(json.dumps(as_json("ids", rows), indent=2) + "\n")


def _parse(argv: Sequence[str] | None) -> tuple[Task, str | None]:
    parser = argparse.ArgumentParser(
        prog="benchmark ids", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {
        "distinct": 1e9, "rows": 20e6, "dim": 16, "batch": 65_536, "interval": 256, "min-count": 1, "lifetime": 16_000,
        "processes": 1,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"({default:,.0f})")
    parser.add_argument("--eviction", choices=("lfu", "lru", "distance_lfu"), default="distance_lfu")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="save here, be killed, and go on")
    parser.add_argument("--folder", default="", help="where the checkpoint may lie; the system's temporary folder")
    parser.add_argument("--json", metavar="FILE", help="where the rows are written")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    options = parser.parse_args(argv)
    if options.small:
        sizes = {"distinct": 6e4, "rows": 8_192, "dim": 8, "batch": 2_048, "interval": 8, "lifetime": 60}
        vars(options).update(sizes, kill_at=12 if options.kill_at is None else options.kill_at)
    for name in numbers:
        if getattr(options, name.replace("-", "_")) < 1:
            raise SystemExit(f"benchmark: --{name} {getattr(options, name.replace('-', '_'))}: choose 1 or more.")
    whole = {
        name: int(getattr(options, name))
        for name in ("rows", "dim", "batch", "interval", "min_count", "lifetime", "processes")
    }
    if whole["batch"] % whole["processes"]:
        raise SystemExit(
            f"benchmark: --batch {whole['batch']}: choose a multiple of the {whole['processes']} processes."
        )
    told: dict[str, Any] = {name.name: getattr(options, name.name) for name in fields(Task)} | whole
    return Task(**told), options.json


def run(task: Task) -> list[Measured]:
    """Run the stream to its end, with a kill on the way where one is wanted."""
    before = None
    if task.kill_at is not None:
        before = _killed(task)
    found = [_told(json.loads(line)) for line in _launched(task, resume=before is not None)]
    lines, end = [one for one in found if "events_per_s" in one], found[-1]
    shape = {name: getattr(task, name) for name in ("rows", "dim", "batch", "interval", "processes", "min_count")}
    shape |= {"steps": end["step"], "events": end["step"] * task.batch}
    warm = lines[_WARM_UP:] or lines
    last = warm[-1]
    memory = [line["resident"] / 2**20 for line in warm]
    details = {"eviction": task.eviction, "lifetime": task.lifetime}

    def row(case: str, unit: str, values: list[float]) -> Measured:
        return measured(case, unit, values, shape, details)

    rows = [
        row("distinct ids so far, expected", "ids", [task.stream.expected_distinct(end["step"])]),
        row("events of all processes", "events/s", [line["events_per_s"] for line in warm]),
        row("events of a process by second of its processor", "events/s", [line["events_per_cpu_s"] for line in warm]),
        row("share of the time: rounds of admission and eviction", "share", [line["round_share"] for line in warm]),
        row("share of the time: ids to rows", "share", [line["remap_share"] for line in warm]),
        row("share of the time: drawing the stream", "share", [line["stream_share"] for line in warm]),
        row("resident memory of a process after warm-up, largest", "MiB", memory),
        row("largest departure from the first of them", "share", [max(abs(m / memory[0] - 1.0) for m in memory)]),
        row("hits among all events", "share", [line["hits"] / line["counted"] for line in warm]),
        row("hits among frequent ids (expected 10 or more in the interval)", "share", [
            line["frequent_hits"] / line["frequent"] for line in warm if line["frequent"]
        ]),
        row("admitted per event", "share", [line["admitted"] / line["counted"] for line in warm]),
        row("evicted per event", "share", [line["evicted"] / line["counted"] for line in warm]),
        row("rows that are taken at the end", "share", [last["taken"] / task.rows]),
    ]  # fmt: skip
    if before is not None:
        after = next(one["digest"] for one in found if "digest" in one)
        if after != before:
            raise SystemExit(f"benchmark: the table after the kill is another one: {after}, was {before}.")
        rows.append(row("table after kill and resume equal to that before", "1 = yes", [1.0]))
    return rows


def _told(line: dict[str, Any]) -> dict[str, Any]:
    """Show how far a long run has come."""
    if "events_per_s" in line:
        print(
            f"step {line['step']:,}: {line['events_per_s']:,.0f} events/s, {line['resident'] / 2**20:,.0f} MiB, "
            f"{line['hits'] / line['counted']:.1%} hits, {line['taken']:,.0f} rows taken",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return line


def _killed(task: Task) -> list[int]:
    """Run until the table to compare with is known, then kill; returns its digest."""
    lines = _launched(task, resume=False)
    for line in lines:
        found = _told(json.loads(line))
        if "digest" in found:
            lines.close()  # kills the processes
            return found["digest"]
    raise SystemExit(f"benchmark: --kill-at {task.kill_at}: the stream ends before; choose a smaller step.")


def _launched(task: Task, *, resume: bool) -> Any:
    """Lines of rank 0; the processes end with the generator, wherever they are."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receive, send = context.Pipe(duplex=False)
    store = str(Path(task.folder) / f"store-{int(resume)}")
    processes = [
        context.Process(target=_work, args=(task, rank, store, resume, send if rank == 0 else None), daemon=True)
        for rank in range(task.processes)
    ]
    for process in processes:
        process.start()
    send.close()
    try:
        while True:
            try:
                yield receive.recv()
            except EOFError:
                break
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"benchmark: a process ended with {process.exitcode}; see above.")
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(task: Task, rank: int, store: str, resume: bool, send: Any) -> None:
    """One rank, from the first step or from what was saved."""
    torch.set_num_threads(1)
    hide_library_noise()
    keep_freed_memory()
    os.environ["LOCAL_WORLD_SIZE"] = str(task.processes)
    dist.init_process_group("gloo", store=dist.FileStore(store, task.processes), rank=rank, world_size=task.processes)
    job = _Job(task)
    for line in job.lines(job.load() if resume else 0, task.stream.steps_for(task.distinct)):
        if send is not None:
            send.send(json.dumps(line))
    dist.destroy_process_group()


class _Job:
    """The table of one rank, and what is done with it."""

    def __init__(self, task: Task) -> None:
        self.task, self.exchange, self.model = task, RankExchange(), _model(task)
        ids = managed_ids(self.model)[FEATURE]
        assert isinstance(ids, ManagedIds)
        self.ids = ids
        self.seconds = {"round": 0.0, "remap": 0.0, "stream": 0.0}
        for name, method in (("round", "_round"), ("remap", "remap"), ("remap", "preprocess")):
            setattr(self.ids, method, self._timed(name, getattr(self.ids, method)))

    def lines(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Run steps; gives a line for each interval, and one when the table is to be compared."""
        task, stream = self.task, self.task.stream
        made = self._timed("stream", stream.step)
        begin, used, sums = time.perf_counter(), time.process_time(), [0.0, 0.0]
        for step in range(first, end):
            ids = made(step)[1].chunk(task.processes)[self.exchange.rank]
            self.model(features_of(ids)).square().mean().backward()
            if step % task.interval == task.interval // 2:
                sums = self._frequent(step)
            if (step + 1) % task.interval == 0:
                yield self._line(step + 1, time.perf_counter() - begin, time.process_time() - used, sums)
                begin, used = time.perf_counter(), time.process_time()
            if step + 1 == task.kill_at and not first:
                self.save()
            if step + 1 == task.compared_at:
                yield {"digest": self.exchange.objects(self.digest())}
                begin, used = time.perf_counter(), time.process_time()
        yield {"step": end}

    def _line(self, step: int, seconds: float, used: float, frequent: list[float]) -> dict[str, Any]:
        """What happened in an interval, on all ranks together."""
        taken = self.ids.num_buckets * self.ids.managed_rows - int(self.ids.open_slots())
        times = torch.tensor([*frequent, taken, used, *self.seconds.values()], dtype=torch.float64)
        mine = torch.cat([self.ids.counters.double(), times])
        *counted, asked, hits, taken, used, in_rounds, in_remap, in_stream = self.exchange.sum(mine).tolist()
        self.ids.counters.zero_()
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        whole = seconds * self.task.processes
        sums = dict(zip(COUNTERS, counted))
        return {
            "step": step,
            "events_per_s": sums["counted"] / seconds,
            "events_per_cpu_s": sums["counted"] / used,
            "round_share": in_rounds / whole,
            "remap_share": in_remap / whole,
            "stream_share": in_stream / whole,
            "resident": max(size for (size,) in self.exchange.counts([resident_bytes()])),
            "frequent": asked,
            "frequent_hits": hits,
            "taken": taken,
            **sums,
        }

    def _frequent(self, step: int) -> list[float]:
        """Events of a step whose ids were to be expected often in the last interval, and how many have a row here."""
        end = step // self.task.interval * self.task.interval
        ranks, ids = self.task.stream.step(step)
        often = self.task.stream.expected_counts(ranks, step, (end - self.task.interval, end)) >= _FREQUENT
        if not end:
            return [0.0, 0.0]
        keys = id_keys.keys_of(ids[often])
        bucket = id_keys.bucket_of(keys, self.ids.config.buckets) - self.ids.first_bucket
        keys = keys[(bucket >= 0) & (bucket < self.ids.num_buckets)]
        place = torch.searchsorted(self.ids._mch_sorted_raw_ids, keys)
        return [float(len(keys)), float((self.ids._mch_sorted_raw_ids[place] == keys).sum())]

    def _timed(self, name: str, act: Any) -> Any:
        def timed(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            found = act(*args, **named)
            self.seconds[name] += time.perf_counter() - begin
            return found

        return timed

    def _tensors(self) -> dict[str, Any]:
        state: Any = self.model.fused_optimizer.state_dict()["state"]  # type: ignore[union-attr, operator]
        return {"model": model_state(self.model, ()), "optimizer": {name: dict(one) for name, one in state.items()}}

    def save(self) -> None:
        """Write a checkpoint as a run does."""
        pending, facts = history(self.model, self.exchange)
        tensors = self._tensors() | ({"ids": pending} if pending else {})
        manifest = Manifest(name="step", step=self.ids.step, state={"ids": facts}, about={}, world_size=1)
        write_checkpoint(self.task.folder, manifest, tensors, self.exchange)

    def load(self) -> int:
        """Read it back; returns the steps that were done."""
        folder = paths.join(self.task.folder, "step")
        manifest = read_manifest(folder)
        load_tensors(folder, self._tensors())
        restore_history(self.model, manifest.state["ids"], lambda wanted: load_tensors(folder, {"ids": wanted}))
        return manifest.step

    def digest(self) -> int:
        """A checksum of all that is in this rank's part of the table: ids, rows, counts, weights, optimizer state."""
        found = 0
        for _, value in sorted(_flat(self._tensors())):
            for part in value.local_shards() if hasattr(value, "local_shards") else ():
                found = zlib.crc32(part.tensor.contiguous().numpy().data, found)
        return found


def _flat(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _model(task: Task) -> nn.Module:
    """The table as a run has it."""
    managed = ManagedIdsConfig(eviction=task.eviction, min_count=task.min_count, interval=task.interval)
    table = TableConfig(name=FEATURE, num_embeddings=task.rows, managed=managed)
    sparse = SparseArch([table], task.dim, [], torch.device("meta"))
    sharding.fuse_optimizer(sparse.trained, TableOptimizerConfig(learning_rate=0.01))
    model, device = Lookup(sparse), torch.device("cpu")
    sharded = sharding.shard(model, sharding.make_plan(model, device), device)
    sharding.initialise_tables(sharded, {_TABLE: 0.02}, seed=0)
    start_rows_like(sharded, {_TABLE: 0.02}, seed=0)
    return sharded
