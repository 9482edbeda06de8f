"""What a pre-flight looks at for each program: its own parser, what it reads first, and where it writes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from mufasa_rec.config import CONFIG_FILE, RunConfig, load_config
from mufasa_rec.data import paths
from mufasa_rec.data.importers.generated import PREFIX
from mufasa_rec.data.order import readers_of
from mufasa_rec.training.checkpoint import find_checkpoint
from mufasa_rec.training.saver import CheckpointConfig
from torchx_apps import (
    benchmark,
    chain_steps,
    evaluate,
    export,
    fuse,
    prepare,
    run_folder,
    train,
)
from torchx_apps.preflight_before import check_doctor, check_plan
from torchx_apps.preflight_data import PREPARED, check_content, check_dataset
from torchx_apps.preflight_findings import Findings
from torchx_apps.preflight_plan import check_tables

Check = Callable[[list[str], Findings], None]


def check_train(arguments: list[str], findings: Findings) -> None:
    """Look at a training."""
    saved = _saved(arguments, train.make_parser(), findings)
    if saved is None:
        return
    folder, config = train.parse(arguments, saved)
    machines = findings.machines
    known = len(findings.problems)
    with findings.guard():
        config.optimizer.tables.refuse_on("cuda" if machines.gpus else "cpu")
        config.ids.refuse_on("cuda" if machines.gpus else "cpu")
    possible = len(findings.problems) == known
    with findings.guard():
        readers_of(0, max(machines.world_size, 1), config.data.num_readers)
    _check_run(str(folder), config.checkpoint, findings)
    manifest = check_dataset("data.dataset", config.data.dataset, config.data.split, findings)
    if manifest is None:
        missing = findings.later if findings.is_coming(config.data.dataset) else findings.unseen
        missing.append("plan of the tables: needs the data set")
        return
    if config.uses_content:
        with findings.guard():
            check_content(config.data.dataset, manifest, config.data.modalities)
    if possible:
        with findings.guard("plan of the tables: "):
            check_tables(config, manifest, findings)


def check_fuse(arguments: list[str], findings: Findings) -> None:
    """Look at the training of a fusion layer."""
    saved = _saved(arguments, fuse.make_parser(), findings)
    if saved is None:
        return
    options, config = fuse.parse(arguments, saved)
    if options.items:
        findings.readable("--items", options.items, "give a Parquet file of new items")
    _check_run(options.run, config.checkpoint, findings)
    manifest = check_dataset("dataset", config.dataset, config.split, findings)
    if manifest is not None:
        with findings.guard():
            check_content(config.dataset, manifest, config.modalities)


def check_prepare(arguments: list[str], findings: Findings) -> None:
    """Look at the making of a data set, or at the check of one."""
    if "--check" in arguments:
        for folder in arguments[1:2]:
            findings.readable("--check", folder, PREPARED)
        return
    config = prepare.parse(arguments)
    if config.input.startswith(PREFIX):
        findings.checked.append(f"--input {config.input} is generated")
    elif findings.readable("--input", config.input, "give a folder, an events file, or synthetic:<seed>"):
        findings.checked.append(f"--input {config.input} is there")
    files = {"--columns-file": config.columns_file, "--items": config.items, **_vectors(config.vectors)}
    for name, file in files.items():
        if file:
            findings.readable(name, file, "check the path")
    findings.writable("--output", config.output)


def check_benchmark(arguments: list[str], findings: Findings) -> None:
    """Look at a measurement."""
    names = [*benchmark.names_of_benchmarks(), "all"]
    name = arguments[0] if arguments else ""
    if name not in names:
        raise ValueError(f"benchmark {name!r}: unknown; choose one of {', '.join(names)}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json")
    options, _ = parser.parse_known_args(arguments)
    if options.json:
        findings.writable("--json", os.path.dirname(options.json) or ".")
    findings.checked.append(f"benchmark {name} is there")


def check_evaluate(arguments: list[str], findings: Findings) -> None:
    """Look at an evaluation."""
    options = evaluate.make_parser().parse_args(arguments)
    findings.writable("--output", options.output)
    for name, folder in evaluate.runs_of(options).items():
        which = options.checkpoint if folder == options.run else "best"
        config = _check_trained("--run" if folder == options.run else f"--compare {name}", folder, which, findings)
        if config is not None:
            dataset = options.dataset or config.data.dataset
            check_dataset("--dataset" if options.dataset else "data.dataset", dataset, config.data.split, findings)


def check_export(arguments: list[str], findings: Findings) -> None:
    """Look at an export."""
    options = export.make_parser().parse_args(arguments)
    _check_trained("--run", options.run, options.checkpoint, findings)
    local = not findings.machines.elsewhere and not paths.is_remote(options.output)
    if local and options.output not in findings.coming and paths.exists(options.output):
        findings.problems.append(
            f"--output {options.output}: already exists; choose another folder, or remove that one"
        )
    findings.writable("--output", options.output)


def check_chain(arguments: list[str], findings: Findings) -> None:
    """Look at all steps of a chain; what a step before writes is not there yet."""
    options = chain_steps.parse(arguments, None)
    findings.writable("--run", options.run)
    for step in options.steps:
        findings.coming.append(options.folder(step))
        with findings.guard(f"{step}: "):
            CHECKS[f"torchx_apps.{step}"](chain_steps.arguments_of(step, options, with_content=True), findings)


def _check_run(folder: str, checkpoint: CheckpointConfig, findings: Findings) -> None:
    """Look at where a run is written, and at the time it has to save itself."""
    findings.writable("--run", folder)
    if checkpoint.folder:
        findings.writable("checkpoint.folder", checkpoint.folder)
    grace_s, machines = checkpoint.grace_s, findings.machines
    if machines.patience_s is not None and grace_s >= machines.patience_s:
        findings.problems.append(
            f"checkpoint.grace_s is {grace_s:g}: torchrun kills its processes {machines.patience_s:g} s after they "
            "were told to end, saved or not; give a smaller --checkpoint.grace-s, or the component more --grace_s"
        )
    elif machines.save_s is not None and grace_s > machines.save_s:
        findings.problems.append(
            f"checkpoint.grace_s is {grace_s:g}: the cluster kills the job {machines.save_s:g} s after it was told to "
            f"end, saved or not; give --checkpoint.grace-s {machines.save_s:g} if a save takes less, or have the "
            "cluster wait longer"
        )
    elif machines.patience_s is not None:
        cluster = "" if machines.save_s is None else f", the cluster {machines.save_s:g} s"
        findings.checked.append(f"a save may take {grace_s:g} s; torchrun waits {machines.patience_s:g} s{cluster}")


def _check_trained(name: str, folder: str, which: str, findings: Findings) -> RunConfig | None:
    """Look at a trained run; returns its configuration where it can be seen."""
    if not findings.readable(name, folder, "give the folder that `train --run` wrote"):
        return None
    with findings.guard(f"{name} "):
        if not paths.exists(paths.join(folder, CONFIG_FILE)):
            raise ValueError(f"{folder}: holds no run ({CONFIG_FILE} is missing); give one that `train --run` wrote")
        config = load_config(paths.join(folder, CONFIG_FILE))
        found = find_checkpoint(config.checkpoint.location(folder), which)
        findings.checked.append(f"{name} {folder} has the checkpoint {found.rpartition('/')[2]}")
        return config
    return None


def _saved(
    arguments: list[str], parser: argparse.ArgumentParser, findings: Findings
) -> Callable[[str | None], str | None] | None:
    """How a run folder's saved configuration is found; None when the configuration itself lies where the job runs."""
    options, _ = parser.parse_known_args(arguments)
    elsewhere = findings.machines.elsewhere
    if options.config and not findings.readable("--config", options.config, "check the path"):
        if options.run:
            findings.writable("--run", options.run)
        return None
    if not elsewhere or not options.run or paths.is_remote(options.run):
        return run_folder.saved_config
    # A folder of that name here is another one.
    return lambda run: None


def _vectors(vectors: Mapping[str, Any]) -> dict[str, str]:
    return {f"--vectors {name}": file for name, file in vectors.items()}


CHECKS: dict[str, Check] = {
    "torchx_apps.benchmark": check_benchmark,
    "torchx_apps.doctor": check_doctor,
    "torchx_apps.plan": check_plan,
    "torchx_apps.prepare": check_prepare,
    "torchx_apps.fuse": check_fuse,
    "torchx_apps.train": check_train,
    "torchx_apps.evaluate": check_evaluate,
    "torchx_apps.export": check_export,
    "torchx_apps.chain": check_chain,
}
