"""From a source's own files to ``mufasa_rec.data.raw.RawData``: one module per layout.

``read_source`` picks the layout: a folder with ``ratings.csv`` and ``movies.csv`` is GroupLens, ``synthetic:<seed>``
is the generated catalog, everything else is tabular.
"""

from __future__ import annotations

from mufasa_rec.data import paths
from mufasa_rec.data.importers.columns import ColumnsConfig, merge_columns
from mufasa_rec.data.importers.generated import PREFIX, read_generated
from mufasa_rec.data.importers.grouplens import is_grouplens, read_grouplens
from mufasa_rec.data.importers.tabular import read_tabular
from mufasa_rec.data.raw import RawData

__all__ = ["ColumnsConfig", "read_source"]


def read_source(
    source: str,
    columns: ColumnsConfig,
    *,
    layout: str = "auto",
    columns_file: str | None = None,
    items: str | None = None,
    vectors: dict[str, str] | None = None,
) -> RawData:
    """Reads any source.

    Args:
        source: Folder, events file, URL, or ``synthetic:<seed>``.
        columns: Columns by flags; they win over ``columns.json`` in the folder.
        layout: ``tabular``, ``grouplens`` or ``auto``.
        columns_file: Another place of ``columns.json``.
        items: Items file, when it is not in the folder.
        vectors: More vector files by modality.

    Raises:
        ValueError: The source is not there or cannot be read.
    """
    if source.startswith(PREFIX):
        return read_generated(source)
    source = source.rstrip("/")
    if not paths.exists(source):
        raise ValueError(f"--input {source}: there is nothing; give a folder, an events file, or synthetic:<seed>")
    is_file = source.endswith((".parquet", ".csv", ".tsv"))
    columns = merge_columns(columns, None if is_file else source, columns_file)
    if layout == "grouplens" or (layout == "auto" and not is_file and items is None and is_grouplens(source)):
        return read_grouplens(source, columns)
    return read_tabular(source, columns, items=items, vectors=vectors)
