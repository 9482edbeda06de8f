"""Paths and URLs: every file of a data set is opened, joined and written through here.

A location is a local path or any URL that fsspec knows (``s3://``, ``gs://``, ``memory://``). Readers that need a
real file (memory maps) ask for a ``local_copy``; writers get a temporary local path that takes its final name only
when it is complete, so a crash or a full disk never leaves half a file under a good name.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

Location = str | os.PathLike[str]


def is_remote(url: Location) -> bool:
    """True for a URL with a scheme other than ``file``."""
    text = os.fspath(url)
    return "://" in text and not text.startswith("file://")


def local_path(url: Location) -> Path:
    """The local path of a location that is not remote (``file://`` is stripped)."""
    return Path(os.fspath(url).removeprefix("file://"))


def join(url: Location, *parts: str) -> str:
    """Joins path parts with ``/``, for local paths and URLs alike.

    Example:
        >>> join("s3://bucket/set/", "splits", "time")
        's3://bucket/set/splits/time'
    """
    return "/".join([os.fspath(url).rstrip("/") or "/", *(part.strip("/") for part in parts)])


def exists(url: Location) -> bool:
    """True when a file or folder is there."""
    if not is_remote(url):
        return local_path(url).exists()
    filesystem, path = url_to_fs(os.fspath(url))
    return bool(filesystem.exists(path))


def open_file(url: Location, mode: str = "rb") -> IO[Any]:
    """Opens a local path or URL.

    Raises:
        ValueError: The file is asked for reading and is not there.
    """
    try:
        if not is_remote(url):
            return open(local_path(url), mode)
        filesystem, path = url_to_fs(os.fspath(url))
        return filesystem.open(path, mode)
    except FileNotFoundError as error:
        raise ValueError(f"{os.fspath(url)}: no such file; check the path, or prepare the data set again") from error


def list_files(folder: Location, suffix: str = "") -> list[str]:
    """Sorted locations of the files in ``folder`` whose names end in ``suffix``; empty if there is no folder."""
    if not is_remote(folder):
        root = local_path(folder)
        if not root.is_dir():
            return []
        return sorted(str(path) for path in root.iterdir() if path.is_file() and path.name.endswith(suffix))
    filesystem, path = url_to_fs(os.fspath(folder))
    if not filesystem.exists(path):
        return []
    found = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] == "file"]
    return sorted(filesystem.unstrip_protocol(name) for name in found if name.endswith(suffix))


def list_folders(folder: Location) -> list[str]:
    """Sorted names of the folders in ``folder``; empty if there is no such folder."""
    if not is_remote(folder):
        root = local_path(folder)
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    filesystem, path = url_to_fs(os.fspath(folder))
    filesystem.invalidate_cache()  # another process may have written since
    if not filesystem.exists(path):
        return []
    found = [entry["name"] for entry in filesystem.ls(path, detail=True) if entry["type"] == "directory"]
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def remove_folder(folder: Location) -> None:
    """Removes a folder with all that it holds; nothing happens if it is not there."""
    if not is_remote(folder):
        shutil.rmtree(local_path(folder), ignore_errors=True)
        return
    filesystem, path = url_to_fs(os.fspath(folder))
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def remove_file(file: Location) -> None:
    """Removes a file; nothing happens if it is not there."""
    if not is_remote(file):
        local_path(file).unlink(missing_ok=True)
        return
    filesystem, path = url_to_fs(os.fspath(file))
    if filesystem.exists(path):
        filesystem.rm_file(path)


def rename_folder(folder: Location, name: str) -> str:
    """Gives a folder another name beside the old one, by one rename when local, file by file when remote.

    Returns:
        The new location.
    """
    text = os.fspath(folder).rstrip("/")
    target = f"{text.rpartition('/')[0]}/{name}" if "/" in text else name
    if not is_remote(folder):
        os.rename(local_path(folder), local_path(target))
        return target
    filesystem, path = url_to_fs(text)
    filesystem.mv(path, url_to_fs(target)[1], recursive=True)
    return target


def try_to_write(folder: Location) -> None:
    """Finds out whether files can be written into a folder that need not be there yet; leaves nothing behind.

    Raises:
        OSError: They cannot, or a name on the way is no folder; names the place. Of a URL, whatever its client raises.
    """
    if is_remote(folder):
        probe = join(folder, f".probe-{os.getpid()}")
        with atomic_write(probe) as file:
            file.write_text("")
        remove_file(probe)
        return
    there = local_path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:  # a look at permissions would lie to root, and on a network's file system
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = error.strerror if there.is_dir() else "no folder"
        raise OSError(error.errno, f"cannot be written, {there}: {reason}") from error


def put_file(file: Path, url: Location) -> None:
    """Copies a local file to a URL.

    Raises:
        OSError: The copy does not have the file's size.
    """
    filesystem, path = url_to_fs(os.fspath(url))
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.put_file(str(file), path)
    arrived, sent = filesystem.size(path), file.stat().st_size
    if arrived != sent:
        raise OSError(errno.EIO, f"{os.fspath(url)}: {arrived:,} bytes arrived, {sent:,} were sent")


def local_copy(url: Location) -> Path:
    """A local file with the content of ``url``: itself when local, else a copy in fsspec's file cache.

    Copies lie in a per-user folder of the system's temporary folder; a changed remote file
    is copied again.
    """
    if not is_remote(url):
        path = local_path(url)
        if not path.exists():
            raise ValueError(f"{path}: no such file; check the path, or prepare the data set again")
        return path
    cache = os.path.join(tempfile.gettempdir(), f"mufasa-rec-cache-{os.getuid()}")
    options = {"filecache": {"cache_storage": cache, "check_files": True}}
    found = fsspec.open_local(f"filecache::{os.fspath(url)}", mode="rb", **options)
    return Path(found if isinstance(found, str) else found[0])


@contextmanager
def atomic_write(url: Location) -> Iterator[Path]:
    """Yields a temporary local path; what is written there becomes ``url`` when the block ends without an error.

    Args:
        url: Final location; its parent folder is made when missing.

    Raises:
        OSError: The disk is full; names the file, its size so far and the remedy. Nothing is left under the final name.
    """
    if is_remote(url):
        with tempfile.TemporaryDirectory(prefix="mufasa-rec-") as folder:
            path = Path(folder) / "file"
            yield path
            filesystem, target = url_to_fs(os.fspath(url))
            filesystem.makedirs(os.path.dirname(target), exist_ok=True)
            filesystem.put_file(str(path), target)
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with explained_disk_errors(path, target):
            yield path
            os.replace(path, target)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(url: Location, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside ``url`` that takes its name when the block ends without an error.

    Args:
        url: Final location.
        overwrite: Replace what is there; the old folder is removed only after the new one has its name.

    Raises:
        ValueError: Something is already there and ``overwrite`` is not set.
        OSError: The disk is full; names the folder, the bytes written and the remedy.
    """
    if exists(url) and not overwrite:
        raise ValueError(f"{os.fspath(url)}: already exists; choose another folder or overwrite it")
    target = None if is_remote(url) else local_path(url).absolute()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    prefix = "mufasa-rec-" if target is None else f".{target.name}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=None if target is None else target.parent))
    folder.chmod(0o755)
    try:
        with explained_disk_errors(folder, url):
            yield folder
            _publish(folder, url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, url: Location) -> None:
    """Moves a finished folder to its place: by rename when local, manifest last when remote."""
    if is_remote(url):
        filesystem, target = url_to_fs(os.fspath(url))
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name.endswith(".json")):
            place = f"{target}/{path.relative_to(folder).as_posix()}"
            filesystem.makedirs(os.path.dirname(place), exist_ok=True)
            filesystem.put_file(str(path), place)
        return
    target = local_path(url).absolute()
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.rename(target, old)
    os.rename(folder, target)
    if old is not None:
        shutil.rmtree(old)


@contextmanager
def explained_disk_errors(written: Path, target: Location) -> Iterator[None]:
    """Turns "no space left" (and quota) errors into one that names the target, the bytes written and the remedy."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        files = written.rglob("*") if written.is_dir() else [written]
        size = sum(path.stat().st_size for path in files if path.is_file())
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {size:,} bytes were written for {os.fspath(target)} and removed again; "
            "free space or choose a folder on another disk; nothing that was there before was changed",
        ) from error


def _is_full(error: Exception) -> bool:
    """Whether an error says that the disk or a quota is full; safetensors says it in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
