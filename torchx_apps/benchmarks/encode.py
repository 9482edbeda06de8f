"""The fusion layer over a catalog of millions of items: rate, and memory that does not grow with it.

    python -m torchx_apps.benchmark encode [--items 5000000] [--processes 2] [--folder FOLDER] [--json FILE] [--small]

Each process has one thread. Content is made up: three modalities of 256, two genres an item. What is measured is what
`fuse` runs: reading the store, the layer, blocks on the disk; then the generation, written and checksummed by one
process. Beside it the layer's matrix products alone, on numbers that are already there, in as many processes at once.
Full size needs 10 GB of disk in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mufasa_rec.data import paths
from mufasa_rec.data.content import ContentStore, write_content
from mufasa_rec.data.items import Categorical
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.modules.fusion import FusionConfig, FusionLayer, ItemContent
from mufasa_rec.training.fusion_encode import Target, block_folder, encode_blocks, encode_catalog, model_id
from mufasa_rec.training.fusion_items import FusionItems
from torchx_apps.benchmarks._measure import Measured, as_json, measured, surroundings

MODALITIES, WIDTH, GENRES = ("audio", "image", "title"), 256, 20
_BLOCK = 1 << 16
_CHECKED = 512
_SPLIT = {"id": "leave_one_out", "hash": "0" * 64}


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    folder: str
    items: int
    processes: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(
        prog="benchmark encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=5_000_000, help="items of the catalog (5,000,000)")
    parser.add_argument("--processes", type=int, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--folder", metavar="FOLDER", help="where the catalog is made, and removed (a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="where the rows are written")
    parser.add_argument("--small", action="store_true", help="a size that only shows that it works")
    options = parser.parse_args(argv)
    for name in ("items", "processes"):
        if getattr(options, name) < 1:
            raise SystemExit(f"benchmark: --{name} {getattr(options, name)}: choose 1 or more.")
    items = min(options.items, 3000) if options.small else options.items
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-encode-", dir=options.folder) as folder:
        task = Task(folder, items, options.processes, 0.2 if options.small else 10.0)
        rows = run(task)
    where = surroundings()
    print(f"{where['device']} · {task.processes} process(es) of 1 thread · commit {where['commit'] or 'unknown'}")
    for row in rows:
        print(f"{row.case:<62} {row.median:>12,.6g}  {row.unit}")
    if options.json:
        with paths.atomic_write(options.json) as path:
            path.write_text(json.dumps(as_json("encode", rows), indent=2) + "\n")


def run(task: Task) -> list[Measured]:
    """Make the catalog, encode it in processes of their own, and check some of what was written."""
    vectors = _Made(task.items)
    for name in MODALITIES:
        write_content(task.folder, name, np.arange(task.items), vectors, encoder="made", encoder_version="1")
    if task.processes == 1:
        found = [_work(task, 0)]
    else:
        with multiprocessing.get_context("spawn").Pool(task.processes) as pool:
            found = pool.starmap(_work, [(task, rank) for rank in range(task.processes)], chunksize=1)
    check(task)
    encode, write = (max(one[name] for one in found) for name in ("encode", "write"))
    rate, products = task.items / encode, sum(one["products"] for one in found)
    shape = {"items": task.items, "processes": task.processes, "modalities": len(MODALITIES), "width": WIDTH}

    def row(case: str, unit: str, value: float) -> Measured:
        return measured(case, unit, [value], shape, {"checked": True})

    return [
        row("items encoded a second: store read, layer, blocks written", "items/s", rate),
        row("items a second of the layer's matrix products alone", "items/s", products),
        row("of the matrix products' rate", "x", rate / products),
        row("items a second with the generation written and checksummed", "items/s", task.items / (encode + write)),
        row("most memory of all processes together, mapped files included", "GiB", sum(o["peak"] for o in found)),
    ]


class _Made:
    """Vectors that cost nothing to make: one block of random numbers, turned by the block's number."""

    def __init__(self, rows: int) -> None:
        self.shape = (rows, WIDTH)
        self.block = np.random.default_rng(0).standard_normal((min(rows, _BLOCK), WIDTH), dtype=np.float32)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        number = np.arange(start, stop)
        turned = self.block[number % len(self.block)]
        for turn in np.unique(number // _BLOCK):
            here = number // _BLOCK == turn
            turned[here] = np.roll(turned[here], int(turn), axis=1)
        return turned


class _Catalog:
    """What `FusionItems` reads of an `ItemLookup`."""

    def __init__(self, task: Task) -> None:
        rows = np.arange(task.items)
        self.stores = {name: ContentStore.open(task.folder, name, "1") for name in MODALITIES}
        self.content_rows = dict.fromkeys(MODALITIES, rows)
        self.counts = np.zeros(task.items, np.int64)


def _items(task: Task) -> FusionItems:
    values = (np.arange(2 * task.items) % GENRES + 1).astype(np.int32)
    genres = Categorical(values=values, offsets=np.arange(0, 2 * task.items + 1, 2), cardinality=GENRES)
    return FusionItems(_Catalog(task), genres)  # type: ignore[arg-type]


def _layer() -> FusionLayer:
    torch.manual_seed(0)
    return FusionLayer(FusionConfig(), dict.fromkeys(MODALITIES, WIDTH), GENRES + 1).eval()


def _target(task: Task, layer: FusionLayer) -> Target:
    work = Path(task.folder) / "work"
    return Target(dataset=task.folder, name="fused", model=model_id(layer), split=_SPLIT, work=work)


def _work(task: Task, rank: int) -> dict[str, float]:
    """One process's part: products alone, then the encoding, each begun by all at once."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(task.folder) / "store"), task.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=task.processes)
    exchange, layer, items = RankExchange(), _layer(), _items(task)
    target, ids = _target(task, layer), np.arange(task.items)
    _status("clear")
    products = products_rate(layer, items.content(ids[: target.chunk]), task.seconds)
    seconds = {}
    for name in ("encode", "write"):
        exchange.objects(None)
        begin = time.perf_counter()
        if name == "encode":
            encode_blocks(layer, items.content, ids, block_folder(target, ids), target.chunk, exchange)
        else:
            encode_catalog(layer, items.content, ids, ids, target, exchange)
        seconds[name] = time.perf_counter() - begin
    dist.destroy_process_group()
    return {**seconds, "products": products, "peak": _status("VmHWM") / 2**30}


@torch.no_grad()
def products_rate(layer: FusionLayer, items: ItemContent, seconds: float) -> float:
    """Items a second of nothing but the layer's matrix products, on this process.

    Args:
        layer: The layer.
        items: A chunk of items; the products are those that its forward makes of them.
        seconds: How long to measure.
    """
    calls = [(items.content[name], layer.projections.get_parameter(f"{name}.weight")) for name in layer.widths]
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(lambda m, given, _: calls.append((given[0], m.weight))) for module in linears]
    layer(items)
    for hook in hooks:
        hook.remove()
    done, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        for x, weight in calls:
            F.linear(x, weight)
        done += len(items.genre_lengths)
    return done / spent


def check(task: Task) -> None:
    """Compare written vectors, drawn at random, with those of the layer.

    Raises:
        AssertionError: When one differs by more than float16 rounds.
    """
    items, layer = _items(task), _layer()
    store = ContentStore.open(task.folder, "fused", "1")
    rows = np.sort(np.random.default_rng(1).choice(task.items, min(_CHECKED, task.items), replace=False))
    with torch.no_grad():
        z = layer(items.content(rows)).z.numpy()
    assert store.rows == task.items, f"{store.rows} vectors for {task.items} items"
    np.testing.assert_allclose(store.gather(store.rows_of(rows)), z, atol=4e-3, rtol=2e-3)


def _status(name: str) -> int:
    """Bytes of a line of the process's status, 0 where the system does not tell; `clear` resets the peak."""
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not peak.exists():
        return 0
    if name == "clear":
        peak.write_text("5")
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))
