"""Which id or value each row of an embedding table stands for: what makes a table of one run useful to another.

Beside tables that are to be read by name lies a folder `row_ids` with a file for each: `<table>.safetensors` for item
ids, `<table>.json` for the values of a categorical.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mufasa_rec.data import paths
from mufasa_rec.data.coding import Value
from mufasa_rec.data.ids import hash_ids

FOLDER = "row_ids"
_FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class RowIds:
    """Ids of a table's rows: row 0 is shared by all ids that have none, row `i + 1` is that of ``ids[i]``.

    Attributes:
        parameter: Name of the table in the model and its checkpoints.
        ids: Ids, or hashes of string values, int64 `[rows - 1]`, in any order, each once.
        values: The values of a categorical in the same order; None for items.
    """

    parameter: str
    ids: np.ndarray
    values: tuple[Value, ...] | None = None

    @classmethod
    def of_values(cls, parameter: str, values: Sequence[Value]) -> RowIds:
        """Row ids of a categorical's vocabulary."""
        if any(isinstance(value, str) for value in values):
            return cls(parameter, hash_ids([str(value) for value in values]), tuple(values))
        return cls(parameter, np.array(values, dtype=np.int64), tuple(values))

    @property
    def rows(self) -> int:
        """Rows of the table, the shared one included."""
        return len(self.ids) + 1

    def save(self, folder: paths.Location, table: str) -> str:
        """Write the file of a table; returns its name within `folder`."""
        suffix = "safetensors" if self.values is None else "json"
        file = f"{FOLDER}/{table}.{suffix}"
        with paths.atomic_write(paths.join(folder, file)) as path:
            if self.values is None:
                about = json.dumps({"format_version": _FORMAT_VERSION, "parameter": self.parameter})
                save_file({"id": np.ascontiguousarray(self.ids)}, path, metadata={"about": about})
            else:
                content = {"format_version": _FORMAT_VERSION, "parameter": self.parameter, "values": self.values}
                path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return file

    @classmethod
    def load(cls, file: paths.Location) -> RowIds:
        """Read the file of a table.

        Raises:
            ValueError: When it is damaged or of another format version.
        """
        try:
            if str(file).endswith(".json"):
                with paths.open_file(file) as handle:
                    about = json.loads(handle.read())
                made = cls.of_values(str(about["parameter"]), about["values"])
            else:
                with safe_open(paths.local_copy(file), framework="numpy") as handle:
                    about = json.loads((handle.metadata() or {})["about"])
                    ids = handle.get_tensor("id").astype(np.int64, casting="safe")
                made = cls(str(about["parameter"]), ids)
            version = about["format_version"]
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: holds no ids of rows ({error!r}); write it again.") from error
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{file}: format_version={version}, this version reads {_FORMAT_VERSION}; use the version of "
                "mufasa_rec that wrote it."
            )
        return made


def load_row_ids(folder: paths.Location) -> dict[str, RowIds]:
    """Ids of the rows of every table of a run or an export, by the table's name; empty when there are none."""
    found = {}
    for suffix in (".safetensors", ".json"):
        for file in paths.list_files(paths.join(folder, FOLDER), suffix):
            name = file.rsplit("/", 1)[-1].removesuffix(suffix)
            if not name.startswith("."):
                found[name] = RowIds.load(file)
    return dict(sorted(found.items()))


def match(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Places of ids in another array.

    Args:
        wanted: Ids to look for, int64 `[n]`.
        ids: Where to look, int64 `[k]`, in any order.

    Returns:
        For each the place in `ids`, -1 where it is not there, `[n]`.

    Example:
        >>> match(np.array([7, 4, 9]), np.array([9, 7])).tolist()
        [1, -1, 0]
    """
    if not len(ids):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    place = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return np.where(ids[place] == wanted, place, -1)
