"""The order of the data: each row once per epoch, equal numbers from each reader, whatever the number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mufasa_rec.data.order import EpochOrder, plan_epoch, readers_of

GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def plan(group_rows: list[int], num_readers: int, rows_per_step: int, **changes: int) -> EpochOrder:
    keys = {"seed": 3, "epoch": 1} | changes
    return plan_epoch(group_rows, num_readers=num_readers, rows_per_step=rows_per_step, shuffle=True, **keys)


def rows_of(order: EpochOrder, reader: int, step: int) -> list[tuple[int, int]]:
    return [(piece.group, row) for piece in order.pieces(reader, step) for row in range(piece.start, piece.stop)]


@given(GROUPS, st.integers(1, 9), st.integers(1, 5))
def test_each_row_is_read_exactly_once_per_epoch(group_rows: list[int], readers: int, rows_per_step: int) -> None:
    order = plan(group_rows, readers, rows_per_step)
    seen = [row for step in range(order.num_steps) for reader in range(readers) for row in rows_of(order, reader, step)]
    assert sorted(seen) == [(group, row) for group, size in enumerate(group_rows) for row in range(size)]


@given(GROUPS, st.integers(1, 9), st.integers(1, 5))
def test_readers_give_equal_numbers_of_rows(group_rows: list[int], readers: int, rows_per_step: int) -> None:
    order = plan(group_rows, readers, rows_per_step)
    sizes = [[len(rows_of(order, reader, step)) for reader in range(readers)] for step in range(order.num_steps)]
    for step, counts in enumerate(sizes):
        assert order.num_rows(step) == sum(counts) > 0
        if step < order.num_steps - 1:  # readers differ by one row at most, so only the last two steps can be uneven
            assert max(counts) - min(counts) <= 1
            assert max(counts) == rows_per_step
    per_reader = [sum(counts[reader] for counts in sizes) for reader in range(readers)]
    assert max(per_reader) - min(per_reader) <= 1
    assert not any(rows_of(order, reader, order.num_steps) for reader in range(readers))


@given(GROUPS, st.integers(0, 50), st.integers(0, 50))
def test_plan_is_a_function_of_seed_and_epoch(group_rows: list[int], seed: int, epoch: int) -> None:
    keys = {"seed": seed, "epoch": epoch}
    assert plan(group_rows, 4, 2, **keys).readers == plan(group_rows, 4, 2, **keys).readers


def test_seed_and_epoch_change_the_order_and_evaluation_keeps_it() -> None:
    base = plan([5] * 20, 4, 2)
    assert base.readers != plan([5] * 20, 4, 2, epoch=2).readers
    assert base.readers != plan([5] * 20, 4, 2, seed=4).readers
    still = plan_epoch([5] * 4, num_readers=2, rows_per_step=2, seed=9, epoch=9, shuffle=False)
    assert [piece.group for reader in still.readers for piece in reader] == [0, 1, 2, 3]


@given(st.integers(1, 40), st.integers(1, 40))
def test_ranks_host_all_readers_in_order(num_readers: int, world_size: int) -> None:
    if num_readers < world_size:
        with pytest.raises(ValueError, match=rf"data\.num_readers={num_readers}.*{world_size} ranks.*raise data"):
            readers_of(0, world_size, num_readers)
        return
    hosted = [reader for rank in range(world_size) for reader in readers_of(rank, world_size, num_readers)]
    assert hosted == list(range(num_readers))
