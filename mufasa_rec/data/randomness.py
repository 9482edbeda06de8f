"""Random numbers as a pure function of what they are for: (seed, epoch, row, position), not of who asks or when.

That is what makes a run independent of the number of ranks and workers, and of where it was interrupted.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """Mix 64 bits so that close inputs give unrelated outputs (splitmix64's finaliser); uint64 of the same shape."""
    with np.errstate(over="ignore"):
        x = np.asarray(value, dtype=np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) keyed by integers or integer arrays, broadcast together.

    Example:
        >>> a = uniform(7, 0, np.arange(3))
        >>> bool((a == uniform(7, 0, np.arange(3))).all()), bool((a != uniform(8, 0, np.arange(3))).any())
        (True, True)
    """
    state = np.uint64(0)
    for key in keys:
        state = mix(np.asarray(key).astype(np.int64).view(np.uint64) ^ state)
    return (np.asarray(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*keys: int) -> np.random.Generator:
    """A counter-based generator for a stream that belongs to the keys."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([key & 0xFFFFFFFFFFFFFFFF for key in keys])))
