"""Paths and URLs: atomic writes, readable errors, and object stores through fsspec's memory file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import fsspec
import pytest

from mufasa_rec.data import paths


def test_join_works_for_folders_and_urls() -> None:
    assert paths.join("/a/b/", "c", "d.json") == "/a/b/c/d.json"
    assert paths.join("s3://bucket/a", "c") == "s3://bucket/a/c"


def test_missing_file_names_itself_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no such file; check the path"):
        paths.open_file(tmp_path / "absent")


def test_atomic_write_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), paths.atomic_write(tmp_path / "file") as path:
        path.write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_full_disk_names_the_target_the_bytes_and_the_remedy(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "set"
    message = r"disk is full: 5 bytes were written for .*set.*free space"
    with pytest.raises(OSError, match=message) as caught, paths.atomic_folder(target) as folder:
        (folder / "data").write_text("12345")
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_refuses_what_is_there_and_replaces_it_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "set"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ValueError, match="already exists; choose another folder"), paths.atomic_folder(target):
        pass
    assert (target / "old").exists()
    with paths.atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_object_store_is_written_listed_and_copied() -> None:
    url = "memory://test_paths/set"
    with paths.atomic_folder(url) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.parquet").write_text("a")
        (folder / "dataset.json").write_text("{}")
    assert paths.exists(paths.join(url, "dataset.json"))
    assert [name.rsplit("/", 1)[1] for name in paths.list_files(paths.join(url, "sub"), ".parquet")] == ["a.parquet"]
    with paths.open_file(paths.join(url, "sub", "a.parquet")) as file:
        assert file.read() == b"a"
    assert paths.local_copy(paths.join(url, "sub", "a.parquet")).read_text() == "a"
    fsspec.filesystem("memory").rm("/test_paths", recursive=True)


@pytest.mark.parametrize("place", ["new/deep", "bucket"])
def test_look_at_whether_a_folder_can_be_written_leaves_nothing(place: str, tmp_path: Path) -> None:
    url = f"memory://probe-{os.getpid()}" if place == "bucket" else str(tmp_path / place)
    paths.try_to_write(url)
    assert not list(tmp_path.iterdir())
    assert paths.list_files(url) == []


def test_folder_below_a_file_or_in_a_closed_place_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written, .*/file: no folder"):
        paths.try_to_write(tmp_path / "file" / "a" / "b")
    with pytest.raises(OSError, match="cannot be written, /proc: "):
        paths.try_to_write("/proc/a")
