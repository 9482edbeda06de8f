"""Tables of variants compare the same users, say how sure they are, and leave out what is not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mufasa_rec.evaluation.grid import AMONG_COLD, RARE, Cell, Part, compare, markdown
from mufasa_rec.evaluation.ranks import gains


def cell(seed: int, shift: float = 0.0, users: int = 400) -> Cell:
    rng = np.random.default_rng(seed)
    rank = rng.integers(1, 30, users) + shift
    columns = np.arange(users), np.arange(users) % 7, np.maximum(rank, 1.0), np.arange(users)
    return Cell(*columns, seconds=60.0)


def test_difference_and_ratio_are_those_of_the_means_and_lie_in_their_intervals() -> None:
    better, worse = {s: cell(s) for s in (0, 1)}, {s: cell(s, shift=4.0) for s in (0, 1)}
    found = compare(worse, better)
    assert found is not None
    assert found.difference is not None
    assert found.ratio is not None
    means = [np.mean([gains(c.rank)["ndcg@10"].mean() for c in cells.values()]) for cells in (worse, better)]
    assert found.ndcg == pytest.approx(means[0])
    assert found.difference[0] == pytest.approx(means[0] - means[1])
    assert found.ratio[0] == pytest.approx(means[0] / means[1])
    for value, low, high in (found.difference, found.ratio):
        assert low < value < high
    assert found.difference[2] < 0


def since(events: int) -> Part:
    return Part("long", lambda cell: cell.history_length >= events)


def test_only_seeds_that_both_have_are_paired_and_short_histories_can_be_left_out() -> None:
    rule = {0: cell(0)}
    found = compare({0: cell(0), 5: cell(5)}, rule, since(300))
    assert found is not None
    assert (found.users, found.seeds) == (100, 2)
    assert found.difference == (0.0, 0.0, 0.0)
    assert compare(rule, rule, since(400)) is None


def test_rare_and_cold_targets_have_parts_of_their_own() -> None:
    whole = cell(0)
    events = np.arange(400) % 20
    among = np.where(events == 0, 3.0, np.nan)
    whole = replace(whole, target_events=events, cold_rank=among, cold_items=40)
    found = compare({0: whole}, {0: replace(whole, rank=whole.rank + 100)}, RARE)
    assert found is not None
    assert found.users == 400 * 6 // 20
    assert found.hr == pytest.approx((whole.rank[events <= 5] <= 10).mean())
    assert found.hr_difference is not None
    assert found.hr_difference[0] == pytest.approx(found.hr)
    assert found.hr_difference[1] > 0
    cold = compare({0: whole}, None, AMONG_COLD)
    assert cold is not None
    assert (cold.users, cold.hr) == (20, 1.0)
    text = markdown({"fused": {0: whole}}, "fused")
    assert "ranked among the 40 items without a training event; a random order hits 0.2500 (20)" in text
    assert "### targets with at most 5 training events (120)" in text


def test_cells_of_other_targets_are_refused() -> None:
    other = replace(cell(0), target_row=np.arange(400) % 5)
    with pytest.raises(ValueError, match="they rank different users or targets"):
        compare({0: other}, {0: cell(0)})


def test_table_has_a_part_for_long_histories_and_no_row_without_cells() -> None:
    text = markdown({"sal": {0: cell(0)}, "full": {0: cell(1)}, "waiting": {}}, "sal")
    lines = text.splitlines()
    assert lines[0] == "### all users (400)"
    assert "### users with 200 events and more (200)" in lines
    assert sum(line.startswith("| sal | 1 |") and " – | – | 1.0 |" in line for line in lines) == 2
    assert sum(line.startswith("| full | 1 |") for line in lines) == 2
    assert "waiting" not in text
