"""Writes the content store: a new generation of a modality, or one more segment of an existing one.

Vectors pass through in chunks, so memory holds the ids and one chunk whatever the file's size. What the store promises
its readers is checked here once: finite vectors that are not zero, unique ids, one width, one form.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from mufasa_rec.data import paths
from mufasa_rec.data.content_manifest import (
    MANIFEST,
    ContentManifest,
    generation_folder,
    generations,
    require_same,
    segment_file,
)
from mufasa_rec.data.content_segment import DTYPES, SegmentWriter, refuse
from mufasa_rec.data.content_store import ContentStore
from mufasa_rec.data.vectors import VectorSource

_CHUNK_BYTES = 1 << 24
_SHOWN_IDS = 5


def write_content(  # noqa: PLR0913  one flat call, as a script would make it
    dataset_folder: str | Path,
    name: str,
    ids: np.ndarray,
    vectors: VectorSource,
    *,
    encoder: str,
    encoder_version: str,
    dtype: str = "float16",
    normalise: bool = True,
    split: dict[str, str] | None = None,
    generation: str | None = None,
    item_ids: np.ndarray | None = None,
) -> ContentManifest:
    """Writes a new generation of a modality; it appears complete or not at all.

    Args:
        dataset_folder: The data set, a folder or URL.
        name: The modality, a plain word such as `title`.
        ids: Raw item ids, int64 `[n]`.
        vectors: Vectors, floating point `[n, P]`; anything that can be sliced by rows, as `read_vectors` returns it.
        encoder: Name of the program or model that made the vectors.
        encoder_version: Its version.
        dtype: Form on disk, `float16`, or `int8` with one float32 scale a row.
        normalise: Scale each vector to length 1.
        split: Id and hash of the split, for vectors that were learned from events.
        generation: Name of the new generation; None takes the next number.
        item_ids: Known item ids; vectors of other ids are dropped and counted in `dropped_unknown`. None keeps all.

    Returns:
        The manifest; its `generation`, `rows` and `checksum` are what a data set pins.

    Raises:
        ValueError: The vectors or their ids are not fit to be stored, or the generation exists.
    """
    if dtype not in DTYPES:
        raise ValueError(f"modality `{name}`: dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    generation = generation or str(len(generations(dataset_folder, name)) + 1)
    folder = generation_folder(dataset_folder, name, generation)
    if paths.exists(folder):
        raise ValueError(f"modality `{name}`: generation {generation!r} exists and never changes; give another name")
    form = SegmentWriter(name=name, dtype=dtype, normalise=normalise)
    ids, keep = _checked_ids(name, ids, vectors, item_ids)
    source, width = hashlib.sha256(ids.data), int(vectors.shape[1])
    with paths.atomic_folder(folder) as temporary:
        segment = form.write(temporary / segment_file(0), 0, ids, _chunks(vectors, keep, source), width)
        manifest = ContentManifest(
            name=name,
            generation=generation,
            encoder=encoder,
            encoder_version=encoder_version,
            width=width,
            dtype=dtype,
            normalisation="l2" if normalise else "none",
            source_hash=source.hexdigest(),
            split=split,
            segments=(segment,),
            rows=segment.rows,
            dropped_unknown=int((~keep).sum()),
        )
        (temporary / MANIFEST).write_text(manifest.to_json())
    return manifest


def append_content(
    dataset_folder: str | Path,
    name: str,
    ids: np.ndarray,
    vectors: VectorSource,
    *,
    encoder: str,
    encoder_version: str,
    generation: str | None = None,
    item_ids: np.ndarray | None = None,
) -> ContentManifest:
    """Appends the vectors of new items to a generation, in its own dtype and normalisation.

    Rows that were there keep their numbers and files; readers see the new segment when the manifest is swapped, at
    once and whole. Of two local writers the second waits; on an object store there must be one writer.

    Args:
        dataset_folder: The data set, a folder or URL.
        name: The modality.
        ids: Raw ids of items that the generation does not hold yet, int64 `[n]`.
        vectors: Vectors by the same encoder, floating point `[n, P]`.
        encoder: Name of the encoder; another than the generation's is refused.
        encoder_version: Its version, likewise.
        generation: The generation; None takes the newest.
        item_ids: Known item ids; vectors of other ids are dropped. None keeps all.

    Returns:
        The new manifest.

    Raises:
        ValueError: Width or encoder changed, an id is there already, or the vectors are not fit to be stored.
    """
    existing = generations(dataset_folder, name)
    if generation is None and not existing:
        raise ValueError(f"modality `{name}`: no generation to append to; write one first")
    generation = generation or existing[-1]
    folder = generation_folder(dataset_folder, name, generation)
    with _one_writer(folder):
        store = ContentStore.open(dataset_folder, name, generation)
        old = store.manifest
        found = {"encoder": encoder, "encoder_version": encoder_version, "width": int(vectors.shape[1])}
        require_same(name, {key: getattr(old, key) for key in found}, found)
        ids, keep = _checked_ids(name, ids, vectors, item_ids)
        refuse(
            name,
            "already in the generation, which never changes a vector",
            ids,
            store.rows_of(ids) >= 0,
            "leave them out, or write a new generation",
        )
        form = SegmentWriter(name=name, dtype=old.dtype, normalise=old.normalisation == "l2")
        number, source = len(old.segments), hashlib.sha256(old.source_hash.encode())
        source.update(ids.data)
        with paths.atomic_write(paths.join(folder, segment_file(number))) as temporary:
            segment = form.write(temporary, number, ids, _chunks(vectors, keep, source), old.width)
        manifest = replace(
            old,
            source_hash=source.hexdigest(),
            segments=(*old.segments, segment),
            rows=old.rows + segment.rows,
            dropped_unknown=old.dropped_unknown + int((~keep).sum()),
        )
        with paths.atomic_write(paths.join(folder, MANIFEST)) as temporary:
            temporary.write_text(manifest.to_json())
    return manifest


@contextmanager
def _one_writer(folder: str) -> Iterator[None]:
    """Lets local writers of one generation append one after another."""
    if paths.is_remote(folder) or not paths.exists(folder):
        yield
        return
    handle = os.open(paths.local_path(folder), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _checked_ids(
    name: str, ids: np.ndarray, vectors: VectorSource, item_ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids to store and a mask over the given ones, after the checks that need no vector."""
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise ValueError(f"modality `{name}`: ids are {ids.dtype} of shape {ids.shape}; give int64 [n], strings hashed")
    if len(vectors.shape) != 2 or vectors.shape[0] != len(ids) or vectors.shape[1] == 0:
        raise ValueError(
            f"modality `{name}`: vectors have shape {tuple(vectors.shape)} for {len(ids)} ids; give [n, P]"
        )
    values, counts = np.unique(ids, return_counts=True)
    refuse(name, "listed more than once", values, counts > 1, "keep one vector for each id")
    keep = np.ones(len(ids), bool) if item_ids is None else np.isin(ids, item_ids)
    if not keep.any():
        raise ValueError(
            f"modality `{name}`: none of its {len(ids):,} ids is an item (first: {ids[:_SHOWN_IDS].tolist()}); "
            "give raw item ids of the same type as in the events, integers or strings"
        )
    return ids[keep], keep


def _chunks(vectors: VectorSource, keep: np.ndarray, source: hashlib._Hash) -> Iterator[np.ndarray]:
    """The kept vectors in pieces of bounded size; their bytes go into the source's hash on the way."""
    rows = max(1, _CHUNK_BYTES // (8 * vectors.shape[1]))
    for start in range(0, len(keep), rows):
        chunk = np.ascontiguousarray(np.asarray(vectors[start : start + rows])[keep[start : start + rows]])
        source.update(chunk.data)
        if len(chunk):
            yield chunk
