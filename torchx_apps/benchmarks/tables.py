"""Tables: lookup beside a copy of memory, the fused update beside the lookup, TorchRec beside FBGEMM's own call.

One process, one fp32 table, ids drawn uniformly (the worst case for every cache). Bandwidths count the bytes of the
vectors that are delivered. Before anything is measured, TorchRec's lookups and updates must be those of FBGEMM's
module, and its those of plain indexing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mufasa_rec.distributed.sharding import local_shards
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured
from torchx_apps.benchmarks._table import RATE, features_of, raw_table, sharded_table

DIM, IDS = 64, 65_536


def run(settings: Settings) -> list[Measured]:
    """Check, then measure."""
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    rows = 20_000 if settings.small else 4_000_000
    ids = torch.randint(0, rows, (IDS // 16 if settings.small else IDS,), device=device)
    model, raw = sharded_table(rows, DIM, device, optimizer="sgd"), raw_table(rows, DIM, device)
    ((part,),) = local_shards(model).values()
    torch.nn.init.uniform_(part.weight, -0.1, 0.1)
    raw.split_embedding_weights()[0].copy_(part.weight)
    check(model, raw, part.weight, ids)
    offsets = torch.arange(len(ids) + 1, device=device)
    source, target = (torch.empty(len(ids), DIM, device=device).fill_(1.0) for _ in range(2))
    features = features_of(ids)
    competitors: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "gather": lambda: torch.index_select(part.weight, 0, ids, out=target),
        "raw": lambda: _without_gradient(lambda: raw(ids, offsets)),
        "raw step": lambda: raw(ids, offsets).sum().backward(),
        "torchrec": lambda: _without_gradient(lambda: model(features)),
        "torchrec step": lambda: model(features).sum().backward(),
    }
    seconds = in_turn(competitors, settings.rounds)
    return _rows(seconds, {"rows": rows, "dim": DIM, "ids": len(ids)})


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
        ratio("gradient and fused update over the lookup", "x the time", "raw step", "raw", "raw"),
        ratio("TorchRec's lookup over FBGEMM's", "x the time", "torchrec", "raw"),
        ratio("TorchRec's lookup and update over FBGEMM's", "x the time", "torchrec step", "raw step"),
    ]


def _without_gradient(call: Callable[[], object]) -> object:
    with torch.no_grad():
        return call()


def check(model: nn.Module, raw: nn.Module, weight: Tensor, ids: Tensor) -> None:
    """Compare lookups and one update of both modules with plain indexing.

    Raises:
        AssertionError: When they differ by more than fp32 rounds.
    """
    offsets = torch.arange(len(ids) + 1, device=ids.device)
    before = weight.clone()
    torch.testing.assert_close(raw(ids, offsets), before[ids])
    torch.testing.assert_close(model(features_of(ids)), before[ids])
    raw(ids, offsets).sum().backward()
    model(features_of(ids)).sum().backward()
    counts = torch.bincount(ids, minlength=len(before)).to(before)
    wanted = before - RATE * counts[:, None]
    torch.testing.assert_close(weight, wanted)
    torch.testing.assert_close(raw.split_embedding_weights()[0], wanted)  # type: ignore[operator]
