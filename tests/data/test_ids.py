"""String ids hash as Spark's xxhash64 does, at every length."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mufasa_rec.data import ids


def test_hash_equals_the_example_of_sparks_documentation() -> None:
    """``SELECT xxhash64('Spark', array(123), 2)`` is 5602566077635097486; Spark chains the hashes by the seed."""
    state = ids.hash_ids(["Spark"]).view(np.uint64)
    for value in (123, 2):
        state = ids.xxh64(np.frombuffer(np.int32(value).tobytes(), np.uint8)[None], state)
    assert int(state.view(np.int64)[0]) == 5602566077635097486


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"", 0xEF46DB3751D8E999), (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1)],
)
def test_hash_equals_the_published_vectors_of_xxhash(text: bytes, expected: int) -> None:
    data = np.frombuffer(text, np.uint8).reshape(1, -1)
    assert int(ids.xxh64(data, 0)[0]) == expected


@given(st.lists(st.text(max_size=80), max_size=30))
def test_hash_agrees_with_the_specification_on_any_text(values: list[str]) -> None:
    assert ids.hash_ids(values).view(np.uint64).tolist() == [_reference(value.encode(), 42) for value in values]


_PRIMES = (11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261)
_MASK = 2**64 - 1


def _rotate(x: int, bits: int) -> int:
    return ((x << bits) | (x >> (64 - bits))) & _MASK


def _round(lane: int, word: int) -> int:
    return _rotate((lane + word * _PRIMES[1]) & _MASK, 31) * _PRIMES[0] & _MASK


def _reference(data: bytes, seed: int) -> int:
    """xxHash64 of one string, word by word as its specification tells it."""
    p1, p2, p3, p4, p5 = _PRIMES
    length = len(data)
    state = (seed + p5) & _MASK
    if length >= 32:
        lanes = [seed + p1 + p2, seed + p2, seed, seed - p1]
        while len(data) >= 32:
            for k in range(4):
                lanes[k] = _round(lanes[k] & _MASK, int.from_bytes(data[8 * k : 8 * k + 8], "little"))
            data = data[32:]
        state = sum(_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            state = ((state ^ _round(0, lane)) * p1 + p4) & _MASK
    state = (state + length) & _MASK
    for size, mix in ((8, (27, p1, p4)), (4, (23, p2, p3)), (1, (11, p1, 0))):
        while len(data) >= size:
            word = int.from_bytes(data[:size], "little")
            word = _round(0, word) if size == 8 else word * (p1 if size == 4 else p5) & _MASK
            state = (_rotate(state ^ word, mix[0]) * mix[1] + mix[2]) & _MASK
            data = data[size:]
    for shift, prime in ((33, p2), (29, p3)):
        state = (state ^ (state >> shift)) * prime & _MASK
    return state ^ (state >> 32)


def test_hash_of_a_slice_of_a_chunked_array_is_that_of_its_values() -> None:
    whole = pa.chunked_array([["a", "bb"], ["ccc", "a"]])
    assert ids.hash_ids(whole.slice(1)).tolist() == ids.hash_ids(["bb", "ccc", "a"]).tolist()


def test_null_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 are null; drop those rows"):
        ids.hash_ids(pa.array(["a", None]))


def test_two_strings_with_one_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_hash_unique", lambda strings: np.zeros(len(strings), np.int64))
    with pytest.raises(ValueError, match=r"'a' and 'b' have the same 64-bit hash; rename"):
        ids.hash_ids(["a", "b"])
