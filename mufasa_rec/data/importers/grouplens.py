"""The GroupLens layout: ``ratings.csv`` and ``movies.csv`` as in MovieLens 20M, 25M, 32M and latest.

``tags.csv``, ``links.csv`` and ``genome-*`` are not read; vector files may lie beside. A rating becomes a label only
when asked (``--columns.label rating --columns.label-at-least 4``): retrieval learns from every event.
"""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from mufasa_rec.data import paths
from mufasa_rec.data.importers.columns import ColumnsConfig
from mufasa_rec.data.importers.files import find_files
from mufasa_rec.data.importers.tabular import read_files
from mufasa_rec.data.importers.values import flat
from mufasa_rec.data.raw import RawData

pc: Any = pyarrow.compute  # made at import: a type checker cannot see its functions
_NO_GENRES = "(no genres listed)"


def is_grouplens(folder: str) -> bool:
    """True for a folder that has both files."""
    return all(paths.exists(paths.join(folder, name)) for name in ("ratings.csv", "movies.csv"))


def read_grouplens(folder: str, columns: ColumnsConfig) -> RawData:
    """Reads a GroupLens folder; columns named in ``columns`` win over the layout's own.

    Raises:
        ValueError: A file or column is missing; names it.
    """
    if not is_grouplens(folder):
        raise ValueError(f"{folder}: GroupLens data has ratings.csv and movies.csv; one is missing, or use tabular")
    own: dict[str, Any] = {
        "user": "userId",
        "item": "movieId",
        "time": "timestamp",
        "item_id": "movieId",
        "title": "title",
        "item_categoricals": ("genres",),
    }
    named = {role: name for role, name in own.items() if getattr(columns, role) is None}
    unit = "s" if columns.time_unit == "auto" else columns.time_unit
    columns = dataclasses.replace(columns, time_unit=unit, **named)
    files = find_files(folder, ["ratings"], ["movies"])
    data = read_files(PurePosixPath(folder).name, files, columns)
    assert data.items is not None
    return dataclasses.replace(data, items=_without_placeholder(data.items))


def _without_placeholder(items: pa.Table) -> pa.Table:
    """Turns the text GroupLens writes for "no genres" into an empty list."""
    if "genres" not in items.column_names or not pa.types.is_large_list(items["genres"].type):
        return items
    lists = flat(items["genres"])
    values, parents = pc.list_flatten(lists), pc.list_parent_indices(lists)
    keep = pc.not_equal(values, _NO_GENRES)
    lengths = np.bincount(parents.filter(keep).to_numpy(zero_copy_only=False), minlength=len(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    genres = pa.LargeListArray.from_arrays(offsets, values.filter(keep))
    return items.set_column(items.column_names.index("genres"), "genres", genres)
