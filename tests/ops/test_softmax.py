"""Chunked softmax losses against autograd in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mufasa_rec.ops import softmax
from mufasa_rec.ops.softmax import full_softmax_loss, sampled_softmax_loss
from tests.tensors import assert_close, gradients, leaf

SIZES = [(0, 0), (0, 5), (1, 1), (5, 7), (63, 111), (200, 3)]


class Case(NamedTuple):
    query: Tensor
    positive: Tensor
    candidates: Tensor
    bias: Tensor
    target_id: Tensor
    candidate_id: Tensor
    weight: Tensor


def make_case(num_queries: int, num_candidates: int, num_items: int = 20) -> Case:
    """Queries and candidates of few items, so that candidates repeat and collide with targets."""
    return Case(
        query=torch.randn(num_queries, 16) * 4,
        positive=F.normalize(torch.randn(num_queries, 16), dim=1),
        candidates=F.normalize(torch.randn(num_candidates, 16), dim=1),
        bias=torch.randn(num_candidates),
        target_id=torch.randint(0, num_items, (num_queries,)),
        candidate_id=torch.randint(0, num_items, (num_candidates,)),
        weight=torch.rand(num_queries) * 2,
    )


def reference_sampled(case: Case) -> Tensor:
    scores = case.query @ case.candidates.T + case.bias
    scores = scores.masked_fill(case.target_id[:, None] == case.candidate_id, float("-inf"))
    mine = (case.query * case.positive).sum(1, keepdim=True)
    return (case.weight * (torch.logsumexp(torch.cat([mine, scores], dim=1), dim=1) - mine.squeeze(1))).sum()


def reference_full(query: Tensor, vectors: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (F.cross_entropy(query @ vectors.T, target, reduction="none") * weight).sum()


def doubled(case: Case) -> Case:
    return Case(*(x.detach().double() if x.is_floating_point() else x for x in case))


def with_gradient(case: Case) -> tuple[Case, list[Tensor]]:
    query, positive, candidates = (leaf(x) for x in case[:3])
    return case._replace(query=query, positive=positive, candidates=candidates), [query, positive, candidates]


@pytest.mark.parametrize("chunk", [1, 1 << 19])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sampled_loss_and_gradients_equal_float64(
    sizes: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    case, learned = with_gradient(make_case(*sizes))
    truth, learned_truth = with_gradient(doubled(case))
    loss, expected = sampled_softmax_loss(*case), reference_sampled(truth)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    assert_close([loss, *gradients(learned)], [expected, *gradients(learned_truth)], 1e-5)


@pytest.mark.parametrize("chunk", [1, 1 << 19])
@pytest.mark.parametrize("sizes", [s for s in SIZES if s[1] or not s[0]], ids=str)
def test_full_loss_and_gradients_equal_float64(
    sizes: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    query, vectors, weight = torch.randn(sizes[0], 16) * 4, torch.randn(sizes[1], 16), torch.rand(sizes[0])
    target = torch.randint(0, max(sizes[1], 1), (sizes[0],))
    results = []
    for function, dtype in ((full_softmax_loss, torch.float32), (reference_full, torch.float64)):
        learned = leaf(query, dtype), leaf(vectors, dtype)
        loss = function(learned[0], learned[1], target, weight.to(dtype))
        (loss * 0.3).backward()
        results.append([loss, *gradients(learned)])
    assert_close(results[0], results[1], 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
def test_gradient_is_the_slope_of_the_loss(num_queries: int, num_candidates: int, seed: int) -> None:
    """As gradcheck, which wants float64: a small step along the gradient changes the loss by its squared length."""
    torch.manual_seed(seed)
    case, learned = with_gradient(make_case(num_queries, num_candidates))
    sampled_softmax_loss(*case).backward()
    slopes = [x.double() for x in gradients(learned)]
    square = sum(float(g.square().sum()) for g in slopes)
    truth, step = doubled(case), 1e-6

    def at(distance: float) -> float:
        query, positive, candidates = (x + distance * g for x, g in zip(truth[:3], slopes, strict=True))
        return reference_sampled(truth._replace(query=query, positive=positive, candidates=candidates)).item()

    slope = (at(step) - at(-step)) / (2 * step)
    assert slope == pytest.approx(square, rel=1e-4, abs=1e-6)


def test_negative_equal_to_the_positive_is_dropped() -> None:
    torch.manual_seed(0)
    case = make_case(6, 10)
    case = case._replace(target_id=torch.arange(6), candidate_id=torch.arange(10))
    for index in range(6):
        one = Case(*(x[index : index + 1] if len(x) == 6 else x for x in case))
        keep = torch.arange(10) != index
        less = one._replace(
            candidates=case.candidates[keep], bias=case.bias[keep], candidate_id=case.candidate_id[keep]
        )
        assert torch.allclose(sampled_softmax_loss(*one), sampled_softmax_loss(*less), atol=1e-6)


def test_query_whose_negatives_are_all_dropped_adds_nothing() -> None:
    torch.manual_seed(0)
    case, learned = with_gradient(make_case(4, 5, num_items=1))
    loss = sampled_softmax_loss(*case)
    loss.backward()
    assert loss.item() == 0.0
    assert all((g == 0).all() for g in gradients(learned))


def test_query_of_weight_zero_adds_nothing() -> None:
    torch.manual_seed(0)
    case, learned = with_gradient(make_case(4, 5)._replace(weight=torch.zeros(4)))
    sampled_softmax_loss(*case).backward()
    assert all((g == 0).all() for g in gradients(learned))


def test_large_scores_do_not_overflow() -> None:
    case = make_case(8, 9)
    case, learned = with_gradient(case._replace(query=case.query * 1000))
    loss = sampled_softmax_loss(*case) + full_softmax_loss(case.query, case.candidates, torch.arange(8), case.weight)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(learned))


@pytest.mark.parametrize("full", [False, True])
def test_under_bf16_autocast_the_loss_is_exact_and_gradients_are_close(full: bool) -> None:
    torch.manual_seed(0)
    case = make_case(63, 111, num_items=2000)
    results = []
    for low in (False, True):
        given, learned = with_gradient(case)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if full:
                loss = full_softmax_loss(given.query, given.candidates, torch.arange(63), given.weight)
            else:
                loss = sampled_softmax_loss(*given)
        loss.backward()
        assert loss.dtype == torch.float32
        results.append((loss, [x.grad for x in learned if x.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[1][1], results[0][1], 1e-2)


def test_bf16_inputs_give_bf16_gradients_and_an_fp32_loss() -> None:
    torch.manual_seed(0)
    case = make_case(5, 7)
    low, learned = with_gradient(Case(*(x.bfloat16() if x.is_floating_point() else x for x in case)))
    loss = sampled_softmax_loss(*low)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in gradients(learned))
    assert loss.item() == pytest.approx(reference_sampled(doubled(case)).item(), rel=2e-2)


def test_without_gradient_only_the_loss_is_computed() -> None:
    case = make_case(5, 7)
    assert not sampled_softmax_loss(*case).requires_grad
    with torch.no_grad():
        loss = full_softmax_loss(case.query.requires_grad_(), case.candidates, torch.arange(5), case.weight)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.randn(7, 8)}, "candidates: shape"),
        ({"positive": torch.randn(4, 16)}, "positive: 4 entries for 5 rows"),
        ({"positive": torch.randn(5, 8)}, "positive: shape"),
        ({"bias": torch.zeros(6)}, "bias: 6 entries for 7 rows"),
        ({"candidate_id": torch.zeros(8, dtype=torch.int64)}, "candidate_id: 8 entries"),
        ({"weight": torch.ones(1)}, "weight: 1 entries"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled_softmax_loss(*make_case(5, 7)._replace(**change))


def test_full_softmax_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match="vectors: none for 2 queries"):
        full_softmax_loss(torch.randn(2, 4), torch.randn(0, 4), torch.zeros(2, dtype=torch.int64), torch.ones(2))
