"""What must hold whatever the numbers are: causality, independence of sequences, ties, equality with full attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mufasa_rec.ops.attention import causal_attention
from mufasa_rec.ops.jagged import plan_groups
from mufasa_rec.ops.sparse_attention.api import Backend, attend_and_select, sparse_attention
from mufasa_rec.ops.sparse_attention.layout import plan_layout
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected
from tests.sparse import BASE, PATTERNS, attend, make_layout, make_rows, random_times, take
from tests.tensors import offsets_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = [21, 0, 40, 1, 63]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_future_event_does_not_change_past_output(name: str, backend: Backend) -> None:
    """Neither its keys and values nor its query nor its time: borders, pooled blocks and shared choices stay."""
    torch.manual_seed(0)
    times = random_times(50)
    x, other = make_rows(50, 4, 2), make_rows(50, 4, 2)
    before = attend(x, make_layout([50], PATTERNS[name], times=times), backend)[0]
    for first in (15, 16, 17, 31, 47, 48, 49):
        mixed = Projected(**{k: torch.cat([t[:first], other.tensors()[k][first:]]) for k, t in x.tensors().items()})
        moved = torch.cat([times[:first], times[first:] + 500])
        after = attend(mixed, make_layout([50], PATTERNS[name], times=moved), backend)[0]
        torch.testing.assert_close(after[:first], before[:first], **CLOSE)
        assert not torch.equal(after[first], before[first])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("start", [0, 5])
def test_appending_events_leaves_earlier_outputs_equal(name: str, start: int) -> None:
    torch.manual_seed(0)
    x, times = make_rows(63, 2, 1), random_times(63)
    whole = attend(x, make_layout([63], PATTERNS[name], [start], times))[0]
    for length in [*range(1, 20), 31, 32, 33, 47, 48, 62]:
        part = attend(take(x, slice(length)), make_layout([length], PATTERNS[name], [start], times[:length]))[0]
        torch.testing.assert_close(part, whole[:length], **CLOSE)


@pytest.mark.parametrize("name", PATTERNS)
def test_sequences_do_not_see_each_other_and_permuting_them_permutes_outputs(name: str) -> None:
    torch.manual_seed(0)
    offsets, times = offsets_of(LENGTHS).tolist(), random_times(sum(LENGTHS))
    x, starts = make_rows(sum(LENGTHS), 2, 2, shared=True), [3, 0, 8, 1, 0]
    together = attend(x, make_layout(LENGTHS, PATTERNS[name], starts, times))[0]
    order = [4, 2, 0, 1, 3]
    rows = torch.cat([torch.arange(offsets[b], offsets[b + 1]) for b in order])
    layout = make_layout([LENGTHS[b] for b in order], PATTERNS[name], [starts[b] for b in order], times[rows])
    torch.testing.assert_close(attend(take(x, rows), layout)[0], together[rows], **CLOSE)
    for b, length in enumerate(LENGTHS):
        mine = slice(offsets[b], offsets[b + 1])
        alone = make_layout([length], PATTERNS[name], [starts[b]], times[mine])
        torch.testing.assert_close(attend(take(x, mine), alone)[0], together[mine], **CLOSE)


def full_attention(x: Projected, k: Tensor, v: Tensor) -> Tensor:
    ratio = x.q.shape[1] // x.groups
    qkv = torch.stack([x.q, k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)], dim=1)
    return causal_attention(qkv, plan_groups(offsets_of(LENGTHS), sum(LENGTHS)))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shared", [False, True])
def test_diverged_sequence_leaves_outputs_and_gradients_of_the_others(name: str, shared: bool) -> None:
    """Tiles may gather rows of the next sequence; not even its NaN gets out of it."""
    torch.manual_seed(0)
    lengths = [5, 17, 9, 70, 3, 40]
    times, weight = random_times(sum(lengths)), torch.randn(sum(lengths), 2, 8)
    layout, x = make_layout(lengths, PATTERNS[name], times=times), make_rows(sum(lengths), 2, 1, shared=shared)
    offsets = offsets_of(lengths).tolist()
    for poisoned in range(len(lengths)):
        ill = torch.zeros(sum(lengths), 1, 1, dtype=torch.bool)
        ill[offsets[poisoned] : offsets[poisoned + 1]] = True
        with_nan = {id(t): t.detach().masked_fill(ill, float("nan")).requires_grad_() for t in x.tensors().values()}
        runs = []
        for inputs in (x, Projected(**{field: with_nan[id(t)] for field, t in x.tensors().items()})):
            leaves = [*{id(t): t for t in inputs.tensors().values()}.values()]
            out = attend(inputs, layout)[0]
            kept = (out * weight)[~ill.flatten()].sum()
            grads = torch.autograd.grad(kept, leaves, allow_unused=True)
            runs.append([out, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))])
        for clean, sick in zip(*runs, strict=True):
            torch.testing.assert_close(sick[~ill.flatten()], clean[~ill.flatten()], **CLOSE)


@pytest.mark.parametrize("name", ["tiles of a block", "no sharing", "overlapping tokens", "no first block", "timegap"])
def test_all_blocks_selected_is_full_causal_attention(name: str) -> None:
    torch.manual_seed(0)
    x = make_rows(sum(LENGTHS), 4, 2)
    pattern = replace(PATTERNS[name], num_selected=40, block_branch=False, window_branch=False)
    out = attend(x, make_layout(LENGTHS, pattern, [0, 0, 5, 0, 2]))[0]
    expected = x.gates[..., SELECTED, None] * full_attention(x, x.k_selected, x.v_selected)
    torch.testing.assert_close(out, expected, **CLOSE)


def test_a_window_as_long_as_the_history_is_full_causal_attention() -> None:
    torch.manual_seed(0)
    x = make_rows(sum(LENGTHS), 2, 1)
    expected = x.gates[..., WINDOW, None] * full_attention(x, x.k_window, x.v_window)
    for window in (None, 63, 200):
        pattern = replace(PATTERNS["full causal"], window=window)
        torch.testing.assert_close(attend(x, make_layout(LENGTHS, pattern))[0], expected, **CLOSE)


def test_one_event_blocks_make_the_block_branch_full_causal_attention() -> None:
    torch.manual_seed(0)
    x = make_rows(sum(LENGTHS), 2, 1)
    pattern = replace(BASE, block=1, window_branch=False, selected_branch=False)
    same = x.map(q=x.q_block)
    expected = x.gates[..., BLOCK, None] * full_attention(same, x.k_selected, x.v_selected)
    torch.testing.assert_close(attend(x, make_layout(LENGTHS, pattern))[0], expected, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_equal_scores_go_to_the_lower_block(heads: tuple[int, int], backend: Backend) -> None:
    """Keys of all blocks are equal but one's, which scores less in every head."""
    layout = plan_layout(offsets_of([96]), BASE)
    x = make_rows(96, *heads)
    x.q_block.data.fill_(1.0)
    k_block = torch.ones(layout.num_tokens, heads[1], 8)
    k_block[1] = 0.5
    _, chosen = attend_and_select(x, k_block, k_block, layout, backend=backend)
    last = [sorted(places) for places in chosen[-1].tolist()]
    assert last == [[2, 3]] * heads[1]
    second, third = chosen[2], chosen[3]
    assert second.tolist() == [[1, -1]] * heads[1]  # the only one between the first block and its own
    assert [sorted(places) for places in third.tolist()] == [[1, 2]] * heads[1]


def test_every_head_group_chooses_for_itself() -> None:
    torch.manual_seed(0)
    layout = plan_layout(offsets_of([96]), BASE)
    x = make_rows(96, 2, 2)
    k_block = torch.zeros(layout.num_tokens, 2, 8)
    k_block[5, 0], k_block[7, 1] = x.q_block.data[88, 0] * 9, x.q_block.data[88, 1] * 9
    _, chosen = attend_and_select(x, k_block, k_block, layout)
    assert chosen[11, :, 0].tolist() == [5, 7]


def test_a_tile_shares_the_choice_of_its_first_query() -> None:
    torch.manual_seed(0)
    x = make_rows(96, 1, 1)
    choices = {}
    for name in ("tiles of a block", "tiles of 2", "no sharing"):
        layout = make_layout([96], PATTERNS[name])
        chosen = attend(x, layout)[1]
        choices[name] = dict(zip(layout.tiles.begin.tolist(), chosen.tolist(), strict=True))
    for name, choice in choices.items():
        assert all(choices["no sharing"][query] == places for query, places in choice.items()), name


def test_same_layout_serves_inputs_of_other_heads_and_dtypes() -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, BASE)
    for heads, dtype in (((4, 2), torch.float32), ((2, 2), torch.float64), ((4, 1), torch.bfloat16)):
        rows = make_rows(sum(LENGTHS), *heads).tensors()
        x = Projected(**{name: tensor.detach().to(dtype) for name, tensor in rows.items()})
        k_block, v_block = torch.randn(2, layout.num_tokens, heads[1], 8).to(dtype)
        assert sparse_attention(x, k_block, v_block, layout).dtype == dtype
