"""Train and evaluate variants of a configuration over seeds, and compare them user by user.

    python -m torchx_apps.ablate GRID --output FOLDER --data.dataset DATASET [--preset short] [--seeds 0,1,2]
        [--variants NAME,NAME] [--versus NAME] [any field of the configuration, for all variants]

The grid is resumable: each cell (configuration, seed, split) is one JSON in FOLDER/cells, and only missing ones are
run, each as two jobs of 2 processes. FOLDER/table.md is written after each cell. A variant that the data set has
nothing for is named and left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.evaluation.grid import Cell, markdown
from mufasa_rec.versions import code_versions
from torchx_apps import command_line, extractors
from torchx_apps.evaluate import MODEL, RANKS_FILE
from torchx_apps.grids import GRIDS, Variants
from torchx_apps.local_job import Job, JobFailedError, run_job

# What makes no other cell: where the data lies, the seed (which names the cell itself), how a run is watched.
_NO_PART = ("data.dataset", "data.prefetch", "trainer.log_every", "checkpoint", "sharding", "threads", "seed")


@dataclass(frozen=True)
class Grid:
    """A grid that was asked for.

    Attributes:
        output: Folder of cells, runs, logs and the table.
        seeds: Seeds of every variant.
        flags: Command line of each variant.
        configs: Configuration of each variant.
        manifest: The data set.
        versus: The variant that the others are compared with.
    """

    output: Path
    seeds: tuple[int, ...]
    flags: dict[str, list[str]]
    configs: dict[str, RunConfig]
    manifest: DatasetManifest
    versus: str

    def stem(self, variant: str, seed: int) -> Path:
        """Where a cell lies, without a suffix."""
        config = self.configs[variant]
        split = self.manifest.split(config.data.split).hash
        return self.output / "cells" / f"{variant}-{config_hash(config, split)}-seed{seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of a grid and print its table.

    Returns:
        0, or 1 when a job failed, 2 for a wrong argument.
    """
    try:
        grid = parse(argv)
        for seed in grid.seeds:
            for variant in grid.configs:
                if not grid.stem(variant, seed).with_suffix(".json").exists():
                    run_cell(grid, variant, seed)
                    write_table(grid)
        print(write_table(grid))
    except ValueError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    except JobFailedError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> Grid:
    """Read the command line; every variant's configuration is checked before anything runs.

    Raises:
        ValueError: For an unknown variant, a field that is refused, or a missing data set.
    """
    parser = command_line.parser("ablate", __doc__)
    parser.set_defaults(preset="short")
    parser.add_argument("grid", choices=sorted(GRIDS), help="which variants")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="cells, runs, logs, table")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of every variant (0,1,2)")
    parser.add_argument("--variants", default="", metavar="NAME,...", help="some variants of the grid (all)")
    parser.add_argument("--versus", default="", metavar="NAME", help="what the others are compared with (the first)")
    options, shared = parser.parse_known_args(argv)
    if options.help:
        command_line.parse(parser, argv, lambda _: None)
    variants = _chosen(GRIDS[options.grid], options.variants)
    head = ["--preset", options.preset, *(("--config", options.config) if options.config else ()), *shared]
    flags, configs = {}, {}
    for name, own in variants.items():
        flags[name] = [*head, *own]
        _, configs[name] = command_line.parse(command_line.parser("ablate", None), flags[name], lambda _: None)
    versus = options.versus or next(iter(variants))
    if versus not in variants:
        raise ValueError(f"--versus {versus}: not among the variants {', '.join(variants)}.")
    dataset = configs[versus].data.dataset
    if not dataset:
        raise ValueError("data.dataset: missing; give the folder that `prepare` wrote, as `--data.dataset FOLDER`.")
    manifest = DatasetManifest.load(dataset)
    for name in list(configs):
        try:
            extractors.check_data(configs[name].model, manifest, list(manifest.content))
        except ValueError as error:
            print(f"{name}: left out: {error}", flush=True)
            del configs[name]
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    return Grid(options.output, seeds, flags, configs, manifest, versus)


def _chosen(variants: Variants, names: str) -> Variants:
    """Some variants, in the order asked for; all when none is named."""
    chosen = [name for name in names.split(",") if name] or list(variants)
    for name in chosen:
        if name not in variants:
            raise ValueError(f"--variants {name}: unknown; choose from {', '.join(variants)}.")
    return {name: variants[name] for name in chosen}


def config_hash(config: RunConfig, split: str) -> str:
    """Short hash of all that makes a result, the seed aside."""
    fields = dict(_flat(dataclasses.asdict(config), ""))
    kept = {k: v for k, v in fields.items() if not any(k == no or k.startswith(f"{no}.") for no in _NO_PART)}
    text = json.dumps({"split": split, **kept}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flat(fields: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in fields.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def run_cell(grid: Grid, variant: str, seed: int) -> None:
    """Train (or continue) and evaluate a cell, and write its JSON last."""
    stem = grid.stem(variant, seed)
    run, results = grid.output / "runs" / stem.name, grid.output / "results" / stem.name
    print(f"\n{variant}, seed {seed}", flush=True)
    train = Job(
        name=f"train {stem.name}",
        component="train",
        program_args=[*grid.flags[variant], "--seed", str(seed), "--run", str(run)],
    )
    rank = Job(
        name=f"evaluate {stem.name}",
        component="evaluate",
        program_args=["--run", str(run), "--output", str(results)],
    )
    seconds = [run_job(job, grid.output / "logs" / job.name.replace(" ", "_")) for job in (train, rank)]
    rows = {row["row"]: row for row in json.loads((results / "evaluation.json").read_text())["rows"]}
    cell = {
        "variant": variant,
        "seed": seed,
        "config_hash": stem.name.split("-")[-2],
        "flags": grid.flags[variant],
        "dataset": grid.manifest.name,
        "split": grid.manifest.split(grid.configs[variant].data.split).hash,
        "seconds": rows[MODEL]["seconds"],
        "wall_seconds": sum(seconds),
        "best": json.loads((run / "summary.json").read_text())["best"],
        "row": rows[MODEL],
        "versions": code_versions(),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    with paths.atomic_write(stem.with_suffix(".safetensors")) as path:
        path.write_bytes((results / RANKS_FILE).read_bytes())
    with paths.atomic_write(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(cell, indent=2) + "\n")


def write_table(grid: Grid) -> str:
    """Write table.md from the cells that there are; returns its text."""
    cells: dict[str, dict[int, Cell]] = {}
    for variant in grid.configs:
        cells[variant] = {}
        for seed in grid.seeds:
            stem = grid.stem(variant, seed)
            if stem.with_suffix(".json").exists():
                told = json.loads(stem.with_suffix(".json").read_text())
                ranks = load_file(stem.with_suffix(".safetensors"))
                columns = (ranks[name] for name in ("user", "target_row", f"rank.{MODEL}", "history_length"))
                cells[variant][seed] = Cell(*columns, seconds=told["seconds"])
    text = markdown(cells, grid.versus)
    with paths.atomic_write(grid.output / "table.md") as path:
        path.write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
