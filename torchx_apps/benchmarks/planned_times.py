"""Step times that `plan` estimates beside those that ranks on this machine take, for three configurations.

    python -m torchx_apps.benchmark planned_times [--steps 40] [--ranks 2] [--json FILE] [--small]

Each rank is a process of one thread; the data set is the demo's generated catalog. What is asked of an estimate is the
order of the three: the exit code is 1 when it is another. Before its steps are timed, each configuration's plan must
fit this machine. `all` leaves this benchmark out.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv, hide_library_noise
from mufasa_rec.planning.topology import Topology
from mufasa_rec.presets import preset
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.pipelining import make_pipeline
from torchx_apps import assembly
from torchx_apps.benchmarks._measure import Measured, as_json, measured, surroundings
from torchx_apps.plan_run import plan_run

_WARM_UP = 3


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    folder: str
    name: str
    ranks: int
    steps: int

    @property
    def config(self) -> RunConfig:
        """The configuration."""
        return configurations(str(Path(self.folder) / "dataset"))[self.name]


def configurations(dataset: str) -> dict[str, RunConfig]:
    """The three: a narrow model, the demo's, and one that is wider and deeper."""
    demo = preset("demo")
    demo = replace(demo, data=replace(demo.data, dataset=dataset), threads=1)

    def sized(width: int, layers: int, history: int) -> RunConfig:
        extractor = replace(demo.model.extractor, num_layers=layers)
        model = replace(demo.model, width=width, extractor=extractor)
        return replace(demo, model=model, data=replace(demo.data, max_history=history))

    return {"narrow": sized(32, 1, 32), "demo": demo, "wide": sized(256, 3, 64)}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(
        prog="benchmark planned_times", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of each configuration (40)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--json", metavar="FILE", help="where the rows are written")
    parser.add_argument("--small", action="store_true", help="a few steps, which only show that it works")
    options = parser.parse_args(argv)
    for name in ("steps", "ranks"):
        if getattr(options, name) < 1:
            raise SystemExit(f"benchmark: --{name} {getattr(options, name)}: choose 1 or more.")
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-times-") as folder:
        prepare(PrepareConfig(input="synthetic:0", output=str(Path(folder) / "dataset")))
        rows = run(folder, options.ranks, 3 if options.small else options.steps)
    where = surroundings()
    print(f"{where['device']} · {options.ranks} process(es) of 1 thread · commit {where['commit'] or 'unknown'}")
    print(f"{'':<24} {'planned ms':>12} {'median ms':>12} {'P10':>10} {'P90':>10}")
    for row in rows:
        planned = row.details["planned_ms"]
        print(f"{row.case:<24} {planned:>12.1f} {row.median:>12.1f} {row.p10:>10.1f} {row.p90:>10.1f}")
    if options.json:
        with paths.atomic_write(options.json) as path:
            path.write_text(json.dumps(as_json("planned_times", rows), indent=2) + "\n")
    planned = [row.case for row in sorted(rows, key=lambda row: row.details["planned_ms"])]
    taken = [row.case for row in sorted(rows, key=lambda row: row.median)]
    if planned != taken:
        raise SystemExit(f"benchmark: planned order {', '.join(planned)}; measured order {', '.join(taken)}")
    print(f"one order: {', '.join(taken)}")


def run(folder: str, ranks: int, steps: int) -> list[Measured]:
    """Plan each configuration, then train it for some steps."""
    found = []
    for name, config in configurations(str(Path(folder) / "dataset")).items():
        data = assembly.open_dataset(config)
        topology = Topology.parse(f"{ranks}xCPU")
        report = plan_run(config, data.manifest, topology, item_rows=data.catalog.vocabulary.size)
        assert report.fits, f"{name}: {report.verdict}"
        with multiprocessing.get_context("spawn").Pool(ranks) as pool:
            task = Task(folder, name, ranks, steps)
            seconds = pool.starmap(_work, [(task, rank) for rank in range(ranks)], chunksize=1)
        slowest = [1000 * max(step) for step in zip(*seconds)]
        shape = {"width": config.model.width, "events": config.data.max_history, "rows": config.data.batch_size}
        details = {"planned_ms": report.step_time_ms, "planned_parts": dict(report.step_parts), "checked": True}
        found.append(measured(name, "ms", slowest, shape, details))
    return found


def _work(task: Task, rank: int) -> list[float]:
    """One rank's seconds of each step."""
    torch.set_num_threads(1)
    hide_library_noise()
    logging.getLogger("mufasa_rec").setLevel(logging.ERROR)  # the narrow configuration cuts histories
    os.environ["LOCAL_WORLD_SIZE"] = str(task.ranks)
    store = dist.FileStore(str(Path(task.folder) / f"store-{task.name}"), task.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=task.ranks)
    env = DistributedEnv(rank=rank, world_size=task.ranks, local_rank=rank, device=torch.device("cpu"))
    config = task.config
    data = assembly.open_dataset(config)
    loader = assembly.make_loader(config, data, "train", env)
    retriever = assembly.build_retriever(config, data, RankExchange())
    model = assembly.shard_retriever(config, data, retriever, env.device)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    steps = _WARM_UP + task.steps
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, steps)  # type: ignore[arg-type]
    pipeline = make_pipeline(model, optimizer, env.device, model)
    batches, seconds = _endless(loader), []
    for _ in range(steps):
        begin = time.perf_counter()
        pipeline.progress(batches)
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return seconds[_WARM_UP:]


def _endless(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from loader.batches(epoch)
        epoch += 1
