"""Measure how fast the parts are.

    python -m torchx_apps.benchmark NAME|all [--json FILE] [--rounds 9] [--small]
    python -m torchx_apps.benchmark faults [--kills 20] [--json FILE] [--small]

Each benchmark checks first that what it measures is right, prints a table, and with `--json` writes its rows with
device, versions, commit and shapes. `faults` is a trial with options and rows of its own, which `all` leaves out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.data import paths
from mufasa_rec.distributed.env import distributed
from mufasa_rec.distributed.host_memory import keep_freed_memory
from torchx_apps import benchmarks
from torchx_apps.benchmarks._measure import Measured, Settings, as_json, surroundings


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run benchmarks."""
    names = names_of_benchmarks()
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in names and hasattr(_module(argv[0]), "main"):
        _module(argv[0]).main(argv[1:])
        return
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*names, "all"], help="which benchmark")
    parser.add_argument("--json", metavar="FILE", help="where the rows are written")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="times each competitor is measured (9)")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it works")
    options = parser.parse_args(argv)
    try:
        settings = Settings(rounds=options.rounds, small=options.small)
        with distributed(level=logging.WARNING) as env:
            if env.world_size > 1:
                raise ValueError(f"WORLD_SIZE={env.world_size}: benchmarks measure one process; start one.")
            if env.device.type == "cpu":
                keep_freed_memory()  # as training does
            rows = []
            for name in names if options.name == "all" else [options.name]:
                module = _module(name)
                if hasattr(module, "main"):
                    continue
                rows.extend(as_json(name, _printed(module, module.run(settings))))
        if options.json:
            with paths.atomic_write(options.json) as path:
                path.write_text(json.dumps(rows, indent=2) + "\n")
    except ValueError as error:
        raise SystemExit(f"benchmark: {error}") from error


def names_of_benchmarks() -> list[str]:
    """Modules of `torchx_apps.benchmarks` that are benchmarks."""
    return sorted(found.name for found in pkgutil.iter_modules(benchmarks.__path__) if not found.name.startswith("_"))


def _module(name: str) -> ModuleType:
    """A benchmark, or a trial: that one has a `main` of its own."""
    return importlib.import_module(f"{benchmarks.__name__}.{name}")


def _printed(module: ModuleType, rows: Iterable[Measured]) -> list[Measured]:
    """Print a benchmark's rows for a reader, each as soon as it is there."""
    where = surroundings()
    print("", (module.__doc__ or "").splitlines()[0], sep="\n")
    print(f"{where['device']} · {where['threads']} thread(s) · commit {where['commit'] or 'unknown'}")
    print(f"{'':<58} {'median':>10} {'P10':>10} {'P90':>10}", flush=True)
    found = []
    for row in rows:
        numbers = " ".join(f"{_number(value):>10}" for value in (row.median, row.p10, row.p90))
        print(f"{row.case:<58} {numbers}  {row.unit}", flush=True)
        found.append(row)
    shapes = {name: value for row in found for name, value in row.shape.items()}
    print(" · ".join(f"{name} {value:,}" for name, value in shapes.items()), flush=True)
    return found


def _number(value: float) -> str:
    """Three digits, or a whole number with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
