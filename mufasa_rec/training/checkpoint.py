"""Sharded checkpoints: torch distributed checkpoint files beside a small JSON manifest, made current by one rename.

Frozen content tables are not saved: their store is the truth and every run pins its generation.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mufasa_rec.data.paths import explained_disk_errors

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"


def model_state(model: nn.Module, skip: tuple[str, ...]) -> dict[str, Any]:
    """State of a sharded model without the tables named in `skip`."""
    found = model.state_dict()
    return {name: value for name, value in found.items() if not any(f".{table}." in f".{name}" for table in skip)}


def save_checkpoint(folder: Path, state: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Write a checkpoint of all ranks into `folder`, replacing the one there only when the new one is complete.

    Args:
        folder: Final folder, on storage that all ranks share.
        state: Tensors, sharded tensors and nested dicts of them.
        manifest: What `checkpoint.json` says beside the format version.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        with explained_disk_errors(temporary, folder):
            _write(state, temporary)
            if main:
                (temporary / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=2))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if main:
        _make_current(temporary, folder)
    dist.barrier()


def _write(state: dict[str, Any], folder: Path) -> None:
    """Write the tensors of all ranks; an error of one rank is an error on all of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # ShardedTensor is what TorchRec has
            dcp.save(state, checkpoint_id=str(folder))
    except CheckpointException as error:  # a BaseException with one exception per rank inside
        rank, failure = next(iter(error.failures.items()))
        raise OSError(f"{folder.with_suffix('')}: rank {rank} cannot write the checkpoint: {failure[0]}") from failure[
            0
        ]


def _make_current(temporary: Path, folder: Path) -> None:
    """Give a complete checkpoint its name; the one before is removed last."""
    old = _previous(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _previous(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read `checkpoint.json`.

    Raises:
        ValueError: When there is no complete checkpoint, or one of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        remedy = "train the run to its first validation, which saves one"
        if (_previous(folder) / MANIFEST).exists():
            remedy = (
                f"the job was ended while it replaced the checkpoint: rename {_previous(folder).name} to {folder.name}"
            )
        raise ValueError(f"{folder}: holds no complete checkpoint ({MANIFEST} is missing); {remedy}.")
    manifest = json.loads(path.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={manifest.get('format_version')}, this version reads {FORMAT_VERSION}; use the "
            "version of mufasa_rec that wrote it."
        )
    return manifest


def load_model(folder: Path, model: nn.Module, skip: tuple[str, ...]) -> dict[str, Any]:
    """Load a checkpoint's weights into a sharded model, on any number of ranks and under any plan.

    Args:
        folder: The checkpoint.
        model: The sharded model; its shards are filled in place.
        skip: Tables that are not in checkpoints.

    Returns:
        The checkpoint's manifest.
    """
    manifest = load_manifest(folder)
    # The state's tensors are the model's own memory, which loading fills in place.
    dcp.load({"model": model_state(model, skip)}, checkpoint_id=str(folder))
    return manifest
