"""Tables: lookup beside a copy of memory, the fused update beside the lookup, TorchRec beside FBGEMM's own calls.

One process, one fp32 table, plain gradient descent, ids drawn uniformly (the worst case for every cache), distinct and
ascending as the loader hands them over; a row has them as they are drawn. Bandwidths
count the bytes of the vectors that are delivered. FBGEMM is called in two ways: unpooled, as TorchRec does by itself,
and on a CPU as sums over bags of one id, as a run does (`mufasa_rec.distributed.cpu_tables`); tables on a CPU lie in
large pages where the system has them. Before anything is
measured, all lookups and updates must be those of plain indexing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from mufasa_rec.distributed.host_memory import keep_freed_memory, use_large_pages
from mufasa_rec.distributed.sharding import local_shards
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured
from torchx_apps.benchmarks._table import RATE, RawTable, as_bags_of_one, features_of, raw_table, sharded_table

DIM, IDS = 64, 65_536


def run(settings: Settings) -> list[Measured]:
    """Check, then measure."""
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()  # as `train` does
    rows = 20_000 if settings.small else 4_000_000
    ids = torch.randint(0, rows, (IDS // 16 if settings.small else IDS,), device=device)
    model, raw = sharded_table(rows, DIM, device, optimizer="sgd"), raw_table(rows, DIM, device)
    ((part,),) = local_shards(model).values()
    torch.nn.init.uniform_(part.weight, -0.1, 0.1)
    tables = {"unpooled": raw}
    if device.type == "cpu":
        tables["raw"] = as_bags_of_one(raw_table(rows, DIM, device))
        for table in tables.values():
            use_large_pages(cast(Tensor, table.weights_host))
    for table in tables.values():
        table.split_embedding_weights()[0].copy_(part.weight)
    check(model, tables, part.weight, ids)
    drawn, ids = ids, torch.unique(ids)
    raw = tables.setdefault("raw", raw)
    gradient = torch.randn(len(ids), DIM, device=device)
    source, target = (torch.empty(len(ids), DIM, device=device).fill_(1.0) for _ in range(2))
    features = features_of(ids)
    competitors: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "gather": lambda: torch.index_select(part.weight, 0, ids, out=target),
        "drawn": partial(_without_gradient, partial(raw, drawn, torch.arange(len(drawn) + 1, device=device))),
        **_calls({"raw": raw}, ids, gradient),
        "torchrec": lambda: _without_gradient(lambda: model(features)),
        "torchrec step": lambda: model(features).backward(gradient),
        # Last: it leaves the heap in pieces, which a run, that never calls it, does not meet.
        **_calls({"unpooled": tables["unpooled"]}, ids, gradient),
    }
    seconds = in_turn(competitors, settings.rounds)
    seconds["drawn"] = [s * len(ids) / len(drawn) for s in seconds["drawn"]]
    return _rows(seconds, {"rows": rows, "dim": DIM, "ids": len(ids)})


def _calls(tables: Mapping[str, RawTable], ids: Tensor, gradient: Tensor) -> dict[str, Callable[[], object]]:
    """A lookup, and a lookup with its update, of each of FBGEMM's modules."""
    offsets, calls = torch.arange(len(ids) + 1, device=ids.device), {}
    for name, table in tables.items():
        calls[name] = partial(_without_gradient, partial(table, ids, offsets))
        calls[f"{name} step"] = partial(_step, table, ids, offsets, gradient)
    return calls


def _step(table: RawTable, ids: Tensor, offsets: Tensor, gradient: Tensor) -> None:
    table(ids, offsets).backward(gradient)


def _rows(seconds: dict[str, list[float]], shape: dict[str, int]) -> list[Measured]:
    payload = 4 * shape["ids"] * shape["dim"]

    def ratio(case: str, unit: str, over: str, under: str, minus: str = "") -> Measured:
        taken = seconds[minus] if minus else [0.0] * len(seconds[over])
        values = [(a - c) / b for a, b, c in zip(seconds[over], seconds[under], taken, strict=True)]
        return measured(case, unit, [max(value, 0.0) for value in values], shape, {"checked": True})

    def rate(case: str, name: str) -> Measured:
        return measured(case, "GB/s", [payload / s / 1e9 for s in seconds[name]], shape, {"checked": True})

    return [
        rate("copy of memory of the vectors' size", "copy"),
        rate("the same rows by torch's index_select", "gather"),
        rate("lookup by FBGEMM", "raw"),
        ratio("lookup's bandwidth over the copy's", "x", "copy", "raw"),
        ratio("that of ids in the order in which they are drawn", "x", "copy", "drawn"),
        ratio("fused update over the lookup", "x the time", "raw step", "raw", "raw"),
        ratio("FBGEMM's unpooled lookup over that lookup", "x the time", "unpooled", "raw"),
        ratio("FBGEMM's unpooled lookup and update over those", "x the time", "unpooled step", "raw step"),
        ratio("TorchRec's lookup over FBGEMM's", "x the time", "torchrec", "raw"),
        ratio("TorchRec's lookup over FBGEMM's unpooled one", "x the time", "torchrec", "unpooled"),
        ratio("TorchRec's lookup and update over FBGEMM's", "x the time", "torchrec step", "raw step"),
    ]


def _without_gradient(call: Callable[[], object]) -> object:
    with torch.no_grad():
        return call()


def check(model: nn.Module, tables: Mapping[str, RawTable], weight: Tensor, ids: Tensor) -> None:
    """Compare lookups and one update of all modules with plain indexing.

    Raises:
        AssertionError: When they differ by more than fp32 rounds.
    """
    offsets = torch.arange(len(ids) + 1, device=ids.device)
    before = weight.clone()
    torch.testing.assert_close(model(features_of(ids)), before[ids])
    model(features_of(ids)).sum().backward()
    counts = torch.bincount(ids, minlength=len(before)).to(before)
    wanted = before - RATE * counts[:, None]
    torch.testing.assert_close(weight, wanted)
    for table in tables.values():
        torch.testing.assert_close(table(ids, offsets), before[ids])
        table(ids, offsets).sum().backward()
        torch.testing.assert_close(table.split_embedding_weights()[0], wanted)
