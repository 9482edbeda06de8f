"""Finished batches equal those of a loop over rows and events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mufasa_rec.data.collate import collate, cut_windows, distinct
from mufasa_rec.data.item_columns import ItemColumn
from mufasa_rec.data.item_lookup import ItemLookup, ItemVocabulary
from mufasa_rec.data.items import Categorical
from mufasa_rec.data.parquet import RowGroup
from tests.helpers.naive import check_batch, naive_batch

NUM_ITEMS = 11


@dataclass
class Items:
    """The part of an item store that batches read."""

    ids: np.ndarray
    categoricals: dict[str, Categorical]


class SmallLookup(ItemLookup):
    """Eleven items with ids 3, 6, ...; no files."""

    def __init__(self) -> None:
        ids = np.arange(1, NUM_ITEMS + 1, dtype=np.int64) * 3
        sizes = np.arange(NUM_ITEMS) % 3
        offsets = np.r_[0, np.cumsum(sizes)].astype(np.int64)
        values = np.arange(offsets[-1], dtype=np.int32) % 5
        self.items = Items(  # type: ignore[assignment]
            ids,
            {
                "kind": Categorical(values=np.arange(NUM_ITEMS, dtype=np.int32) % 4, offsets=None, cardinality=3),
                "genres": Categorical(values=values, offsets=offsets, cardinality=4),
            },
        )
        self.keys = ItemColumn(ids, ItemVocabulary(ids[::2], "loo@0", 1).keys_of)
        self.content_rows = {
            "title": ItemColumn(ids, lambda ids: np.where(ids // 3 % 4 == 2, -1, NUM_ITEMS - ids // 3))
        }
        self.carried = ()
        table = np.full(int(ids[-1]) + 1, -1, dtype=np.int64)
        table[ids] = np.arange(NUM_ITEMS)
        self._direct = table

    def __len__(self) -> int:
        return NUM_ITEMS


@st.composite
def row_groups(draw: st.DrawFn) -> RowGroup:
    """One to four users' streams of 0 to 9 events, and one to six rows that refer to them."""
    lengths = np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    total = int(lengths.sum())
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    rows = []
    for row in range(draw(st.integers(1, 6))):
        user = draw(st.integers(0, len(lengths) - 1))
        end = draw(st.integers(0, int(lengths[user])))
        start = int(lengths[:user].sum())
        rows.append((user + 100, start, lengths[user], end, draw(st.integers(0, end)), 50 + row))
    return RowGroup(
        *(np.array(column, dtype=np.int64) for column in zip(*rows)),
        columns={
            "item": (rng.integers(0, NUM_ITEMS, total) + 1) * 3,
            "timestamp": np.sort(rng.integers(0, 10**6, total)),
            "action": rng.integers(0, 4, total).astype(np.int32),
            "weight": rng.choice([0.0, 0.5, 3.0], total).astype(np.float32),
            "device": rng.integers(0, 4, total),
        },
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(row_groups(), min_size=1, max_size=3), st.integers(1, 10), st.booleans(), st.booleans())
def test_batch_equals_a_loop_over_rows(groups: list[RowGroup], history: int, dedup: bool, filtered: bool) -> None:
    lookup = SmallLookup()
    pieces = [(group, np.arange(len(group.user))[::-1]) for group in groups]
    rows = [(group, int(row)) for group, order in pieces for row in order]
    candidates = np.array([5, 0, 5, 9])
    actions = [1, 3] if filtered else None
    batch = collate(
        cut_windows(pieces, history),
        lookup,
        candidates,
        np.arange(4, dtype=np.float32),
        seen=cut_windows(pieces, None),
        target_actions=None if actions is None else np.array(actions),
        dedup=dedup,
    )
    expected = naive_batch(rows, history, actions)
    check_batch(batch, lookup, expected)
    assert batch.item_row[batch.candidate_item].tolist() == candidates.tolist()
    assert batch.candidate_bias.tolist() == [0, 1, 2, 3]
    ids, offsets = lookup.items.ids, batch.seen_offsets.tolist()
    seen = [ids[batch.seen_row[a:b].numpy()].tolist() for a, b in zip(offsets[:-1], offsets[1:])]
    assert seen == expected.seen
    windows = sum(min(int(end), history + 1) for group in groups for end in group.history_end)
    assert batch.num_asked == windows + len(candidates)
    assert dedup or batch.num_items == batch.num_asked
    if dedup:
        assert len(torch.unique(batch.item_row)) == len(batch.item_row)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.sampled_from([41, 5000]))
def test_distinct_is_unique_by_flags_and_by_sorting(rows: list[int], num_items: int) -> None:
    found, place = distinct(np.array(rows), num_items)
    assert found.tolist() == sorted(set(rows))
    assert found[place].tolist() == rows


def test_event_that_is_not_in_the_item_store_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"1 ids of the events are not in the item store \(such as \[4\]\).*--check"):
        SmallLookup().rows_of(np.array([3, 4, 4]))
