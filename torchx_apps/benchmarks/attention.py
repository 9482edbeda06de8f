"""Sparse attention beside dense attention, forward and backward, at equal threads: how many times as fast it is.

A batch has 65,536 events. The lean budget: window 256, 8 blocks of 64, 4 query heads of width 64, selection shared by
tiles of 64. The sparse step pools blocks, mixes them where the row says so, scores, selects and attends; the dense one
is `scaled_dot_product_attention` over each sequence without padding. Projections are in neither. Dense and sparse run
in turn, and a shape is measured only after a few of its queries, the blocks that they got and the gradients that they
cause were compared with dense rows in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from torchx_apps.benchmarks._attention import Case, SparseStep, check, dense_step, useful_flops
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured, peak_bytes

_LEAN = SparsePattern(window=256, block=64, num_selected=8, selection_stride=64)
_CAP = 256
_LONG_ROUNDS = {4096: 5, 16_384: 3, 65_536: 3}  # a dense round at 65,536 takes as long as ten sparse ones


@dataclass(frozen=True)
class _Scale:
    """Sizes of the batches."""

    pattern: SparsePattern
    events: int
    lengths: tuple[int, ...]
    zipf: int
    cap: int


_FULL = _Scale(_LEAN, 65_536, (4096, 16_384, 65_536), 16_384, _CAP)
_SMALL = _Scale(replace(_LEAN, window=32, block=16, num_selected=4, selection_stride=16), 512, (128, 512), 128, 8)


def run(settings: Settings) -> Iterator[Measured]:
    """Measure all shapes, those of one length in turn with dense attention of that length; rows as they come."""
    scale = _SMALL if settings.small else _FULL
    rows: list[Measured] = []
    for length in scale.lengths:
        rounds = min(settings.rounds, _LONG_ROUNDS.get(length, settings.rounds))
        for dtype in (torch.float32, torch.bfloat16):
            cases = _cases(scale, length, dtype)
            rows += (found := _measure(cases, rounds))
            yield from found
    rows += (found := _measure(_zipf_cases(scale), min(settings.rounds, 5)))
    yield from [*found, *_summary(rows, scale)]


def _cases(scale: _Scale, length: int, dtype: torch.dtype) -> dict[str, Case]:
    """Shapes of sequences of one length."""
    base = Case(pattern=scale.pattern, sizes=(length,) * (scale.events // length), dtype=dtype)
    cases = {"lean, shared": replace(base, shared=True), "lean": base}
    if dtype != torch.float32:
        return cases
    cases["lean, mixer"] = replace(base, mixer=True)
    cases["lean, shared, 1 group"] = replace(base, shared=True, groups=1)
    if length == scale.lengths[1]:
        cases["lean, clustered"] = replace(base, clustered=True)
    if length >= scale.lengths[1]:
        capped = replace(scale.pattern, max_blocks=scale.cap).resolve(length)
        cases[f"at most {scale.cap} blocks"] = replace(base, pattern=capped)
    return cases


def _zipf_cases(scale: _Scale) -> dict[str, Case]:
    """Lengths that fall as the rank to the power of 1.2, and equal lengths with the same longest sequence."""
    sizes: list[int] = []
    while sum(sizes) < scale.events:
        sizes.append(min(max(1, int(scale.zipf / (len(sizes) + 1) ** 1.2)), scale.events - sum(sizes)))
    order = np.random.default_rng(0).permutation(len(sizes))
    base = Case(pattern=scale.pattern, sizes=tuple(sizes[i] for i in order), lengths="zipf")
    return {"lean, shared": replace(base, shared=True), "lean": base}


def _measure(cases: dict[str, Case], rounds: int) -> list[Measured]:
    """Check the shapes, measure them in turn with dense attention of the same lengths and dtype, and make rows."""
    steps = {name: SparseStep(case) for name, case in cases.items()}
    for step in steps.values():
        check(step)
    dense, scale = dense_step(next(iter(cases.values())))
    competitors: dict[str, Callable[[], object]] = {"dense": dense, **steps}
    seconds = in_turn(competitors, rounds)
    dense_s = [s * scale for s in seconds.pop("dense")]
    return [_row(name, steps[name], times, dense_s) for name, times in seconds.items()]


def _row(name: str, step: SparseStep, seconds: list[float], dense_s: list[float]) -> Measured:
    """A row: how many times as fast as dense in each round, and what the contract names."""
    case, length = step.case, max(step.case.sizes)
    dtype = str(case.dtype).removeprefix("torch.")
    ms, dense_ms = float(np.median(seconds)) * 1e3, float(np.median(dense_s)) * 1e3
    peak = peak_bytes(partial(step))
    details = {
        "budget": "capped" if name.startswith("at most") else "lean",
        "length": length,
        "lengths": case.lengths,
        "dtype": dtype,
        "path": "blocked",
        "dense": "scaled_dot_product_attention, each sequence alone",
        "ms": ms,
        "dense_ms": dense_ms,
        "ratio": float(np.median(np.divide(dense_s, seconds))),
        "useful_gflops": useful_flops(step.layout, case) / ms / 1e6,
        "peak_bytes_per_token": None if peak is None else peak / case.events,
        "checked": True,
        "kv_groups": case.groups,
        "shared_kv": case.shared,
        "mixer": case.mixer,
        "selection": "clustered" if case.clustered else "random",
        "ms_p10": float(np.quantile(seconds, 0.1)) * 1e3,
        "ms_p90": float(np.quantile(seconds, 0.9)) * 1e3,
    }
    title = f"{name}: {case.lengths} {length:,}, {dtype}, {ms:,.0f} ms"
    shape = {"events": case.events, "heads": case.heads, "head width": case.width}
    return measured(title, "x dense", np.divide(dense_s, seconds).tolist(), shape, details)


def _summary(rows: list[Measured], scale: _Scale) -> list[Measured]:
    """What follows from several rows: the cost of Zipf lengths, of length under a cap, and of length in memory."""

    def value(column: str, case: str, length: int, lengths: str = "uniform") -> float:
        found = [r.details for r in rows if r.case.startswith(f"{case}: {lengths} {length:,}, float32")]
        return float(found[0][column] or 0.0)

    middle, longest = scale.lengths[-2], scale.lengths[-1]
    capped = f"at most {scale.cap} blocks"
    ratios = {
        "useful FLOP/s, Zipf over uniform": value("useful_gflops", "lean", scale.zipf, "zipf")
        / value("useful_gflops", "lean", scale.zipf),
        "peak memory per token, longest over shortest": value("peak_bytes_per_token", "lean", longest)
        / max(value("peak_bytes_per_token", "lean", scale.lengths[0]), 1.0),
    }
    if len(scale.lengths) > 2:
        ratios[f"time per token, {capped}, {longest:,} over {middle:,}"] = value("ms", capped, longest) / value(
            "ms", capped, middle
        )
    columns = {**dict.fromkeys(rows[0].details), "budget": "summary", "checked": True}
    return [measured(name, "", [ratio], details=columns) for name, ratio in ratios.items()]
