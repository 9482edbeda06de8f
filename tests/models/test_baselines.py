"""Transitions counted on batches made by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.data.batch import Batch
from mufasa_rec.models.baselines import Transitions, count_transitions

pairs_and_weights = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0])))


def make_batch(events: list[tuple[int, int, float]]) -> Batch:
    """A batch of one row per (item, next item, weight); batch items are item rows in descending order."""
    rows = np.arange(5, -1, -1)
    place = {int(row): index for index, row in enumerate(rows)}
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        features=KeyedJaggedTensor(keys=["item"], values=none, lengths=torch.zeros(1, dtype=torch.int32), stride=1),
        item_row=torch.from_numpy(rows.copy()),
        event_item=torch.tensor([place[a] for a, _, _ in events], dtype=torch.int64),
        next_item=torch.tensor([place[b] for _, b, _ in events], dtype=torch.int64),
        target_weight=torch.tensor([w for _, _, w in events], dtype=torch.float32),
        offsets=torch.arange(len(events) + 1),
        start_position=torch.zeros(len(events), dtype=torch.int64),
        candidate_item=none,
        candidate_bias=torch.zeros(0),
        user=none,
        target_row=none,
        seen_row=none,
        seen_offsets=torch.zeros(1, dtype=torch.int64),
    )


def as_dict(found: Transitions) -> dict[tuple[int, int], int]:
    return {(int(a), int(b)): int(n) for a, b, n in zip(found.before, found.after, found.count, strict=True)}


def test_transitions_into_targets_are_counted_by_item_row() -> None:
    batches = [make_batch([(0, 1, 1.0), (1, 2, 1.0), (0, 1, 0.5), (3, 3, 0.0)]), make_batch([(0, 1, 1.0), (0, 0, 1.0)])]
    found = count_transitions(batches)
    assert as_dict(found) == {(0, 0): 1, (0, 1): 3, (1, 2): 1}
    assert found.before.tolist() == [0, 0, 1]


@given(st.lists(pairs_and_weights, max_size=4))
def test_counts_agree_with_a_counter_and_are_sorted(batches: list[list[tuple[int, int, float]]]) -> None:
    found = count_transitions(make_batch(events) for events in batches)
    assert as_dict(found) == Counter((a, b) for events in batches for a, b, w in events if w > 0)
    assert list(as_dict(found)) == sorted(as_dict(found))


@given(pairs_and_weights, pairs_and_weights)
def test_merged_parts_of_ranks_are_the_counts_of_all(
    first: list[tuple[int, int, float]], second: list[tuple[int, int, float]]
) -> None:
    parts = [count_transitions([make_batch(events)]) for events in (first, second)]
    assert as_dict(Transitions.merge(parts)) == as_dict(count_transitions([make_batch(first), make_batch(second)]))


def test_parts_by_item_are_the_whole() -> None:
    found = count_transitions([make_batch([(0, 1, 1.0), (1, 4, 1.0), (5, 2, 1.0), (1, 4, 1.0)])])
    parts = [as_dict(found.part(rows)) for rows in (range(2), range(2, 4), range(4, 6))]
    assert parts == [{(0, 1): 1}, {(5, 2): 1}, {(1, 4): 2}]


def test_nothing_at_all_has_no_transitions() -> None:
    for found in (count_transitions([]), Transitions.merge([]), count_transitions([make_batch([])])):
        assert as_dict(found) == {}
        assert found.count.dtype == np.int64
