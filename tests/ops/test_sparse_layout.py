"""Patterns, borders of blocks, layouts and the pooling of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mufasa_rec.ops.sparse_attention.layout import plan_layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern, ablate
from mufasa_rec.ops.sparse_attention.plan import plan_tiles
from mufasa_rec.ops.sparse_attention.pooling import pool_blocks
from mufasa_rec.ops.sparse_attention.segments import coherence_borders, fixed_borders, timegap_borders
from tests.sparse import BASE, LENGTHS, PATTERNS, make_layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0: choose 1 or more"),
        ({"block": 0}, "block=0: choose 1 or more"),
        ({"stride": 48}, "stride=48: must divide block=64"),
        ({"block": 32, "stride": 32, "selected_block": 48}, "stride=32: must divide selected_block=48"),
        ({"selection_stride": 24}, "selection_stride=24: must divide selected_block=64"),
        ({"num_selected": 1}, "num_selected=1: .* take 2; choose 2 or more"),
        ({"segmentation": "topics"}, "segmentation='topics': choose one of"),
        ({"segmentation": "timegap", "stride": 32}, "segmentation='timegap': .* leave stride"),
        ({"min_block": 65}, "min_block=65: above block=64"),
        ({"window_branch": False, "selected_branch": False, "block_branch": False}, "all off; leave one on"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsePattern(**fields)


def test_cap_grows_blocks_once_for_a_run_and_keeps_the_selected_events() -> None:
    pattern = SparsePattern(block=16, num_selected=16, selection_stride=8, max_blocks=100)
    assert pattern.resolve(1000).block == 16
    capped = pattern.resolve(5000)
    assert (capped.block, capped.num_selected, capped.tile, capped.max_blocks) == (64, 4, 8, None)
    assert pattern.resolve(10**6).num_selected == 2  # the first block and its own
    assert SparsePattern().resolve(5000) == SparsePattern()
    with pytest.raises(ValueError, match="max_history=0"):
        pattern.resolve(0)


def test_unknown_ablation_is_refused() -> None:
    with pytest.raises(ValueError, match="ablation='nothing'"):
        ablate(BASE, "nothing")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        ([0, 5, 3], {}, "must begin at 0 and never fall"),
        ([1, 5], {}, "must begin at 0 and never fall"),
        ([0, 5], {"start_position": torch.zeros(2)}, "start_position"),
        ([0, 5], {"borders": torch.ones(5, dtype=torch.bool)}, "borders: given"),
        ([0, 5], {"pattern": PATTERNS["timegap"]}, "borders: none"),
        ([0, 5], {"pattern": PATTERNS["timegap"], "borders": torch.ones(4, dtype=torch.bool)}, "borders: torch.bool"),
        ([0, 9], {"pattern": PATTERNS["timegap"], "borders": torch.zeros(9, dtype=torch.bool)}, "a block of 9 events"),
        ([0, 5], {"pattern": SparsePattern(max_blocks=3)}, r"max_blocks=3: .* call pattern\.resolve"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(offsets: list[int], options: dict[str, Any], message: str) -> None:
    given_options = dict(options)
    pattern = given_options.pop("pattern", BASE)
    with pytest.raises(ValueError, match=message):
        plan_layout(torch.tensor(offsets), pattern, **given_options)


def test_rows_cut_at_whole_blocks_have_the_blocks_of_the_whole_stream() -> None:
    whole = fixed_borders(torch.tensor([0, 50]), torch.tensor([0]), 50, 8)
    cut = fixed_borders(torch.tensor([0, 26]), torch.tensor([24]), 26, 8)
    assert torch.equal(whole[24:], cut)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    gaps=st.lists(st.sampled_from([1, 50, 200]), min_size=1, max_size=60),
    shortest=st.integers(1, 4),
    more=st.integers(0, 6),
)
def test_borders_keep_their_bounds_and_follow_long_pauses_only(gaps: list[int], shortest: int, more: int) -> None:
    times, longest, offsets = torch.tensor(gaps).cumsum(0), shortest + more, torch.tensor([0, len(gaps)])
    borders = timegap_borders(offsets, times, gap_ms=100, shortest=shortest, longest=longest)
    begins = torch.nonzero(borders).squeeze(1).tolist()
    assert begins[0] == 0
    for a, b in zip(begins[:-1], begins[1:], strict=True):
        assert shortest <= b - a <= longest
        assert gaps[b] > 100 or b - a == longest
        assert not any(gap > 100 for gap in gaps[a + shortest : b])
    earlier = timegap_borders(torch.tensor([0, len(gaps) // 2]), times[: len(gaps) // 2], gap_ms=100, shortest=shortest,
                              longest=longest)  # fmt: skip
    assert torch.equal(earlier, borders[: len(gaps) // 2])


def test_pauses_between_users_are_no_pauses() -> None:
    times = torch.tensor([0, 1, 2, 900, 901, 902])
    options = {"gap_ms": 100, "shortest": 1, "longest": 8}
    assert timegap_borders(torch.tensor([0, 3, 6]), times, **options).tolist() == [True, False, False] * 2
    assert timegap_borders(torch.tensor([0, 6]), times, **options).tolist() == [True, False, False] * 2


def test_content_turns_are_borders() -> None:
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 1.0]])
    borders = coherence_borders(torch.tensor([0, 5]), vectors, cosine=0.5, shortest=1, longest=8)
    assert borders.tolist() == [True, False, True, False, False]


def test_block_that_ended_early_is_readable_from_the_next_event_on() -> None:
    borders = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0], dtype=torch.bool)
    layout = plan_layout(torch.tensor([0, 13]), PATTERNS["timegap"], borders=borders)
    assert layout.tokens.begin.tolist() == [0, 3]
    assert layout.tokens.readable.tolist() == [3, 10]  # the second has 8 events, all that a block may have
    assert layout.visible_tokens.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_query_lies_in_one_tile_of_a_branch_at_most(name: str) -> None:
    for starts in ([0] * len(LENGTHS), range(len(LENGTHS))):
        layout = make_layout(LENGTHS, PATTERNS[name], starts)
        plan = plan_tiles(layout)
        for groups, everyone in (
            (plan.window, True),
            (plan.selected, False),
            (plan.block, False),
        ):
            count = torch.zeros(layout.num_events, dtype=torch.int64)
            for group in groups:
                answered = torch.full_like(group.queries, group.rows)
                if group.spare is not None:
                    answered -= group.spare.rows.sum(1)
                for begin, rows in zip(group.queries.tolist(), answered.tolist(), strict=True):
                    count[begin : begin + rows] += 1
            assert count.max() == 1
            assert not everyone or count.min() == 1


def test_last_tiles_of_sequences_are_few_shapes() -> None:
    """Also where the batch ends, and where blocks end by pauses; else each would be a shape of its own."""
    for name in ("tiles of a block", "timegap"):
        layout = make_layout([*range(1, 64), 111], PATTERNS[name])
        plan = plan_tiles(layout)
        assert max(len(plan.window), len(plan.selected), len(plan.block)) <= 45


@pytest.mark.parametrize("name", ["tiles of a block", "overlapping tokens", "coherence"])
def test_pooling_is_a_softmax_over_the_places_of_a_block(name: str) -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, PATTERNS[name], range(len(LENGTHS)))
    block = PATTERNS[name].block
    rows = torch.randn(sum(LENGTHS), 2, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(block, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(block, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = (rows, logits, positions)
    out = pool_blocks(rows, layout, logits=logits, positions=positions)
    expected = torch.stack(
        [
            (logits[: b - a].softmax(0)[..., None] * (rows[a:b] + positions[: b - a])).sum(0)
            for a, b in zip(layout.tokens.begin.tolist(), layout.tokens.end.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves)
    )
    plain = pool_blocks(rows.detach()[..., :1], layout)
    means = [rows[a:b, :, :1].mean(0) for a, b in zip(layout.tokens.begin.tolist(), layout.tokens.end.tolist())]
    torch.testing.assert_close(plain, torch.stack(means))


def test_pooling_weights_of_another_block_are_refused() -> None:
    layout = make_layout([20], BASE)
    with pytest.raises(ValueError, match=r"logits: shape \(5, 1\)"):
        pool_blocks(torch.randn(20, 1, 4), layout, logits=torch.zeros(5, 1))
