"""String ids as 64-bit integers: xxHash64 with seed 42 over UTF-8, bit for bit Spark's ``xxhash64(column)``.

Rows hold one int64 per id whatever the source used, and a warehouse can compute the same number without this package.
The hash is written in numpy over all strings of one length at once, so no compiled dependency is needed: a million
ids take about a second.

Reference: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(value)
    for value in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
SPARK_SEED = 42


def _rotate(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


def _round(lane: np.ndarray, word: np.ndarray) -> np.ndarray:
    return _rotate(lane + word * _P2, 31) * _P1


def xxh64(data: np.ndarray, seed: int | np.ndarray = SPARK_SEED) -> np.ndarray:
    """xxHash64 of rows of bytes that all have one length.

    Args:
        data: Bytes, uint8 `[n, length]`.
        seed: One seed, or one per row.

    Returns:
        Hashes, uint64 `[n]`.
    """
    n, length = data.shape
    data = np.ascontiguousarray(data)
    start = np.broadcast_to(np.asarray(seed).astype(np.uint64), (n,))
    with np.errstate(over="ignore"):
        position = length - length % 32
        if position:
            words = data[:, :position].copy().view("<u8")  # [n, 4 * stripes]
            lanes = [start + _P1 + _P2, start + _P2, start + np.uint64(0), start - _P1]
            for column in range(words.shape[1]):
                lanes[column % 4] = _round(lanes[column % 4], words[:, column])
            state = sum(
                (_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)), np.zeros_like(start)
            )
            for lane in lanes:
                state = (state ^ _round(np.zeros_like(lane), lane)) * _P1 + _P4
        else:
            state = start + _P5
        return _finish(state + np.uint64(length), data[:, position:])


def _finish(state: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Mixes in the last bytes (fewer than 32 a row) and avalanches."""
    length, position = tail.shape[1], 0
    while length - position >= 8:
        word = tail[:, position : position + 8].copy().view("<u8")[:, 0]
        state = _rotate(state ^ _round(np.zeros_like(state), word), 27) * _P1 + _P4
        position += 8
    if length - position >= 4:
        word = tail[:, position : position + 4].copy().view("<u4")[:, 0].astype(np.uint64)
        state = _rotate(state ^ (word * _P1), 23) * _P2 + _P3
        position += 4
    for column in range(position, length):
        state = _rotate(state ^ (tail[:, column].astype(np.uint64) * _P5), 11) * _P1
    state = (state ^ (state >> np.uint64(33))) * _P2
    state = (state ^ (state >> np.uint64(29))) * _P3
    return state ^ (state >> np.uint64(32))


def hash_ids(values: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Hashes string ids to signed 64-bit integers, equal to Spark's ``xxhash64``.

    Args:
        values: Strings `[n]`, without nulls.

    Returns:
        Hashes, int64 `[n]`.

    Raises:
        ValueError: A value is null, or two different strings have one hash.

    Example:
        >>> hash_ids(["", "a", "a"]).tolist()
        [-7444071767201028348, -8582455328737087284, -8582455328737087284]
    """
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.large_string())
    array = pa.chunked_array([array]) if isinstance(array, pa.Array) else array
    array = array.cast(pa.large_string()).combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    if array.null_count:
        raise ValueError(f"string ids: {array.null_count} of {len(array)} are null; drop those rows first")
    encoded = array.dictionary_encode()
    hashes = _hash_unique(encoded.dictionary)
    order = np.argsort(hashes, kind="stable")
    clash = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if clash.size:
        first, second = (encoded.dictionary[int(order[clash[0] + k])].as_py() for k in (0, 1))
        raise ValueError(f"string ids {first!r} and {second!r} have the same 64-bit hash; rename one of them")
    return hashes[encoded.indices.to_numpy(zero_copy_only=False)]


def _hash_unique(strings: pa.LargeStringArray) -> np.ndarray:
    """Hashes distinct strings, one pass per byte length."""
    lengths = pc.call_function("binary_length", [strings]).to_numpy(zero_copy_only=False)
    hashes = np.empty(len(strings), np.int64)
    if not len(strings):
        return hashes
    starts = np.frombuffer(strings.buffers()[1], np.int64)[strings.offset : strings.offset + len(strings)]
    data = np.frombuffer(strings.buffers()[2] or b"", np.uint8)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for part in np.array_split(rows, max(1, rows.size * int(length) // 2**26)):  # at most 64 MiB of bytes at once
            hashes[part] = xxh64(data[starts[part][:, None] + np.arange(length)]).view(np.int64)
    return hashes
