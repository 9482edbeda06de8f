"""Readers of torch distributed checkpoints that do not trust their metadata.

Torch reads `.metadata` with plain `pickle`, which runs whatever the file says. Here an unpickler knows the few classes
that the metadata of a checkpoint of tensors holds, and no other. The tensors themselves are read by torch's own
`weights_only` loader. Still, a resume folder must be one's own: what comes from others comes as an export.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from mufasa_rec.data import paths

METADATA_FILE = ".metadata"
_OWN = "read only checkpoints of your own runs; take an export of someone else's"
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",  # known, so that it can be refused by the name of its entry
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_PATHS = {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}


class _Unpickler(pickle.Unpickler):
    """Finds the classes of the metadata of a checkpoint of tensors, and nothing else."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return _path
        if (module, name) not in _CLASSES:
            raise ValueError(
                f"{self._name}: asks for {module}.{name}, which no checkpoint of tensors holds; nothing of it was run. "
                f"Remove the folder, and {_OWN}."
            )
        return super().find_class(module, name)


def _path(*parts: str) -> str:
    """Where the checkpoint was written, for which torch stores a path: text is enough."""
    return "/".join(parts)


def read_metadata(file: paths.Location) -> Metadata:
    """Read the metadata of a checkpoint with the allow-list.

    Raises:
        ValueError: When it is damaged, asks for another class, holds something else than tensors, or points at files
            outside of its folder.
    """
    try:
        with paths.open_file(file) as handle:
            metadata = _Unpickler(handle, str(file)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file}: not the metadata of a checkpoint ({error!r}); use another checkpoint.") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"{file}: holds {type(metadata).__name__}, not a checkpoint's metadata; use another one.")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(
                f"{file}: entry {name!r} is no tensor but bytes, which torch would unpickle; nothing of it was run. "
                f"Remove the folder, and {_OWN}."
            )
    for place in (metadata.storage_data or {}).values():
        name = str(getattr(place, "relative_path", ""))
        if not name or name.startswith(".") or set(name) & set("/\\:"):
            raise ValueError(f"{file}: points at the file {name!r}, not at one of its folder; {_OWN}.")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


class _SafeMetadata:
    """What both readers do otherwise than torch's."""

    folder: str

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata with the allow-list."""
        rank = kwargs.get("rank")
        name = METADATA_FILE if rank is None else f"__{rank}{METADATA_FILE}"
        metadata = read_metadata(paths.join(self.folder, name))
        metadata.storage_meta.load_id = getattr(self, "load_id", None)  # type: ignore[union-attr]
        return metadata


class SafeReader(_SafeMetadata, FileSystemReader):
    """Torch's reader of a local folder, its metadata read with the allow-list."""

    def __init__(self, folder: paths.Location) -> None:
        super().__init__(paths.local_path(folder))
        self.folder = str(paths.local_path(folder))


class SafeRemoteReader(_SafeMetadata, FsspecReader):
    """Torch's reader of a URL, its metadata read with the allow-list."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.folder = url


def open_reader(folder: paths.Location) -> StorageReader:
    """A reader of a checkpoint folder for `torch.distributed.checkpoint.load(state, storage_reader=...)`."""
    return SafeRemoteReader(str(folder)) if paths.is_remote(folder) else SafeReader(folder)
