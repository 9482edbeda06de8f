"""The boundary: what is refused, what is registered, and that torch.compile works around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention import operator
from mufasa_rec.ops.sparse_attention.api import (
    Backend,
    attend_and_select,
    candidate_sparse_attention,
    sparse_attention,
)
from mufasa_rec.ops.sparse_attention.layout import plan_layout, unpack
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from tests.sparse import BASE, PATTERNS, attend, make_layout, make_rows, make_tokens
from tests.tensors import offsets_of

LENGTHS = [17, 0, 30]
ROWS = sum(LENGTHS)


def tokens(layout_tokens: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, layout_tokens, groups, 8)
    return k, v


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(3, 4, 8)}, r"x\.q: shape \(3, 4, 8\), expected \(47, H, D\)"),
        ({"q": torch.zeros(ROWS, 4, 8, dtype=torch.int64)}, r"x\.q: torch\.int64"),
        ({"k_window": torch.randn(ROWS, 3, 8)}, r"x\.k_window: shape \(47, 3, 8\); its heads must divide the 4 query"),
        ({"v_selected": torch.randn(ROWS, 2, 8)}, r"x\.v_selected: shape .* expected \(47, 1, 8\)"),
        ({"gates": torch.rand(ROWS, 4, 2)}, r"x\.gates: shape .* expected \(47, 4, 3\)"),
        ({"k_window": torch.randn(ROWS, 1, 8).bfloat16()}, r"x\.k_window: torch\.bfloat16, but q is torch\.float32"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    layout = make_layout(LENGTHS, BASE)
    with pytest.raises(ValueError, match=message):
        sparse_attention(make_rows(ROWS, 4, 1).map(**change), *tokens(layout.num_tokens), layout)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_every_input_gets_a_gradient_whatever_is_off(name: str, backend: Backend) -> None:
    layout, x, candidates = make_layout(LENGTHS, PATTERNS[name]), make_rows(ROWS, 4, 1), make_rows(2, 4, 1)
    k, v = make_tokens(layout, 1)
    events = attend_and_select(x, k, v, layout, backend=backend)[0]
    read = candidate_sparse_attention(candidates, x, k, v, torch.tensor([0, 2]), layout, backend=backend)
    for out, rows in ((events, [x]), (read, [x, candidates])):
        inputs = [tensor for given in rows for tensor in given.tensors().values()] + [k, v]
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), inputs))  # None would be refused


def test_tokens_selection_and_backends_that_do_not_fit_are_refused() -> None:
    layout, x = make_layout(LENGTHS, BASE), make_rows(ROWS, 4, 1)
    k, v = tokens(layout.num_tokens)
    arguments: list[tuple[tuple[Tensor, Tensor], dict[str, Any], str]] = [
        ((k[:1], v), {}, r"k_block: shape \(1, 1, 8\), expected \(5, 1, 8\)"),
        ((k, v.double()), {}, "v_block: torch.float64, but q is torch.float32"),
        ((k, v), {"selected": torch.zeros(3, 1, 2)}, "selected: torch.float32"),
        ((k, v), {"backend": "triton"}, "backend='triton'"),
        ((k, v), {"backend": "fast"}, "backend='fast'"),
        ((k * float("nan"), v), {"check_values": True}, "k_block: holds NaN"),
    ]
    for given, options, message in arguments:
        with pytest.raises(ValueError, match=message):
            sparse_attention(x, *given, layout, **options)
    with pytest.raises(ValueError, match=r"candidates\.q"):
        candidate_sparse_attention(make_rows(1, 2, 1), x, k, v, torch.tensor([0]), layout)
    with pytest.raises(ValueError, match=r"candidates\.gates: holds NaN"):
        candidate = make_rows(1, 4, 1).map(gates=torch.full((1, 4, 3), float("nan")))
        candidate_sparse_attention(candidate, x, k, v, torch.tensor([0]), layout, check_values=True)


def test_strided_inputs_of_one_projection_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    layout, x = make_layout(LENGTHS, BASE), make_rows(ROWS, 2, 2)
    together = torch.stack([x.q, x.k_window, x.v_window, x.k_selected, x.v_selected], dim=1).detach()
    names = ("q", "k_window", "v_window", "k_selected", "v_selected")
    strided = x.map(**dict(zip(names, together.unbind(1))))
    given = tokens(layout.num_tokens, 2)
    assert torch.equal(sparse_attention(strided, *given, layout), sparse_attention(x, *given, layout))


def test_shared_keys_get_the_sum_of_the_gradients_of_both_branches() -> None:
    torch.manual_seed(0)
    layout, x = make_layout(LENGTHS, BASE), make_rows(ROWS, 2, 1, shared=True)
    apart = x.map(k_selected=x.k_selected.detach().clone(), v_selected=x.v_selected.detach().clone())
    apart.k_selected.requires_grad_(), apart.v_selected.requires_grad_()
    assert x.shared
    assert not apart.shared
    given = tokens(layout.num_tokens)
    grads = []
    for rows in (x, apart):
        leaves = (rows.k_window, rows.v_window, *(() if rows.shared else (rows.k_selected, rows.v_selected)))
        grads.append(torch.autograd.grad(sparse_attention(rows, *given, layout).sum(), leaves))
    for place in (0, 1):
        torch.testing.assert_close(grads[0][place], grads[1][place] + grads[1][place + 2])


@pytest.mark.parametrize("shared", [False, True])
def test_operator_is_registered_rightly(shared: bool) -> None:
    torch.manual_seed(0)
    layout, x = make_layout(LENGTHS, BASE), make_rows(ROWS, 2, 1, shared=shared)
    given = tokens(layout.num_tokens)
    given[0].requires_grad_(), given[1].requires_grad_()
    _, chosen = attend_and_select(x, *given, layout)
    for selected in (None, chosen):
        arguments = operator.rows_of(x), *given, operator.remember(layout), selected, shared
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator.sparse_attention_op, arguments, test_utils=tests)


def test_compiled_model_works_around_the_operator() -> None:
    torch.manual_seed(0)
    results = []
    layout, x = make_layout(LENGTHS, BASE), make_rows(ROWS, 2, 1)
    k, v = tokens(layout.num_tokens)

    def layer(q: Tensor) -> Tensor:
        return sparse_attention(x.map(q=q * 2), k, v, layout).square()

    for function in (layer, torch.compile(layer, backend="aot_eager")):
        q = x.q.detach().clone().requires_grad_()
        out = function(q)
        out.sum().backward()
        results.append((out, q.grad))
    torch.testing.assert_close(results[0], results[1])


def test_autocast_does_not_reach_into_the_operator() -> None:
    torch.manual_seed(0)
    layout, x = make_layout(LENGTHS, BASE), make_rows(ROWS, 2, 1)
    given = tokens(layout.num_tokens)
    plain = sparse_attention(x, *given, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse_attention(x, *given, layout), plain)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_forgotten_layout_is_rebuilt_from_its_packed_form(name: str) -> None:
    layout = make_layout(LENGTHS, PATTERNS[name], [0, 4, 3])
    again = unpack(layout.packed)
    assert again.pattern == PATTERNS[name]
    for part in ("blocks", "tokens"):
        for field in ("begin", "end", "readable", "offsets"):
            assert torch.equal(getattr(getattr(layout, part), field), getattr(getattr(again, part), field))
    assert torch.equal(layout.tiles.begin, again.tiles.begin)


def test_backward_finds_its_layout_after_many_others() -> None:
    torch.manual_seed(0)
    x = make_rows(ROWS, 2, 1)
    grads = []
    for others in (0, 2 * operator._KEPT):
        out = attend(x, make_layout(LENGTHS, BASE))[0]
        for _ in range(others):
            operator.remember(plan_layout(offsets_of([3]), BASE))
        grads.append(torch.autograd.grad(out.sum(), x.k_window)[0])
    assert torch.equal(grads[0], grads[1])


def test_an_empty_batch_has_an_output_and_gradients() -> None:
    layout, x = make_layout([0, 0], SparsePattern()), make_rows(0, 2, 1)
    out = attend(x, layout)[0]
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    assert all(t.grad is not None for t in x.tensors().values())
