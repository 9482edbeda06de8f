"""Jagged plans: every event finds its place and comes back, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mufasa_rec.ops.jagged import GroupPlan, _plan, last_index, lengths_of, plan_groups, positions, sequence_ids
from tests.tensors import offsets_of

AWKWARD = [0, 1, 63, 0, 111, 7, 64, 8, 1, 0]
lengths_lists = st.lists(st.integers(0, 40), min_size=0, max_size=12)


def round_trip(plan: GroupPlan, values: Tensor) -> Tensor:
    return torch.cat([values[group.gather].flatten() for group in plan.groups])[plan.restore]


@given(lengths_lists)
def test_ids_positions_and_last_events_agree_with_a_loop(lengths: list[int]) -> None:
    offsets, total = offsets_of(lengths), sum(lengths)
    assert lengths_of(offsets).tolist() == lengths
    assert sequence_ids(offsets, total).tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert positions(offsets, total).tolist() == [i for n in lengths for i in range(n)]
    last = last_index(offsets).tolist()
    assert all(last[b] == sum(lengths[: b + 1]) - 1 for b, n in enumerate(lengths) if n)


@given(st.one_of(lengths_lists, st.just(AWKWARD)), st.integers(1, 6))
def test_each_event_is_in_one_place_and_is_restored_from_it(lengths: list[int], max_groups: int) -> None:
    total = sum(lengths)
    plan = plan_groups(offsets_of(lengths), total, max_groups=max_groups)
    assert len(plan.groups) <= max_groups
    assert plan.num_sequences == len(lengths)
    assert plan.num_places == sum(group.gather.numel() for group in plan.groups)
    assert sum(int(group.valid.sum()) for group in plan.groups) == total
    if total:
        assert round_trip(plan, torch.arange(total)).tolist() == list(range(total))


@given(lengths_lists)
def test_places_hold_events_of_their_own_sequence_in_order(lengths: list[int]) -> None:
    offsets = offsets_of(lengths)
    owner, position = sequence_ids(offsets, sum(lengths)), positions(offsets, sum(lengths))
    for group in plan_groups(offsets, sum(lengths)).groups:
        assert (owner[group.gather] == group.sequences[:, None]).all()
        step = torch.arange(group.gather.shape[1])
        assert torch.where(group.valid, position[group.gather] == step, True).all()


@given(lengths_lists)
def test_groups_never_take_more_places_than_one_rectangle(lengths: list[int]) -> None:
    filled = [n for n in lengths if n]
    assert plan_groups(offsets_of(lengths), sum(lengths)).num_places <= len(filled) * max(filled, default=0)


def test_sequences_of_two_lengths_are_not_padded_at_all() -> None:
    plan = plan_groups(offsets_of([200] + [1] * 50), 250)
    assert plan.num_places == 250
    assert len(plan.groups) == 2


def test_one_group_of_everyone_as_off_the_cpu_restores_every_event() -> None:
    offsets = offsets_of(AWKWARD)
    plan = _plan(offsets, sum(AWKWARD), [torch.arange(len(AWKWARD))], [128])
    assert plan.num_places == 128 * len(AWKWARD)
    assert round_trip(plan, torch.arange(sum(AWKWARD))).tolist() == list(range(sum(AWKWARD)))


def test_plan_off_the_cpu_reads_no_value() -> None:
    plan = plan_groups(torch.empty(5, dtype=torch.int64, device="meta"), 30, max_length=16)
    assert plan.num_places == 64
    assert plan.restore.shape == (30,)


def test_batch_without_events_has_no_group_on_any_device() -> None:
    for device in ("cpu", "meta"):
        plan = plan_groups(torch.zeros(4, dtype=torch.int64, device=device), 0, max_length=16)
        assert (plan.groups, plan.num_places, plan.num_sequences) == ([], 0, 3)
        assert plan.restore.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_events": 5}, "offsets: end at 3, but there are 5 events"),
        ({"num_events": 3, "max_length": 1}, "max_length=1: the longest sequence has 2 events"),
        ({"num_events": 3, "max_groups": 0}, "max_groups=0"),
    ],
)
def test_bad_plan_is_refused_by_name(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_groups(torch.tensor([0, 2, 3]), **arguments)


def test_plan_off_the_cpu_wants_an_upper_bound() -> None:
    with pytest.raises(ValueError, match="max_length=None"):
        plan_groups(torch.empty(3, dtype=torch.int64, device="meta"), 3)
