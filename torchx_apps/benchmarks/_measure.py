"""What benchmarks share: settings, rounds of competitors in turn, and rows that say what was measured where."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mufasa_rec.versions import checkout_commit, code_versions


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: Times that each competitor is measured.
        small: Sizes that only show that the benchmark works.
    """

    rounds: int = 9
    small: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: choose 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of a benchmark's table.

    Attributes:
        case: What was measured.
        unit: Unit of the numbers.
        median: Median over rounds.
        p10: Their 10 % quantile.
        p90: Their 90 % quantile.
        shape: Sizes that belong to the numbers.
        details: Further columns of the row in JSON.
    """

    case: str
    unit: str
    median: float
    p10: float
    p90: float
    shape: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def measured(
    case: str,
    unit: str,
    values: list[float],
    shape: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Measured:
    """Summarise rounds.

    Example:
        >>> row = measured("sum", "ms", [3.0, 1.0, 2.0])
        >>> row.median, round(row.p10, 1), round(row.p90, 1)
        (2.0, 1.2, 2.8)
    """
    p10, median, p90 = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return Measured(
        case=case, unit=unit, median=median, p10=p10, p90=p90, shape=dict(shape or {}), details=dict(details or {})
    )


def in_turn(competitors: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each competitor in each round, measured in turn so that noise of the machine meets all of them.

    Args:
        competitors: What to run, by name; each runs once unmeasured first.
        rounds: Times that each is measured.
    """
    for run in competitors.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def surroundings() -> dict[str, Any]:
    """Where it was measured: device, threads, versions, commit."""
    versions = code_versions()
    versions.pop("commit", None)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions, "commit": checkout_commit()}


def as_json(name: str, rows: list[Measured]) -> list[dict[str, Any]]:
    """Rows with the benchmark's name and its surroundings."""
    where = surroundings()
    found = []
    for row in rows:
        columns = asdict(row)
        found.append({"benchmark": name, **columns.pop("details"), **columns, **where})
    return found


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Most memory that a run takes beyond what is held before it; None where the system does not tell."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not peak.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide a run's own memory
    held = _status_bytes(status, "VmRSS")
    peak.write_text("5")  # resets VmHWM
    run()
    return _status_bytes(status, "VmHWM") - held


def resident_bytes() -> int:
    """Memory of this process, without what its allocator only keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes(Path("/proc/self/status"), "VmRSS")


def _status_bytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"cpu: {names[0].split(':', 1)[1].strip()}" if names else f"cpu: {platform.machine()}"
