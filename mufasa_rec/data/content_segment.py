"""One segment of the content store: a safetensors file of vectors, ids and their sorted index.

Tensors: `id` int64 `[n]` in the order of the rows; `sorted_id` and `sorted_row` int64 `[n]`, the index for binary
search; `vector` `[n, P]`, float16, or int8 with `scale` float32 `[n]` (a vector is int8 x scale).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mufasa_rec.data import paths
from mufasa_rec.data.content_manifest import ContentManifest, Segment, segment_file

DTYPES = ("float16", "int8")
_HASH_BYTES = 1 << 22
_SHOWN_IDS = 5
_FAULTS = {
    1: ("NaN or infinite", "repair the encoder's output, or leave these items out: an absent id means no vector"),
    2: ("zero vectors", "leave these items out: an absent id means no vector"),
    3: ("outside the range of float16", "rescale the vectors, or store them normalised"),
}


def refuse(name: str, what: str, ids: np.ndarray, wrong: np.ndarray, remedy: str) -> None:
    """Raises when ids are wrong, with their number and the first of them."""
    if wrong.any():
        count, first = int(wrong.sum()), ids[wrong][:_SHOWN_IDS].tolist()
        verb = "is" if count == 1 else "are"
        raise ValueError(f"modality `{name}`: {count:,} of {len(ids):,} ids {verb} {what} (first: {first}); {remedy}")


@dataclass(frozen=True, kw_only=True)
class SegmentWriter:
    """How the vectors of a modality are stored, and the checks on the way there."""

    name: str
    dtype: str
    normalise: bool

    def write(self, path: Path, number: int, ids: np.ndarray, chunks: Iterator[np.ndarray], width: int) -> Segment:
        """Writes one segment as safetensors: ids, their sorted index, scales, vectors.

        The file is laid out by hand because the library's writer wants all tensors in memory.
        """
        order = np.argsort(ids, kind="stable")
        index = {"id": ids, "sorted_id": ids[order], "sorted_row": order.astype(np.int64)}
        scales = np.empty(len(ids) if self.dtype == "int8" else 0, np.float32)
        faults = np.zeros(len(ids), np.uint8)
        row = 0
        with path.open("wb") as file:
            file.write(_header(len(ids), width, self.dtype))
            for array in index.values():
                file.write(np.ascontiguousarray(array).data)
            scales_at = file.tell()
            file.seek(scales.nbytes, os.SEEK_CUR)
            for chunk in chunks:
                rows = slice(row, row + len(chunk))
                stored, scale, faults[rows] = self._convert(chunk)
                file.write(np.ascontiguousarray(stored).data)
                if scales.size:
                    scales[rows] = scale
                row += len(chunk)
            file.seek(scales_at)
            file.write(scales.data)
            file.flush()
            os.fsync(file.fileno())
        for code, (what, remedy) in _FAULTS.items():
            refuse(self.name, what, ids, faults == code, remedy)
        return Segment(file=segment_file(number), rows=len(ids), sha256=sha256_of(path))

    def _convert(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A chunk in its stored form, a scale per row (int8) and a fault code per row, 0 where all is well."""
        if chunk.dtype.kind != "f":
            raise ValueError(f"modality `{self.name}`: vectors are {chunk.dtype}; give float16, float32 or float64")
        with np.errstate(all="ignore"):
            vectors = chunk.astype(np.float32)
            peak = np.abs(vectors).max(1, keepdims=True)
            if self.normalise:
                vectors /= peak  # before squaring, so that no float32 overflows
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            half = vectors.astype(np.float16)
            lost = ~np.isfinite(half).all(1) | ~half.any(1)
            faults = np.select([~np.isfinite(peak[:, 0]), peak[:, 0] == 0, lost], [1, 2, 3]).astype(np.uint8)
            if self.dtype == "float16":
                return half, peak[:, 0], faults
            scale = np.abs(vectors).max(1, keepdims=True) / np.float32(127)
            return np.rint(vectors / scale).astype(np.int8), scale[:, 0], faults


def _header(rows: int, width: int, dtype: str) -> bytes:
    """The safetensors header of a segment, padded so that every tensor is aligned."""
    tensors: dict[str, tuple[str, list[int], int]] = {
        key: ("I64", [rows], 8 * rows) for key in ("id", "sorted_id", "sorted_row")
    }
    if dtype == "int8":
        tensors["scale"] = ("F32", [rows], 4 * rows)
        tensors["vector"] = ("I8", [rows, width], rows * width)
    else:
        tensors["vector"] = ("F16", [rows, width], 2 * rows * width)
    entries, at = {}, 0
    for key, (kind, shape, size) in tensors.items():
        entries[key] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _vectors_at(file: Path) -> int:
    """Byte at which a segment's vectors begin."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        return 8 + size + json.loads(handle.read(size))["vector"]["data_offsets"][0]


class MappedSegment:
    """One segment's tensors, mapped without a copy."""

    def __init__(self, folder: str, segment: Segment, manifest: ContentManifest) -> None:
        where = f"content file {manifest.name}/{manifest.generation}/{segment.file}"
        rows, width = segment.rows, manifest.width
        expected = {"id": (rows,), "sorted_id": (rows,), "sorted_row": (rows,), "vector": (rows, width)}
        if manifest.dtype == "int8":
            expected["scale"] = (rows,)
        url = paths.join(folder, segment.file)
        if not paths.exists(url):
            raise ValueError(f"{where} is missing; restore it or write the generation again")
        try:
            with safe_open(paths.local_copy(url), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{where}: {error}; restore it or write the generation again") from error
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if shapes != expected or str(tensors["vector"].dtype) != f"torch.{manifest.dtype}":
            raise ValueError(
                f"{where}: holds {shapes}, the manifest asks for {expected} in {manifest.dtype}; write it again"
            )
        self.rows = rows
        self.ids, self.sorted_ids = tensors["id"].numpy(), tensors["sorted_id"].numpy()
        self.sorted_rows = tensors["sorted_row"].numpy()
        self._vectors, self._scales = tensors["vector"], tensors.get("scale")
        self._file = paths.local_copy(url)
        self._start = _vectors_at(self._file)

    def half(self, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` in float16; int8 is scaled in float32 first."""
        vectors = self._vectors[start:stop]
        if self._scales is None:
            return vectors
        return (vectors.float() * self._scales[start:stop, None]).half()

    def copied(self, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` in float32, read from the file: pages of the map that were touched stay in memory."""
        width, size = self._vectors.shape[1], self._vectors.element_size()
        dtype = np.float16 if self._scales is None else np.int8
        at = self._start + start * width * size
        stored = np.fromfile(self._file, dtype, (stop - start) * width, offset=at).reshape(-1, width)
        vectors = torch.from_numpy(stored).float().numpy()  # several times as fast as numpy's own
        if self._scales is not None:
            vectors *= self._scales.numpy()[start:stop, None]
        return vectors

    def halves(self, rows: np.ndarray) -> torch.Tensor:
        """Some rows in float16, as `half` gives them."""
        index = torch.from_numpy(rows)
        vectors = self._vectors.index_select(0, index)
        if self._scales is None:
            return vectors
        return (vectors.float() * self._scales.index_select(0, index)[:, None]).half()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Some rows in float32."""
        vectors = self._vectors.numpy()[rows].astype(np.float32)
        if self._scales is not None:
            vectors *= self._scales.numpy()[rows, None]
        return vectors


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
