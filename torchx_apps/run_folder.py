"""A run's folder: new, or that of an interrupted run which is continued; and what its checkpoints say about the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mufasa_rec.config import CONFIG_FILE, RunConfig, load_config, refuse_changes
from mufasa_rec.data import paths
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.versions import code_versions
from torchx_apps.assembly import OpenDataset


def local_folder(run: str) -> Path:
    """The run folder as a local path.

    Raises:
        ValueError: For a URL: logs are appended to, which object stores cannot.
    """
    if paths.is_remote(run):
        raise ValueError(
            f"run={run!r}: logs are appended to while training; choose a folder on a mounted disk, and set "
            "checkpoint.folder to a URL for checkpoints in an object store."
        )
    return Path(run)


def saved_config(run: str | None) -> str | None:
    """The configuration file of the run that a folder holds; None when it holds none."""
    file = paths.join(run, CONFIG_FILE) if run else None
    return file if file and paths.exists(file) else None


def claim(folder: Path, config: RunConfig, exchange: RankExchange) -> bool:
    """Make the run folder, or find that it holds this run already; refused on all ranks alike.

    Args:
        folder: The run folder.
        config: Configuration of the run.
        exchange: Reaches the other ranks.

    Returns:
        Whether the folder holds this run, begun before.

    Raises:
        ValueError: When it holds another run, or cannot be made. Nothing is written then.
    """
    problem, continues = None, False
    if exchange.rank == 0:
        try:
            file = saved_config(str(folder))
            if file:
                refuse_changes(load_config(file), config, folder)
                continues = True
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--run {folder}: cannot be made ({error.strerror}); choose a folder that this user may write."
        except ValueError as error:
            problem = str(error)
    problem, continues = exchange.objects((problem, continues))[0]
    if problem:
        raise ValueError(problem)
    return continues


def describe_run(config: RunConfig, data: OpenDataset, plan: str) -> dict[str, Any]:
    """What every checkpoint says about its run: configuration, plan, data set, versions of the code."""
    return {
        "config": dataclasses.asdict(config),
        "plan": plan.splitlines(),
        "dataset": dataset_facts(data),
        "versions": code_versions(),
    }


def dataset_facts(data: OpenDataset) -> dict[str, str]:
    """What identifies the data that a run reads, wherever it lies."""
    facts = {"split": data.catalog.split, "items": data.manifest.items.checksum}
    for name, store in data.catalog.stores.items():
        facts[f"content.{name}"] = f"{store.manifest.generation}@{store.manifest.checksum}"
    return facts


def refuse_other_data(manifest: Manifest, data: OpenDataset) -> None:
    """Refuse a checkpoint that was written on other data.

    Raises:
        ValueError: Names what differs, with both values.
    """
    saved, now = manifest.about["dataset"], dataset_facts(data)
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"checkpoint {manifest.name}: written on data whose {name} is {saved.get(name)}, but the data set "
                f"{data.manifest.name!r} in {data.folder} has {now.get(name)}; give the data set of the run."
            )
