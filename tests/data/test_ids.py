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
def test_hash_agrees_with_the_library_on_any_text(values: list[str]) -> None:
    xxhash = pytest.importorskip("xxhash")
    expected = [xxhash.xxh64_intdigest(value.encode(), seed=42) for value in values]
    assert ids.hash_ids(values).view(np.uint64).tolist() == expected


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
