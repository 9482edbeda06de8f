"""Sharded checkpoints of a run: torch distributed checkpoint files and a manifest in one folder each, newest last.

    LOCATION/step-00000300/{__0_0.distcp, __1_0.distcp, .metadata, checkpoint.json}

A checkpoint is written under a temporary name and gets its own when it is complete: by one rename on a disk, by its
manifest arriving last in an object store. Nothing is ever written into a complete one. Frozen content tables are not
saved: their store is the truth and every run pins its generation.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mufasa_rec.data import paths
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.checkpoint_manifest import MANIFEST, DamagedCheckpointError, Manifest, damage, read_manifest
from mufasa_rec.training.checkpoint_reader import open_reader

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_LEFT_OVER = re.compile(r"\.step-\d{8,}.*")


def model_state(model: nn.Module, skip: tuple[str, ...]) -> dict[str, Any]:
    """State of a sharded model without the tables named in `skip`."""
    found = model.state_dict()
    return {name: value for name, value in found.items() if not any(f".{table}." in f".{name}" for table in skip)}


def new_name(location: paths.Location, step: int) -> str:
    """A name for a checkpoint of `step` that no folder has; a name is never used twice.

    Example:
        >>> new_name("/nowhere", 300)
        'step-00000300'
    """
    taken = {match[0]: int(match[2] or 0) for name in paths.list_folders(location) if (match := _match(name, step))}
    return f"step-{step:08d}" + (f"-{max(taken.values()) + 1}" if taken else "")


def _match(name: str, step: int) -> re.Match[str] | None:
    found = _NAME.fullmatch(name.removeprefix("damaged-"))
    return found if found and int(found[1]) == step else None


def list_checkpoints(location: paths.Location) -> list[str]:
    """Names of the checkpoints at a location, oldest first, whole or not."""
    found = [match for name in paths.list_folders(location) if (match := _NAME.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), int(match[2] or 0)))]


def find_checkpoint(location: paths.Location, which: str = "best") -> str:
    """The folder of one checkpoint of a run.

    Args:
        location: Where the run's checkpoints lie.
        which: `best` (validation), `newest`, a step, or a checkpoint's name.

    Raises:
        ValueError: When there is none of that kind; says which there are.
    """
    names = list_checkpoints(location)
    if not names:
        raise ValueError(f"{os.fspath(location)}: holds no checkpoint; train the run until it has saved one.")
    if which in ("newest", "best"):
        newest = read_manifest(paths.join(location, names[-1]))
        if which == "newest":
            return paths.join(location, names[-1])
        which = newest.state["progress"]["best"].get("checkpoint", "")
        if not which:
            raise ValueError(
                f"{os.fspath(location)}: the run has not been validated yet, so no checkpoint is the best; train on, "
                "or take the newest."
            )
    found = [name for name in names if name == which or (which.isdecimal() and _match(name, int(which)))]
    if not found:
        raise ValueError(f"{os.fspath(location)}: no checkpoint {which!r}; there are {', '.join(names)}.")
    return paths.join(location, found[-1])


def remove_left_overs(location: paths.Location) -> None:
    """Remove what an interrupted save or removal left behind."""
    for name in paths.list_folders(location):
        if _LEFT_OVER.fullmatch(name):
            logger.info("%s: left over from a save that was interrupted, removed", name)
            paths.remove_folder(paths.join(location, name))


def remove_checkpoint(location: paths.Location, name: str) -> None:
    """Remove a checkpoint; when that is interrupted, what is left does not look like one."""
    if paths.is_remote(location):  # without its manifest it is none
        paths.remove_file(paths.join(location, name, MANIFEST))
        paths.remove_folder(paths.join(location, name))
        return
    paths.remove_folder(paths.rename_folder(paths.join(location, name), f".{name}.removed"))


def newest_intact(location: paths.Location, exchange: RankExchange) -> Manifest | None:
    """The manifest of the newest checkpoint that is as it was written; damaged ones are named and set aside.

    Args:
        location: Where the run's checkpoints lie.
        exchange: Reaches the other ranks; each checks some of the files.

    Returns:
        The manifest, or None when there are no checkpoints at all.

    Raises:
        ValueError: When there are checkpoints and none is whole, or the newest is of another format version.
    """
    names = exchange.objects(list_checkpoints(location) if exchange.rank == 0 else None)[0]
    for name in reversed(names):
        manifest, problem = _checked(location, name, exchange)
        if problem is None:
            return manifest
        if exchange.rank == 0:
            logger.error("checkpoint %s is damaged: %s; it is set aside, the one before is used", name, problem)
            _set_aside(location, name)
        exchange.objects(None)  # nobody goes on before it is out of the way
    if names:
        raise ValueError(
            f"{os.fspath(location)}: all {len(names)} checkpoints are damaged, see above; mend or remove them (without "
            "any the run starts anew), or train in another folder."
        )
    return None


def check_intact(folder: str, exchange: RankExchange) -> Manifest:
    """The manifest of one checkpoint, whose files are as they were written.

    Raises:
        DamagedCheckpointError: When one is not; on all ranks alike.
    """
    location, _, name = folder.rpartition("/")
    manifest, problem = _checked(location, name, exchange)
    if problem is not None:
        raise DamagedCheckpointError(f"checkpoint {name} is damaged: {problem}; take another one.")
    assert manifest is not None
    return manifest


def _checked(location: paths.Location, name: str, exchange: RankExchange) -> tuple[Manifest | None, str | None]:
    """A checkpoint's manifest, and what is wrong with it or with its files; the same on all ranks."""
    manifest, problem = None, None
    folder = paths.join(location, name)
    try:
        manifest = read_manifest(folder)
        mine = sorted(manifest.files)[exchange.rank :: exchange.world_size]
        problem = damage(folder, manifest, mine)
    except DamagedCheckpointError as error:
        problem = str(error)
    return manifest, next((found for found in exchange.objects(problem) if found), None)


def _set_aside(location: paths.Location, name: str) -> None:
    folder = paths.join(location, name)
    if paths.is_remote(location) and not paths.exists(paths.join(folder, MANIFEST)):
        paths.remove_folder(folder)  # an upload that was interrupted
        return
    paths.rename_folder(folder, f"damaged-{name}")


def load_tensors(folder: paths.Location, state: dict[str, Any]) -> None:
    """Fill a state's tensors in place from a checkpoint, on any number of ranks and under any plan; collective.

    Args:
        folder: The checkpoint, checked before.
        state: Tensors, sharded tensors and nested dicts of them, named as they were saved.

    Raises:
        ValueError: When the checkpoint lacks one of them or has it in another shape.
    """
    try:
        dcp.load(state, storage_reader=open_reader(folder))
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"{os.fspath(folder)}: does not fit this model ({failure}); was its configuration or data set changed?"
        ) from failure


def load_model(folder: paths.Location, model: nn.Module, skip: tuple[str, ...]) -> None:
    """Load a checkpoint's weights into a sharded model, on any number of ranks and under any plan.

    Args:
        folder: The checkpoint, checked before.
        model: The sharded model; its shards are filled in place.
        skip: Tables that are not in checkpoints.
    """
    load_tensors(folder, {"model": model_state(model, skip)})
