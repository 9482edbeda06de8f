"""A table as large as the machine holds beside a small one: a step's time at the same batch, over several ranks.

    python -m torchx_apps.benchmark large_table [--rows 60000000] [--base-rows 1000000] [--dim 64] [--ids 65536]
        [--dtype fp32] [--ranks 2] [--rounds 20] [--json FILE] [--small]

Each rank is a process of one thread. Both tables are there at once and are stepped in turn (lookup, gradient, fused
row-wise Adagrad), with ids drawn uniformly over all rows. Before that, the vectors looked up in the large table must be
its rows. Memory is what the ranks' resident memory grew by, beside what `plan` counts. `all` leaves this one out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mufasa_rec.data import paths
from mufasa_rec.distributed.env import hide_library_noise
from mufasa_rec.distributed.sharding import local_shards
from mufasa_rec.distributed.table_config import BYTES, Precision, TableOptimizerConfig
from torchx_apps.benchmarks._measure import Measured, as_json, measured, resident_bytes, surroundings
from torchx_apps.benchmarks._table import FEATURE, features_of, sharded_table

_WARM_UP, _CHECKED = 3, 512


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    store: str
    rows: int
    base_rows: int
    dim: int
    ids: int
    dtype: Precision
    ranks: int
    rounds: int


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(
        prog="benchmark large_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"rows": 60_000_000, "base-rows": 1_000_000, "dim": 64, "ids": 65_536, "ranks": 2, "rounds": 20}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default:,})")
    parser.add_argument("--dtype", choices=list(BYTES), default="fp32", help="precision of the weights (fp32)")
    parser.add_argument("--json", metavar="FILE", help="where the rows are written")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    options = parser.parse_args(argv)
    for name in numbers:
        if getattr(options, name.replace("-", "_")) < 1:
            raise SystemExit(f"benchmark: --{name} {getattr(options, name.replace('-', '_'))}: choose 1 or more.")
    if options.small:
        options.rows, options.base_rows, options.ids, options.rounds = 30_000, 10_000, 2048, 2
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-tables-") as folder:
        task = Task(
            str(Path(folder) / "store"), options.rows, options.base_rows, options.dim, options.ids, options.dtype,
            options.ranks, options.rounds,
        )  # fmt: skip
        rows = run(task)
    where = surroundings()
    print(f"{where['device']} · {task.ranks} process(es) of 1 thread · commit {where['commit'] or 'unknown'}")
    for row in rows:
        print(f"{row.case:<62} {row.median:>10.4g} {row.p10:>10.4g} {row.p90:>10.4g}  {row.unit}")
    if options.json:
        with paths.atomic_write(options.json) as path:
            path.write_text(json.dumps(as_json("large_table", rows), indent=2) + "\n")


def run(task: Task) -> list[Measured]:
    """Step both tables on all ranks."""
    with multiprocessing.get_context("spawn").Pool(task.ranks) as pool:
        found = pool.starmap(_work, [(task, rank) for rank in range(task.ranks)], chunksize=1)
    shape = {"rows": task.rows, "base_rows": task.base_rows, "dim": task.dim, "ids": task.ids, "ranks": task.ranks}
    large, base = ([max(s) for s in zip(*(one[name] for one in found))] for name in ("large", "base"))
    ratio = [a / b for a, b in zip(large, base)]
    state = TableOptimizerConfig().state_bytes(task.dim)
    planned = [one["rows"] * (task.dim * BYTES[task.dtype] + state) for one in found]

    def row(case: str, unit: str, values: list[float]) -> Measured:
        return measured(case, unit, values, shape, {"checked": True, "dtype": task.dtype})

    return [
        row(f"step, table of {task.base_rows:,} rows", "ms", [1000 * s for s in base]),
        row(f"step, table of {task.rows:,} rows", "ms", [1000 * s for s in large]),
        row("step of the large table over that of the small one", "x the time", ratio),
        row("resident memory of a rank over the bytes that are planned", "x", [
            one["grown"] / count for one, count in zip(found, planned)
        ]),
    ]  # fmt: skip


def _work(task: Task, rank: int) -> dict[str, Any]:
    """One rank: builds both tables, checks, steps them in turn."""
    torch.set_num_threads(1)
    hide_library_noise()
    os.environ["LOCAL_WORLD_SIZE"] = str(task.ranks)
    dist.init_process_group("gloo", store=dist.FileStore(task.store, task.ranks), rank=rank, world_size=task.ranks)
    device = torch.device("cpu")
    stream = torch.Generator().manual_seed(rank)
    models, ids, held = {}, {}, 0
    for name, rows in (("base", task.base_rows), ("large", task.rows)):
        held = resident_bytes()
        models[name] = sharded_table(rows, task.dim, device, task.dtype)
        ids[name] = torch.randint(0, rows, (task.ids,), generator=stream)
        for _ in range(_WARM_UP):
            _step(models[name], ids[name])
    grown = resident_bytes() - held
    check(models["large"], task)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(task.rounds):
        for name, model in models.items():
            fresh = torch.randint(0, task.base_rows if name == "base" else task.rows, (task.ids,), generator=stream)
            dist.barrier()
            begin = time.perf_counter()
            _step(model, fresh)
            seconds[name].append(time.perf_counter() - begin)
    mine = sum(len(part.weight) for part in local_shards(models["large"])[f"t_{FEATURE}"])
    dist.destroy_process_group()
    return {**seconds, "grown": grown, "rows": mine}


def _step(model: nn.Module, ids: Tensor) -> None:
    (model(features_of(ids)).square().mean()).backward()


def check(model: nn.Module, task: Task) -> None:
    """Compare vectors that are looked up over all ranks with the rows that lie on them.

    Raises:
        AssertionError: When one differs.
    """
    ids = torch.randint(0, task.rows, (_CHECKED,), generator=torch.Generator().manual_seed(7))  # the same on all ranks
    with torch.no_grad():
        found = model(features_of(ids))
    wanted = torch.zeros_like(found)
    for part in local_shards(model).get(f"t_{FEATURE}", ()):
        mine = (ids >= part.first) & (ids < part.first + len(part.weight))
        wanted[mine] = part.weight[ids[mine] - part.first].float()
    dist.all_reduce(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
