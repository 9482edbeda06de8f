"""The content store: precomputed vectors by item id, memory-mapped, one immutable generation per encoder.

A generation is a folder `content/<modality>/<generation>/` with a `manifest.json` and segments in safetensors. Rows
keep their number for ever: new items append a segment (`append_content`), so whoever pinned an earlier
checksum still opens exactly the rows it saw. Training rows never hold vectors; they hold row numbers of this store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from mufasa_rec.data import paths
from mufasa_rec.data.content_manifest import ContentManifest, generation_folder, require_same
from mufasa_rec.data.content_segment import MappedSegment, sha256_of


class ContentStore:
    """The vectors of one generation, memory-mapped: opening reads headers only.

    Example:
        >>> import tempfile
        >>> from mufasa_rec.data.content import write_content
        >>> folder = tempfile.mkdtemp()
        >>> vectors = np.eye(3, 4, dtype=np.float32)
        >>> _ = write_content(folder, "title", np.array([30, 10, 20]), vectors, encoder="demo", encoder_version="1")
        >>> store = ContentStore.open(folder, "title", "1")
        >>> store.rows_of(np.array([10, 99, 30]))
        array([ 1, -1,  0])
    """

    def __init__(self, folder: str, manifest: ContentManifest, segments: Sequence[MappedSegment]) -> None:
        self.manifest = manifest
        self.name, self.generation = manifest.name, manifest.generation
        self.width = manifest.width
        self._folder, self._segments = folder, tuple(segments)
        self._starts = np.cumsum([0, *(segment.rows for segment in segments)])
        self.rows = int(self._starts[-1])

    @classmethod
    def open(cls, dataset_url: str | Path, name: str, generation: str, *, checksum: str | None = None) -> ContentStore:
        """Maps a generation, as a whole or as it was when ``checksum`` was pinned.

        Args:
            dataset_url: The data set, a folder or URL; a remote segment is copied to the local cache once.
            name: The modality.
            generation: The generation.
            checksum: The pinned checksum; segments appended since are left out. None takes all of them.

        Returns:
            The store.

        Raises:
            ValueError: Something is missing, malformed, or not what was pinned.
        """
        folder = generation_folder(dataset_url, name, generation)
        manifest = ContentManifest.load(folder)
        require_same(name, {"name": name, "generation": generation}, asdict(manifest))
        count = len(manifest.segments)
        if checksum is not None:
            if checksum not in manifest.checksums:
                raise ValueError(
                    f"modality `{name}`: generation {generation!r} has checksum {manifest.checksum}, pinned is "
                    f"{checksum}; its vectors were replaced: restore them, or prepare and train again"
                )
            count = manifest.checksums.index(checksum) + 1
        segments = [MappedSegment(folder, segment, manifest) for segment in manifest.segments[:count]]
        return cls(folder, manifest, segments)

    @property
    def ids(self) -> np.ndarray:
        """Raw ids in the order of the rows, int64 `[rows]`; a memory map when there is one segment."""
        parts = [segment.ids for segment in self._segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows of raw ids, by binary search in each segment's sorted index.

        Args:
            ids: Raw item ids, int64 `[k]`.

        Returns:
            Rows, int64 `[k]`; -1 for an id that has no vector here. The index is mapped: a search reads its pages.
        """
        rows = np.full(len(ids), -1, np.int64)
        for start, segment in zip(self._starts, self._segments, strict=False):
            found = np.minimum(np.searchsorted(segment.sorted_ids, ids), segment.rows - 1)
            hit = segment.sorted_ids[found] == ids
            rows[hit] = start + segment.sorted_rows[found[hit]]
        return rows

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Contiguous rows as a sharded table wants them.

        Args:
            start: First row.
            stop: Row after the last.

        Returns:
            Vectors, float16 `[stop - start, P]`. Inside one fp16 segment they are a view of the memory map, read from
            disk as they are touched; writing to them never reaches the file.
        """
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows [{start}, {stop}) of `{self.name}`: the store has {self.rows} rows; stay inside")
        parts = []
        for first, segment in zip(self._starts, self._segments, strict=False):
            low, high = max(start - first, 0), min(stop - first, segment.rows)
            if low < high:
                parts.append(segment.half(int(low), int(high)))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, self.width, dtype=torch.float16)

    def copied(self, start: int, stop: int) -> np.ndarray:
        """Contiguous rows for those who go through a whole store: memory holds what is returned and nothing else.

        Args:
            start: First row.
            stop: Row after the last.

        Returns:
            Vectors, float32 `[stop - start, P]`.
        """
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows [{start}, {stop}) of `{self.name}`: the store has {self.rows} rows; stay inside")
        parts = [np.empty((0, self.width), np.float32)]
        for first, segment in zip(self._starts, self._segments, strict=False):
            low, high = max(start - first, 0), min(stop - first, segment.rows)
            if low < high:
                parts.append(segment.copied(int(low), int(high)))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows.

        Args:
            rows: Rows as `rows_of` gives them, int64 `[k]`; -1 is a missing vector.

        Returns:
            Vectors, float32 `[k, P]`; zeros where the row is -1.
        """
        vectors = np.zeros((len(rows), self.width), np.float32)
        for start, segment, inside in self._parts_of(rows):
            vectors[inside] = segment.gather(rows[inside] - start)
        return vectors

    def halves(self, rows: np.ndarray) -> torch.Tensor:
        """Vectors of some rows as a table would hold them.

        Args:
            rows: As for `gather`.

        Returns:
            Vectors, float16 `[k, P]`, bit for bit those of `read`; zeros where the row is -1.
        """
        vectors = torch.zeros(len(rows), self.width, dtype=torch.float16)
        for start, segment, inside in self._parts_of(rows):
            if len(inside) == len(rows):
                return segment.halves(rows - start)
            vectors[torch.from_numpy(inside)] = segment.halves(rows[inside] - start)
        return vectors

    def _parts_of(self, rows: np.ndarray) -> Iterator[tuple[int, MappedSegment, np.ndarray]]:
        """Segments with their first rows, and which of `rows` each holds."""
        if rows.size and (rows.min() < -1 or rows.max() >= self.rows):
            raise ValueError(f"rows {rows.min()} to {rows.max()} of `{self.name}`: give -1 or 0 to {self.rows - 1}")
        for start, segment in zip(self._starts, self._segments, strict=False):
            yield int(start), segment, np.flatnonzero((rows >= start) & (rows < start + segment.rows))

    def verify(self) -> None:
        """Reads every segment once and compares its SHA-256.

        Raises:
            ValueError: A segment's bytes are not those that were written; the file is named.
        """
        for segment in self.manifest.segments[: len(self._segments)]:
            found = sha256_of(paths.local_copy(paths.join(self._folder, segment.file)))
            if found != segment.sha256:
                raise ValueError(
                    f"content file {self.name}/{self.generation}/{segment.file}: sha256 is {found}, the manifest says "
                    f"{segment.sha256}; the file is damaged: restore it or write the generation again"
                )


def coverage(
    store: ContentStore, item_ids: np.ndarray, training_events: np.ndarray, test_targets: np.ndarray | None = None
) -> dict[str, float]:
    """Shares of items, of training events and of test targets that have no vector.

    Args:
        store: The modality.
        item_ids: Ids of all items, int64 `[n]`.
        training_events: Training events of each item, `[n]`.
        test_targets: Test targets of each item, `[n]`; None leaves them out.

    Returns:
        `missing_items`, `missing_training_events` and `missing_test_targets`, each from 0 to 1.
    """
    missing = store.rows_of(item_ids) < 0
    counts = {"items": np.ones(len(item_ids), np.int64), "training_events": training_events}
    if test_targets is not None:
        counts["test_targets"] = test_targets
    return {f"missing_{what}": float(count[missing].sum() / max(count.sum(), 1)) for what, count in counts.items()}


def coverage_lines(name: str, shares: dict[str, float]) -> list[str]:
    """The coverage as sentences for a report.

    Example:
        >>> coverage_lines("poster", {"missing_training_events": 0.0312})
        ['3.1 % of training events have no `poster` vector']
    """
    return [
        f"{100 * share:.1f} % of {what.removeprefix('missing_').replace('_', ' ')} have no `{name}` vector"
        for what, share in shares.items()
    ]
