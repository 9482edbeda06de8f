"""Candidates: each sees its user's history and itself, and nothing else."""

from __future__ import annotations

import pytest
import torch

from mufasa_rec.ops.sparse_attention import candidates as candidates_module
from mufasa_rec.ops.sparse_attention.api import Backend, candidate_sparse_attention
from mufasa_rec.ops.sparse_attention.pooling import pool_blocks
from mufasa_rec.ops.sparse_attention.projected import Projected
from tests.sparse import (
    BASE,
    LENGTHS,
    PATTERNS,
    as_leaves,
    attend,
    copies_of,
    make_layout,
    make_rows,
    make_tokens,
    take,
)
from tests.tensors import assert_close, gradients, leaf

STARTS = [0, 3, 1, 8, 0, 0, 0, 0, 4, 2]
BACKENDS: list[tuple[Backend, torch.dtype]] = [("blocked", torch.float32), ("reference", torch.float64)]
OWNER = torch.tensor([6, 0, 6, 3, 9, 1, 2, 4, 5, 7, 8, 6])


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_candidates_equal_the_definition(name: str, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, PATTERNS[name], STARTS)
    x, c = make_rows(sum(LENGTHS), *heads), make_rows(len(OWNER), *heads)
    tokens = make_tokens(layout, heads[1])
    weight = torch.randn(len(OWNER), heads[0], 8)
    results = []
    for backend, dtype in BACKENDS:
        mine, events, keys = as_leaves(c, dtype), as_leaves(x, dtype), copies_of(tokens, dtype)
        out = candidate_sparse_attention(mine, events, *keys, OWNER, layout, backend=backend)
        leaves = [*mine.tensors().values(), *events.tensors().values(), *keys]
        ((out * weight).sum() + 0 * sum(t.sum() for t in leaves)).backward()  # the definition may leave some unread
        results.append([out, *gradients(leaves)])
    assert_close(results[0], results[1], 1e-5)


@pytest.mark.parametrize("name", [name for name in PATTERNS if PATTERNS[name].segmentation == "fixed"])
def test_candidate_scores_as_the_next_event_would(name: str) -> None:
    """With a tile of its own an appended event gets what the candidate got."""
    torch.manual_seed(0)
    for length in (1, 7, 8, 9, 40, 47):
        rows, pattern = make_rows(length + 1, 2, 1), PATTERNS[name]
        layout = make_layout([length], pattern)
        past, last = take(rows, slice(length)), take(rows, slice(length, None))
        tokens = pool_blocks(past.k_selected, layout), pool_blocks(past.v_selected, layout)
        out = candidate_sparse_attention(last, past, *tokens, torch.tensor([0]), layout)
        longer = make_layout([length + 1], pattern)
        starts_tile = length in longer.tiles.begin
        closes_block = bool((longer.tokens.readable == length).any())  # it then reads its own block's token as well
        if starts_tile and not closes_block:
            torch.testing.assert_close(out, attend(rows, longer)[0][-1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiles of a block", "overlapping tokens", "timegap", "full causal"])
def test_permuting_and_removing_candidates_changes_no_other_score(name: str) -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, PATTERNS[name], STARTS)
    x, c = make_rows(sum(LENGTHS), 2, 1), make_rows(len(OWNER), 2, 1)
    tokens = make_tokens(layout, 1)
    whole = candidate_sparse_attention(c, x, *tokens, OWNER, layout)
    for rows in (torch.randperm(len(OWNER)), torch.tensor([0, 3, 11]), torch.tensor([2])):
        part = candidate_sparse_attention(take(c, rows), x, *tokens, OWNER[rows], layout)
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-6)


def test_another_user_changes_no_candidate() -> None:
    torch.manual_seed(0)
    layout = make_layout([40, 30], BASE)
    x, other, c = make_rows(70, 2, 1), make_rows(70, 2, 1), make_rows(2, 2, 1)
    tokens = make_tokens(layout, 1)
    mixed = Projected(**{k: torch.cat([t[:40], other.tensors()[k][40:]]) for k, t in x.tensors().items()})
    owner = torch.tensor([0, 0])
    before, after = (candidate_sparse_attention(c, rows, *tokens, owner, layout) for rows in (x, mixed))
    assert torch.equal(before, after)


def test_candidate_of_a_user_without_history_sees_itself_alone() -> None:
    torch.manual_seed(0)
    c, x = make_rows(2, 2, 1), make_rows(0, 2, 1)
    layout = make_layout([0, 0], BASE)
    tokens = make_tokens(layout, 1)
    out = candidate_sparse_attention(c, x, *tokens, torch.tensor([1, 0]), layout)
    torch.testing.assert_close(out, c.gates[..., :1] * c.v_window + c.gates[..., 1:2] * c.v_selected)


def test_no_candidates_still_connect_every_input() -> None:
    layout = make_layout([20], BASE)
    c, x = make_rows(0, 2, 1), make_rows(20, 2, 1)
    tokens = leaf(torch.zeros(2, 1, 8)), leaf(torch.zeros(2, 1, 8))
    out = candidate_sparse_attention(c, x, *tokens, torch.zeros(0, dtype=torch.int64), layout)
    assert out.shape == (0, 2, 8)
    out.sum().backward()
    assert not any(g.any() for g in gradients([*x.tensors().values(), *tokens]))


def test_chunks_of_candidates_give_the_same_scores_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, BASE, STARTS)
    x, c = make_rows(sum(LENGTHS), 2, 1), make_rows(len(OWNER), 2, 1)
    tokens = make_tokens(layout, 1)
    results = []
    for size in (candidates_module._CHUNK_ELEMENTS, 1):
        monkeypatch.setattr(candidates_module, "_CHUNK_ELEMENTS", size)
        rows, many = as_leaves(c), as_leaves(x)
        out = candidate_sparse_attention(rows, many, *tokens, OWNER, layout)
        out.square().sum().backward()
        results.append([out, *gradients([rows.q, many.k_window, many.v_selected])])
    assert_close(results[0], results[1], 1e-6)
