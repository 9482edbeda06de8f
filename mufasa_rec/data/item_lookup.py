"""All about items that a batch needs, resolved to item-store rows once: embedding keys, content rows, availability.

Training rows keep raw ids. Here is the one place where a raw id becomes an item row, and an item row an embedding key.
What is known of every item stays in mapped files or is worked out for the items that are asked for: `docs/content.md`
says what is left in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mufasa_rec.data import paths
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.id_keys import HashedKeys, RawKeys
from mufasa_rec.data.item_columns import ItemColumn
from mufasa_rec.data.items import ALWAYS_FROM, ItemStore
from mufasa_rec.data.schema import DatasetManifest, SplitManifest, SplitRef

VOCABULARY_FILE = "vocabulary.safetensors"
_DIRECT_TABLE_LIMIT = 1 << 24  # ids up to here are looked up in a table of at most 64 MiB instead of by binary search
_CHUNK_ITEMS = 1 << 20  # items whose availability is worked out at once


@dataclass(frozen=True)
class ItemVocabulary:
    """Embedding key of each item: key 0 is shared by all items that are too rare for a row of their own.

    Attributes:
        ids: Raw ids that have a key of their own, ascending, `[k]` int64.
        split: Split whose training events were counted, as `<id>@<hash>`.
        min_count: Training events that an item needs.
    """

    ids: np.ndarray
    split: str
    min_count: int

    @property
    def size(self) -> int:
        """Rows of the embedding table, the shared row included."""
        return len(self.ids) + 1

    def keys_of(self, ids: np.ndarray) -> np.ndarray:
        """Embedding keys `[n]` of raw ids `[n]`; 0 for ids without one.

        Example:
            >>> ItemVocabulary(np.array([3, 7]), "loo@0", 5).keys_of(np.array([7, 4, 3])).tolist()
            [2, 0, 1]
        """
        if not len(self.ids):
            return np.zeros(len(ids), dtype=np.int64)
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, place + 1, 0)

    def save(self, folder: paths.Location) -> None:
        """Write `vocabulary.safetensors` into a run folder."""
        metadata = {"format_version": "1", "split": self.split, "min_count": str(self.min_count)}
        with paths.atomic_write(paths.join(folder, VOCABULARY_FILE)) as path:
            save_file({"id": np.ascontiguousarray(self.ids)}, path, metadata=metadata)

    @classmethod
    def load(cls, folder: paths.Location) -> ItemVocabulary:
        """Map the vocabulary of a run folder."""
        tensors, metadata = _load(paths.join(folder, VOCABULARY_FILE))
        return cls(tensors["id"], metadata["split"], int(metadata["min_count"]))


class ItemLookup:
    """Items of a data set as a run sees them.

    Args:
        dataset: Folder or URL of the data set.
        manifest: Its `dataset.json`.
        split: The split whose training events count.
        modalities: Content modalities to use; all when None.
        min_count: Training events that an item needs for an embedding of its own; ignored with a vocabulary.
        vocabulary: The vocabulary of an existing run; None makes one from the split's counts.
        carried: Modalities whose vectors travel with the batch.
        id_keys: What gives items their embedding keys in place of the vocabulary.

    Attributes:
        items: The item store.
        split: The split, as `<id>@<hash>`.
        counts: Training events of each item row, mapped.
        vocabulary: Which items have an embedding of their own.
        stores: The content store of each modality.
        keys: Embedding key of each item row.
        content_rows: Row of each item row in the store of each modality, -1 where it has none.
        carried: Modalities whose vectors travel with the batch.

    Raises:
        ValueError: For an unknown modality, or counts or a vocabulary that belong to another split.
    """

    keys_are_ids = False  # whether embedding keys are the raw ids, for a table that finds rows for them

    def __init__(
        self,
        dataset: paths.Location,
        manifest: DatasetManifest,
        split: SplitManifest,
        *,
        modalities: tuple[str, ...] | None = None,
        min_count: int = 1,
        vocabulary: ItemVocabulary | None = None,
        carried: tuple[str, ...] = (),
        id_keys: HashedKeys | RawKeys | None = None,
    ) -> None:
        self.items = ItemStore.open(dataset, manifest.items.generation)
        self.split = f"{split.id}@{split.hash}"
        self.counts = _read_counts(dataset, split, len(self.items))
        ids = np.asarray(self.items.ids)
        if vocabulary is None:
            own = self.counts >= max(min_count, 1)
            vocabulary = ItemVocabulary(ids if own.all() else ids[own], self.split, min_count)
        elif vocabulary.split != self.split:
            raise ValueError(
                f"vocabulary: made from split {vocabulary.split}, but this run uses {self.split}; "
                "use the split that the run was trained on, or train again."
            )
        self.vocabulary, self._border = vocabulary, split.borders.get("train_end")
        self.id_keys: ItemVocabulary | HashedKeys | RawKeys = id_keys or vocabulary
        self.keys_are_ids = isinstance(id_keys, RawKeys)
        self.stores = {name: _open_store(dataset, manifest, split, name) for name in _chosen(manifest, modalities)}
        self.carried = carried
        self.keys = ItemColumn(ids, self.id_keys.keys_of)
        self.content_rows = {name: ItemColumn(ids, store.rows_of) for name, store in self.stores.items()}
        self._direct = _direct_table(ids)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def available(self) -> np.ndarray:
        """Which items could have been chosen in training, `[items]` bool: only these may serve as negatives."""
        return np.concatenate([np.zeros(0, bool), *self._available()])

    @property
    def num_available(self) -> int:
        """How many those are."""
        return sum(int(part.sum()) for part in self._available())

    def _available(self) -> Iterator[np.ndarray]:
        """`available`, chunk by chunk.

        With a known release date: released by the last training event. Without one, an item that nobody chose may not
        have existed, and teaching the model that such items are never chosen would make cold items unreachable.
        """
        released = np.asarray(self.items.available_from)
        for start in range(0, len(self), _CHUNK_ITEMS):
            part = slice(start, start + _CHUNK_ITEMS)
            chosen = self.counts[part] > 0
            if self._border is not None:
                chosen |= (released[part] != ALWAYS_FROM) & (released[part] <= self._border)
            yield chosen

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Item rows `[n]` of raw ids `[n]`.

        Raises:
            ValueError: When an id is not in the item store.
        """
        if self._direct is None:
            rows = self.items.rows_of(ids)
        else:
            outside = (ids < 0) | (ids >= len(self._direct))
            rows = self._direct[np.where(outside, 0, ids)].astype(np.int64)
            if outside.any():
                rows[outside] = -1
        if len(rows) and rows.min() < 0:
            bad = np.unique(ids[rows < 0])
            raise ValueError(
                f"item: {len(bad)} ids of the events are not in the item store (such as {bad[:3].tolist()}); "
                "add them to the items and prepare again; `prepare --check` lists every such file."
            )
        return rows


def split_of(manifest: DatasetManifest, dataset: paths.Location, name: str) -> tuple[SplitRef, SplitManifest]:
    """A split's reference and manifest, refused when they do not belong together."""
    ref = manifest.split(name)
    split = SplitManifest.load(dataset, name)
    if ref.hash != split.hash:
        raise ValueError(
            f"splits/{name}: dataset.json pins hash {ref.hash}, split.json says {split.hash}; prepare the data set "
            "again."
        )
    return ref, split


def _load(file: paths.Location) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file, mapped as torch's loader does; NumPy's copies."""
    try:
        with safe_open(paths.local_copy(file), framework="pt") as handle:
            found = {name: handle.get_tensor(name).numpy() for name in list(handle.keys())}
            return found, dict(handle.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); write it again.") from error


def _read_counts(dataset: paths.Location, split: SplitManifest, num_items: int) -> np.ndarray:
    """Training events of each item row, `[items]`, refused when counted on another split."""
    file = paths.join(dataset, "splits", split.id, "item_counts.safetensors")
    tensors, metadata = _load(file)
    if metadata.get("split_hash") != split.hash:
        raise ValueError(
            f"{file}: counted on split {metadata.get('split')}@{metadata.get('split_hash')}, but the split here is "
            f"{split.id}@{split.hash}; prepare the data set again."
        )
    found = len(tensors.get("count", ()))
    if found != num_items:
        raise ValueError(f"{file}: {found} counts for {num_items} items; prepare the data set again.")
    return tensors["count"]


def _chosen(manifest: DatasetManifest, modalities: tuple[str, ...] | None) -> list[str]:
    if modalities is None:
        return sorted(manifest.content)
    for name in modalities:
        if name not in manifest.content:
            raise ValueError(
                f"data.modalities: {name!r} is not in data set {manifest.name!r}; there are {sorted(manifest.content)}."
            )
    return sorted(modalities)


def _open_store(dataset: paths.Location, manifest: DatasetManifest, split: SplitManifest, name: str) -> ContentStore:
    """A modality's store; vectors that were learned from events must have been learned from this split's."""
    ref = manifest.content[name]
    store = ContentStore.open(str(dataset), name, ref.generation, checksum=ref.checksum)
    learned = store.manifest.split
    if learned is not None and (learned.get("id"), learned.get("hash")) != (split.id, split.hash):
        raise ValueError(
            f"modality {name!r}: learned from split {learned.get('id')}@{learned.get('hash')}, but this run uses "
            f"{split.id}@{split.hash}: it may have seen events that the run is evaluated on; leave it out of "
            "data.modalities, or learn it from this split."
        )
    return store


def _direct_table(ids: np.ndarray) -> np.ndarray | None:
    """Item row by raw id, -1 where there is none, when ids are small enough that a table beats a binary search."""
    if not len(ids) or ids[0] < 0 or ids[-1] >= min(_DIRECT_TABLE_LIMIT, 64 * len(ids) + 1_000_000):
        return None
    table = np.full(int(ids[-1]) + 1, -1, dtype=np.int32)
    table[ids] = np.arange(len(ids), dtype=np.int32)
    return table
