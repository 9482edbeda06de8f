"""Train and evaluate variants of a configuration over seeds, and compare them user by user.

    python -m torchx_apps.ablate GRID --output FOLDER --data.dataset DATASET [--preset NAME] [--seeds 0,1,2]
        [--variants NAME,NAME] [--versus NAME] [--processes 2] [--fuse-preset short] [--fuse "FLAGS OF FUSE"]
        [any field of the configuration, for all variants]

The grid is resumable: each cell (configuration, seed, split) is one JSON in FOLDER/cells, and only missing ones are
run, each as two jobs, or three where it fuses first. FOLDER/table.md is written after each cell. A variant that the
data set has nothing for is named and left out.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.evaluation.grid import markdown
from mufasa_rec.evaluation.ranking_grid import ranking_markdown
from mufasa_rec.versions import code_versions
from torchx_apps import ablate_fusion, command_line, extractors
from torchx_apps.ablate_cells import config_hash, read_cell, read_ranking_cell
from torchx_apps.ablate_fusion import Fusion
from torchx_apps.evaluate import MODEL, RANKS_FILE
from torchx_apps.evaluate_ranking import SCORES_FILE
from torchx_apps.grids import GRIDS, RAW, Variants
from torchx_apps.local_job import Job, JobFailedError, run_job

_DATASET = "--data.dataset"


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
        fusions: What the variants fuse first that do.
        processes: Processes of a job.
    """

    output: Path
    seeds: tuple[int, ...]
    flags: dict[str, list[str]]
    configs: dict[str, RunConfig]
    manifest: DatasetManifest
    versus: str
    fusions: dict[str, Fusion]
    processes: int = 2

    def split(self, variant: str) -> str:
        """Hash of a variant's split."""
        return self.manifest.split(self.configs[variant].data.split).hash

    def stem(self, variant: str, seed: int) -> Path:
        """Where a cell lies, without a suffix."""
        made_of = self.split(variant)
        if variant in self.fusions:
            made_of += f" fused {self.fusions[variant].key(made_of)}"
        return self.output / "cells" / f"{variant}-{config_hash(self.configs[variant], made_of)}-seed{seed}"


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
    parser.add_argument("grid", choices=sorted(GRIDS), help="which variants")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="cells, runs, logs, table")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of every variant (0,1,2)")
    parser.add_argument("--variants", default="", metavar="NAME,...", help="some variants of the grid (all)")
    parser.add_argument("--versus", default="", metavar="NAME", help="what the others are compared with (the first)")
    parser.add_argument("--processes", type=int, default=2, help="processes of a job (2)")
    parser.add_argument("--fuse-preset", default="short", metavar="NAME", help="preset of fuse (short)")
    parser.add_argument(
        "--fuse", default="", metavar="FLAGS", help="flags of fuse, for all variants that do, as one text"
    )
    options, shared = parser.parse_known_args(argv)
    if options.help:
        command_line.parse(parser, argv, lambda _: None)
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: choose 1 or more.")
    grid = GRIDS[options.grid]
    variants = _chosen(grid.variants, options.variants)
    head = [
        "--preset",
        options.preset or grid.preset,
        *(("--config", options.config) if options.config else ()),
        *shared,
    ]
    dataset = _config(head).data.dataset
    if not dataset:
        raise ValueError("data.dataset: missing; give the folder that `prepare` wrote, as `--data.dataset FOLDER`.")
    manifest = DatasetManifest.load(dataset)
    raw = ablate_fusion.raw_modalities(dataset, manifest)
    flags, configs, fusions = {}, {}, {}
    for name, own in variants.items():
        if own.fuse is not None:
            fusions[name] = Fusion.parse((*own.fuse, *shlex.split(options.fuse)), options.fuse_preset)
        flags[name] = [*head, *(part for flag in own.train for part in (raw if flag == RAW else [flag]))]
        configs[name] = _config(flags[name])
    versus = options.versus or next(iter(variants))
    if versus not in variants:
        raise ValueError(f"--versus {versus}: not among the variants {', '.join(variants)}.")
    for name in list(configs):
        try:
            _check_data(configs[name], manifest, raw, fusions.get(name))
        except ValueError as error:
            print(f"{name}: left out: {error}", flush=True)
            del configs[name]
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    return Grid(options.output, seeds, flags, configs, manifest, versus, fusions, options.processes)


def _config(flags: list[str]) -> RunConfig:
    return command_line.parse(command_line.parser("ablate", None), flags, lambda _: None)[1]


def _check_data(config: RunConfig, manifest: DatasetManifest, raw: list[str], fusion: Fusion | None) -> None:
    """Refuse a variant that the data set has nothing for.

    Raises:
        ValueError: Says what is missing.
    """
    extractors.check_data(config.model, manifest, list(manifest.content))
    if fusion is not None and fusion.config.layer.anchor not in raw:
        raise ValueError(f"fuse: data set {manifest.name!r} has no {fusion.config.layer.anchor!r}; there are {raw}.")
    there = {*raw, *([fusion.config.output] if fusion else []), *manifest.content}
    missing = sorted({*(config.data.modalities or ())} - there) if config.uses_content else []
    if missing or config.data.modalities == ():
        raise ValueError(f"data.modalities: data set {manifest.name!r} has no {', '.join(missing) or 'content'}.")


def _chosen(variants: Variants, names: str) -> Variants:
    """Some variants, in the order asked for; all when none is named."""
    chosen = [name for name in names.split(",") if name] or list(variants)
    for name in chosen:
        if name not in variants:
            raise ValueError(f"--variants {name}: unknown; choose from {', '.join(variants)}.")
    return {name: variants[name] for name in chosen}


def run_cell(grid: Grid, variant: str, seed: int) -> None:
    """Fuse where it is wanted, train (or continue) and evaluate a cell, and write its JSON last."""
    stem = grid.stem(variant, seed)
    run, results = grid.output / "runs" / stem.name, grid.output / "results" / stem.name
    print(f"\n{variant}, seed {seed}", flush=True)
    seconds, flags = [], grid.flags[variant]
    if variant in grid.fusions:
        dataset = grid.configs[variant].data.dataset
        where = (dataset, grid.split(variant), seed, grid.output, grid.processes)
        view, spent = ablate_fusion.fused(grid.fusions[variant], *where)
        seconds, flags = [spent], _reading(str(view), flags)
    train = Job(
        name=f"train {stem.name}",
        component="train",
        program_args=[*flags, "--seed", str(seed), "--run", str(run)],
        processes=grid.processes,
    )
    rank = Job(
        name=f"evaluate {stem.name}",
        component="evaluate",
        program_args=["--run", str(run), "--output", str(results)],
        processes=grid.processes,
    )
    seconds += [run_job(job, grid.output / "logs" / job.name.replace(" ", "_")) for job in (train, rank)]
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
        "fuse": list(grid.fusions[variant].flags) if variant in grid.fusions else None,
        "versions": code_versions(),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    with paths.atomic_write(stem.with_suffix(".safetensors")) as path:
        scores = SCORES_FILE if grid.configs[variant].task == "ranking" else RANKS_FILE
        path.write_bytes((results / scores).read_bytes())
    with paths.atomic_write(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(cell, indent=2) + "\n")


def _reading(dataset: str, flags: list[str]) -> list[str]:
    """Flags with another data set; TorchX takes none twice."""
    place = next((place for place, flag in enumerate(flags) if flag.partition("=")[0] == _DATASET), None)
    if place is None:  # it is in a file
        return [*flags, _DATASET, dataset]
    return [*flags[:place], _DATASET, dataset, *flags[place + (1 if "=" in flags[place] else 2) :]]


def write_table(grid: Grid) -> str:
    """Write table.md from the cells that there are; returns its text."""
    done = {
        variant: {seed: stem for seed in grid.seeds if (stem := grid.stem(variant, seed)).with_suffix(".json").exists()}
        for variant in grid.configs
    }
    if {config.task for config in grid.configs.values()} == {"ranking"}:
        ranked = {name: {seed: read_ranking_cell(stem) for seed, stem in stems.items()} for name, stems in done.items()}
        text = ranking_markdown(ranked, grid.versus)
    else:
        cells = {name: {seed: read_cell(stem) for seed, stem in stems.items()} for name, stems in done.items()}
        text = markdown(cells, grid.versus)
    with paths.atomic_write(grid.output / "table.md") as path:
        path.write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
