"""Raw ids to embedding keys without a vocabulary: by hashing, or as they are for a table that manages its own rows.

Both offer what `ItemVocabulary` offers: `size` (rows of the table) and `keys_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(ids: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of 64-bit integers in which every bit depends on every bit.

    Reference: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014; constants of Stafford.

    Args:
        ids: int64 or uint64 `[n]`.

    Returns:
        uint64 `[n]`.

    Example:
        >>> hex(int(mix(np.array([1], dtype=np.int64))[0]))
        '0x5692161d100b05e5'
    """
    z = ids.astype(np.int64, copy=False).view(np.uint64) if ids.dtype != np.uint64 else ids
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class HashedKeys:
    """Keys by hashing.

    Attributes:
        size: Rows of the table; row 0 is kept for what is unknown.
        salts: Keys of an id, each by a hash of its own.
    """

    size: int
    salts: int = 1

    def keys_of(self, ids: np.ndarray) -> np.ndarray:
        """Embedding keys of raw ids `[n]`: `[n]` with one salt, else `[n, salts]`; none is 0.

        Example:
            >>> HashedKeys(100, 2).keys_of(np.array([7, 8, 7])).tolist()
            [[58, 34], [59, 21], [58, 34]]
        """
        raw = np.ascontiguousarray(ids, dtype=np.int64).view(np.uint64)
        keys = []
        for salt in range(self.salts):
            offset = np.uint64(((salt + 1) * _GOLDEN) % 2**64)
            with np.errstate(over="ignore"):
                keys.append(1 + (mix(raw + offset) % np.uint64(self.size - 1)).astype(np.int64))
        return keys[0] if self.salts == 1 else np.stack(keys, axis=1)

    def expected_collisions(self, num_ids: int) -> float:
        """Expected share of `num_ids` ids that share each of their rows with another id.

        A row is free of others with probability (1 - 1 / rows)^(others); with several salts all rows of an id must be
        shared, taken as independent.

        Example:
            >>> round(HashedKeys(1_000_001).expected_collisions(1_000_000), 4)
            0.6321
        """
        rows, others = self.size - 1, max((num_ids - 1) * self.salts, 0)
        return float(-np.expm1(others * np.log1p(-1.0 / rows))) ** self.salts if rows > 1 else float(others > 0)

    def measured_collisions(self, ids: np.ndarray) -> float:
        """Share of distinct raw ids `[n]` that share each of their rows with another one."""
        if not len(ids):
            return 0.0
        keys = self.keys_of(ids).reshape(len(ids), self.salts)
        return float((np.bincount(keys.ravel(), minlength=self.size)[keys] > 1).all(axis=1).mean())


@dataclass(frozen=True)
class RawKeys:
    """Keys that are the raw ids themselves: the table finds rows for them as they come.

    Attributes:
        size: Rows of the table.
    """

    size: int

    def keys_of(self, ids: np.ndarray) -> np.ndarray:
        """The ids."""
        return np.asarray(ids, dtype=np.int64)
