"""A run's folder: new, or that of an interrupted run which is continued; and what its checkpoints say about the run."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mufasa_rec.config import CONFIG_FILE, RunConfig, load_config, refuse_changes
from mufasa_rec.data import paths
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.versions import code_versions
from torchx_apps.assembly import OpenDataset

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"


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


def claim(folder: Path, config: RunConfig, exchange: RankExchange) -> tuple[RunConfig, bool]:
    """Make the run folder, or find that it holds this run already; refused on all ranks alike.

    Args:
        folder: The run folder.
        config: Configuration of the run.
        exchange: Reaches the other ranks.

    Returns:
        The configuration, and whether the folder holds this run, begun before. Such a run keeps the modalities that it
        began with, whatever the data set has got since.

    Raises:
        ValueError: When it holds another run, or cannot be made. Nothing is written then.
    """
    problem, continues = None, False
    if exchange.rank == 0:
        try:
            file = saved_config(str(folder))
            if file:
                saved = load_config(file)
                config = with_modalities(config, saved.data.modalities)
                refuse_changes(saved, config, folder)
                continues = True
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--run {folder}: cannot be made ({error.strerror}); choose a folder that this user may write."
        except ValueError as error:
            problem = str(error)
    problem, continues, config = exchange.objects((problem, continues, config))[0]
    if problem:
        raise ValueError(problem)
    return config, continues


def refuse_unwritable(checkpoints: str, exchange: RankExchange) -> None:
    """Refuse a place of checkpoints that cannot be written, before the first step instead of at the first save.

    Raises:
        ValueError: On all ranks alike.
    """

    def write() -> None:
        try:
            if exchange.rank == 0:
                paths.try_to_write(checkpoints)
        except Exception as error:  # of whichever client, where it is a URL
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ValueError(
                f"checkpoint.folder={checkpoints!r}: {reason}; choose a folder that can be written."
            ) from error

    on_all_ranks(exchange, write)


def with_modalities(config: RunConfig, names: Iterable[str] | None) -> RunConfig:
    """The configuration with these modalities where it names none, so that later ones do not join the run."""
    if config.data.modalities is not None or names is None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, modalities=tuple(sorted(names))))


@contextmanager
def held(folder: Path, exchange: RankExchange, patience_s: float) -> Iterator[None]:
    """Keep other jobs out of the run folder for the length of a `with` block.

    A job that was started again can meet processes of the one before, which are still saving. The lock is the
    kernel's: it goes with the process of rank 0, however that ends.

    Args:
        folder: The run folder.
        exchange: Reaches the other ranks.
        patience_s: Seconds to wait for another job to leave.

    Raises:
        ValueError: When another job stays in the folder; on all ranks alike.
    """
    problem, lock = None, None
    if exchange.rank == 0:
        lock = (folder / LOCK_FILE).open("a+")
        problem = _lock(lock, folder, patience_s)
    problem = exchange.objects(problem)[0]
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(file: IO[str], folder: Path, patience_s: float) -> str | None:
    """Take the lock and say in the file who has it; returns what is wrong when another job keeps it."""
    end = time.monotonic() + patience_s
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that only one job uses the folder", file.name, error)
            return None
        if time.monotonic() > end:
            return f"--run {folder}: is in use by {owner}; end that job, or choose another folder."
        if not told:
            logger.info("--run %s: is in use by %s; waiting up to %.0f s for it to end", folder, owner, patience_s)
            told = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None


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
    for name in data.catalog.stores:
        pinned = data.manifest.content[name]  # a generation may have got segments since
        facts[f"content.{name}"] = f"{pinned.generation}@{pinned.checksum}"
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
