"""Writing a checkpoint: every rank its own shards, checked, and made current in one stroke.

On a disk all ranks write into one folder with a temporary name, which rank 0 renames. For an object store each rank
writes to a local folder and uploads its files; the manifest is uploaded last and makes the checkpoint complete.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from mufasa_rec.data import paths
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.checkpoint_manifest import MANIFEST, FileFacts, Manifest, file_facts
from mufasa_rec.training.checkpoint_reader import open_reader


def write_checkpoint(
    location: paths.Location, manifest: Manifest, state: dict[str, Any], exchange: RankExchange
) -> Manifest:
    """Write a checkpoint of all ranks; collective over the exchange's group, which must be a gloo group.

    Args:
        location: Where the run's checkpoints lie; storage that all ranks share.
        manifest: What `checkpoint.json` says; the files are added.
        state: Tensors, sharded tensors and nested dicts of them.
        exchange: Reaches the other ranks.

    Returns:
        The complete manifest.

    Raises:
        OSError: When a rank cannot write, on all ranks alike; nothing is left behind then.
    """
    with _workplace(location, manifest.name, exchange) as work:
        files = _agreed(exchange, lambda: _write_files(work, location, manifest.name, state, exchange))
        whole = replace(manifest, files={name: facts for found in files for name, facts in found.items()})
        _agreed(exchange, lambda: _publish(work, location, whole) if exchange.rank == 0 else None)
    return whole


@contextmanager
def _workplace(location: paths.Location, name: str, exchange: RankExchange) -> Iterator[Path]:
    """The local folder in which ranks write: one beside the final folder, or each rank's own before an upload."""
    if paths.is_remote(location):
        with tempfile.TemporaryDirectory(prefix="mufasa-rec-checkpoint-") as folder:
            yield Path(folder)
        return
    # Its name is this attempt's own: a process of an earlier attempt that still writes cannot reach it.
    token = exchange.objects(os.urandom(4).hex())[0]
    work = paths.local_path(location) / f".{name}.{token}"
    try:
        yield work
    finally:
        if exchange.rank == 0:
            paths.remove_folder(work)


def _agreed(exchange: RankExchange, act: Callable[[], Any]) -> list[Any]:
    """Run `act` on all ranks; returns all results, or raises the first rank's error on all of them."""
    result, problem = None, None
    try:
        result = act()
    except Exception as error:
        problem = str(error) or repr(error)
    found = exchange.objects((problem, result))
    for rank, (problem, _) in enumerate(found):
        if problem is not None:
            raise OSError(f"rank {rank} cannot write the checkpoint: {problem}")
    return [result for _, result in found]


def _write_files(
    work: Path, location: paths.Location, name: str, state: dict[str, Any], exchange: RankExchange
) -> dict[str, FileFacts]:
    """Write this rank's files, read them back for their checksums, and send them to an object store."""
    with paths.explained_disk_errors(work, paths.join(location, name)):
        if not _write_tensors(work, state, exchange):
            return {}
    mine = [file for file in sorted(work.iterdir()) if file.name.startswith(f"__{exchange.rank}_")]
    if exchange.rank == 0:
        mine.append(work / ".metadata")
    files = {file.name: file_facts(file) for file in mine}
    if paths.is_remote(location):
        for file in mine:
            paths.put_file(file, paths.join(location, name, file.name))
    return files


def _write_tensors(work: Path, state: dict[str, Any], exchange: RankExchange) -> bool:
    """Write this rank's shards; raises on the ranks that failed, and returns False where only others did."""
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(work), process_group=exchange.group)
        return True
    except CheckpointException as error:  # a BaseException, on every rank, with one exception per rank inside
        if exchange.rank in error.failures:
            failure = error.failures[exchange.rank][0]
            raise OSError(str(failure)) from failure
        return False


def _publish(work: Path, location: paths.Location, manifest: Manifest) -> None:
    """Check that the parts make a whole, then give the checkpoint its name."""
    _check_storage(work, manifest)
    file = work / MANIFEST
    with paths.explained_disk_errors(work, paths.join(location, manifest.name)), file.open("w") as handle:
        handle.write(manifest.to_json())
        handle.flush()
        os.fsync(handle.fileno())
    if paths.is_remote(location):
        paths.put_file(file, paths.join(location, manifest.name, MANIFEST))
        return
    _flush_folder(work)
    final = paths.local_path(location) / manifest.name
    os.rename(work, final)
    _flush_folder(final.parent)  # the new name survives a crash of the machine too


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_storage(work: Path, manifest: Manifest) -> None:
    """Compare what the metadata refers to with the files that were written.

    Raises:
        OSError: When a file is missing or too short.
    """
    for entry in (open_reader(work).read_metadata().storage_data or {}).values():
        facts = manifest.files.get(entry.relative_path)
        if facts is None or facts.bytes < entry.offset + entry.length:
            raise OSError(f"{entry.relative_path}: not as long as its metadata says; the disk lost a write.")
