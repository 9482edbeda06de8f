"""The items of a data set: the items file and the items of the events, made one, sorted by id, categoricals coded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute

from mufasa_rec.data import paths, raw
from mufasa_rec.data.coding import Vocabulary, encode_item_column
from mufasa_rec.data.ids import hash_ids
from mufasa_rec.data.importers.values import flat, is_text
from mufasa_rec.data.items import ALWAYS_FROM, ALWAYS_TO, Categorical, write_item_store
from mufasa_rec.data.schema import Feature

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
logger = logging.getLogger(__name__)
UnknownItems = Literal["add", "drop", "refuse"]


@dataclass(kw_only=True)
class Catalog:
    """Every item, sorted by id.

    Attributes:
        ids: int64 `[n]`, strictly ascending.
        file_ids: Ids in the order of the items file, for vector files without ids; None without an items file.
        raw_ids: The source's strings `[n]`, or None for integer ids.
        titles: `[n]`, or None.
        available: ``available_from`` and ``available_to``, int64 `[n]`, where known.
        categoricals: Coded, row-aligned with ``ids``.
        vocabularies: By feature.
        added: Items of the events that the items file does not have.
        dropped: Rows of the items file that were dropped, by reason.
    """

    ids: np.ndarray
    file_ids: np.ndarray | None
    raw_ids: pa.Array | None
    titles: pa.Array | None
    available: dict[str, np.ndarray] = field(default_factory=dict)
    categoricals: dict[str, Categorical] = field(default_factory=dict)
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    added: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def features(self) -> dict[str, Feature]:
        """The features of items, as ``dataset.json`` names them."""
        return {
            name: Feature(
                level="item",
                kind="categorical",
                id_policy="vocabulary",
                id_type=_id_type(self.vocabularies[name]),
                multi_valued=column.offsets is not None,
                cardinality=column.cardinality,
            )
            for name, column in self.categoricals.items()
        }

    def write(self, folder: paths.Location, generation: str) -> str:
        """Writes item store and vocabularies; returns the store's checksum."""
        for vocabulary in self.vocabularies.values():
            vocabulary.save(folder)
        return write_item_store(
            folder,
            generation,
            ids=self.ids,
            raw_ids=self.raw_ids,
            titles=self.titles,
            categoricals=self.categoricals,
            available_from=self.available.get(raw.AVAILABLE_FROM),
            available_to=self.available.get(raw.AVAILABLE_TO),
        )


def _id_type(vocabulary: Vocabulary) -> Literal["int64", "string"]:
    return "string" if vocabulary.values and isinstance(vocabulary.values[0], str) else "int64"


def same_id_type(events: pa.Array, items: pa.Array | None) -> tuple[pa.Array, pa.Array | None]:
    """Item ids of events and items file in one type: text if either is text."""
    if items is None or is_text(events.type) == is_text(items.type):
        return events, items
    logger.info("item ids are text in one file and integers in the other: both are taken as text")
    return events.cast(pa.large_string()), items.cast(pa.large_string())


def numeric_ids(ids: pa.Array) -> np.ndarray:
    """Ids without nulls as int64: themselves, or hashes of strings."""
    return hash_ids(ids) if is_text(ids.type) else ids.to_numpy(zero_copy_only=False)


def build_catalog(items: pa.Table | None, event_items: pa.Array, unknown: UnknownItems) -> Catalog:
    """Unites the items file with the items that occur in events.

    Args:
        items: The items table of ``RawData``, or None: then the events say which items there are.
        event_items: Distinct item ids of the events, of the same type as the items table's.
        unknown: What to do with items of events that the items file lacks.

    Raises:
        ValueError: An id occurs twice in the items file, or unknown items are to be refused.
    """
    if items is None:
        items = pa.table({raw.ITEM_ID: event_items})
        catalog, events_only = _from_table(items, {}), False
    else:
        known = items.filter(pc.is_valid(items[raw.ITEM_ID]))
        dropped = {"items without id": items.num_rows - known.num_rows} if known.num_rows < items.num_rows else {}
        missing = event_items.filter(pc.invert(pc.is_in(event_items, value_set=flat(known[raw.ITEM_ID]))))
        if len(missing) and unknown == "refuse":
            raise ValueError(
                f"items: {len(missing):,} of {len(event_items):,} items of the events are not in "
                "the items file (first: "
                f"{missing[0].as_py()!r}); add them to it, or use --unknown-items add or drop"
            )
        file_ids = numeric_ids(flat(known[raw.ITEM_ID]))
        added = missing if unknown == "add" else missing[:0]
        table = pa.concat_tables([known, pa.table({raw.ITEM_ID: added})], promote_options="default")
        catalog, events_only = _from_table(table, dropped), True
        catalog.added, catalog.file_ids = len(added), file_ids
    logger.debug("catalog of %d items, items file: %s", catalog.ids.size, events_only)
    return catalog


def _from_table(table: pa.Table, dropped: dict[str, int]) -> Catalog:
    column = flat(table[raw.ITEM_ID])
    ids = numeric_ids(column)
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if twice.size:
        first = column[int(order[twice[0]])].as_py()
        raise ValueError(
            f"items: {twice.size:,} ids occur twice in the items file (first: {first!r}); keep one row per item"
        )
    table = table.take(pa.array(order))
    catalog = Catalog(
        ids=ids[order],
        file_ids=None,
        raw_ids=flat(table[raw.ITEM_ID]) if is_text(column.type) else None,
        titles=flat(table[raw.TITLE]) if raw.TITLE in table.column_names else None,
        dropped=dropped,
    )
    for name, default in ((raw.AVAILABLE_FROM, ALWAYS_FROM), (raw.AVAILABLE_TO, ALWAYS_TO)):
        if name in table.column_names:
            catalog.available[name] = flat(table[name]).fill_null(default).to_numpy(zero_copy_only=False)
    for name in table.column_names:
        if name not in raw.ITEM_COLUMNS:
            catalog.categoricals[name], catalog.vocabularies[name] = encode_item_column(_typed(flat(table[name])), name)
    return catalog


def _typed(column: pa.Array) -> pa.Array:
    """Any list as a large list, as ``encode_item_column`` takes it."""
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return column.cast(pa.large_list(column.type.value_type))
    return column
