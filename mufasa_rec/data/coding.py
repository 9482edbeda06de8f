"""Categories to small codes and the vocabulary back: code = place in the vocabulary + 1, 0 = missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mufasa_rec.data import paths
from mufasa_rec.data.items import Categorical
from mufasa_rec.data.manifest_json import load_json, save_json

Value = int | str


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Distinct values of a feature in ascending order; ``values[code - 1]``."""

    feature: str
    values: list[Value]

    @classmethod
    def load(cls, folder: paths.Location, feature: str) -> Vocabulary:
        """Reads ``vocabularies/<feature>.json`` of a data set."""
        url = paths.join(folder, "vocabularies", f"{feature}.json")
        document = load_json(url)
        if not isinstance(document, dict) or not isinstance(document.get("values"), list):
            raise ValueError(f"{url}: must hold 'feature' and the list 'values'; prepare the data set again")
        return cls(feature=feature, values=document["values"])

    def save(self, folder: paths.Location) -> None:
        """Writes it into the data set at ``folder``."""
        save_json(self, paths.join(folder, "vocabularies", f"{self.feature}.json"))


def encode(column: pa.Array, feature: str) -> tuple[np.ndarray, Vocabulary]:
    """Codes of a column of integers or strings.

    Args:
        column: Values `[n]`, nulls allowed.
        feature: Name of the feature.

    Returns:
        Codes, int32 `[n]`, and the vocabulary.
    """
    encoded = column.dictionary_encode()
    values = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    order = np.asarray(sorted(range(values.size), key=values.__getitem__), dtype=np.int64)
    code_of = np.zeros(values.size + 1, np.int32)  # the last place answers index -1, a null
    code_of[order] = np.arange(1, values.size + 1)
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return code_of[indices], Vocabulary(feature=feature, values=values[order].tolist())


def encode_item_column(column: pa.Array, feature: str) -> tuple[Categorical, Vocabulary]:
    """Codes of an item's categorical, single or a list per item (a null list is an empty one)."""
    if not pa.types.is_large_list(column.type):
        codes, vocabulary = encode(column, feature)
        return Categorical(values=codes, offsets=None, cardinality=len(vocabulary.values)), vocabulary
    codes, vocabulary = encode(column.flatten(), feature)  # flatten, unlike values, leaves out what null lists cover
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Categorical(values=codes, offsets=offsets, cardinality=len(vocabulary.values)), vocabulary
