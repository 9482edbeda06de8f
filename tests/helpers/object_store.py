"""A stand-in for an object store: `bucket:///folder/key`, files in a local folder, no rename and no empty folders."""

from __future__ import annotations

import os
import shutil
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class BucketFileSystem(LocalFileSystem):
    """Local files under another protocol; what an object store cannot do raises."""

    protocol = ("bucket",)
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        text = os.fspath(path).removeprefix("bucket://")
        return text.rstrip("/") or "/"

    def unstrip_protocol(self, name: str) -> str:
        return f"bucket://{self._strip_protocol(name)}"

    def mv(self, path1: str, path2: str, recursive: bool = False, **_: Any) -> None:
        assert recursive
        shutil.copytree(self._strip_protocol(path1), self._strip_protocol(path2))
        shutil.rmtree(self._strip_protocol(path1))

    def mv_file(self, path1: str, path2: str, **_: Any) -> None:
        raise NotImplementedError("object stores have no rename")

    rename = mv_file


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
