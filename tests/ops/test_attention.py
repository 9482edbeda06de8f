"""Attention over jagged sequences against a dense mask in float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mufasa_rec.ops.attention import candidate_attention, causal_attention, rotary
from mufasa_rec.ops.jagged import GroupPlan, _plan, plan_groups, positions, sequence_ids
from tests.tensors import assert_close, gradients, leaf, offsets_of

HEADS, WIDTH = 2, 8
BATCHES = [[0, 1, 63, 0, 111, 7], [1], [5, 5, 5], [0, 0, 2], [0, 0], []]
CANDIDATES = [2, 0, 3, 1, 1, 4]


def grouped(offsets: Tensor, total: int) -> GroupPlan:
    return plan_groups(offsets, total)


def one_group(offsets: Tensor, total: int) -> GroupPlan:
    """The plan of an accelerator: every sequence, empty ones too, padded to an upper bound."""
    if not total:
        return _plan(offsets, 0, [], [])
    return _plan(offsets, total, [torch.arange(offsets.numel() - 1)], [120])


def attended(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, added: Tensor | float) -> Tensor:
    """Dense attention: queries `[Q, H, D]`, keys `[K, H, D]`, `allowed [Q, K]`, `added [H, Q, K]`."""
    logits = torch.einsum("qhd,khd->hqk", q, k) / WIDTH**0.5 + added
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def reference_causal(qkv: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    owner, place = sequence_ids(offsets, len(qkv)), positions(offsets, len(qkv))
    distance = place[:, None] - place
    allowed = (owner[:, None] == owner) & (distance >= 0)
    added = 0.0 if bias is None else bias[:, distance.clamp(min=0)]
    q, k, v = qkv.unbind(1)
    return attended(q, k, v, allowed, added)


def reference_candidates(qkv: Tensor, kv: Tensor, owner: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    of_event = sequence_ids(offsets, len(kv))
    lengths = offsets[1:] - offsets[:-1]
    to_event = lengths[owner][:, None] - positions(offsets, len(kv))  # 1 for the newest event
    itself = torch.eye(len(qkv), dtype=torch.bool)
    allowed = torch.cat([owner[:, None] == of_event, itself], dim=1)
    distance = torch.cat([to_event, torch.zeros(len(qkv), len(qkv), dtype=torch.int64)], dim=1)
    added = 0.0 if bias is None else bias[:, torch.where(allowed, distance, 0)]
    q, k, v = qkv.unbind(1)
    return attended(q, torch.cat([kv[:, 0], k]), torch.cat([kv[:, 1], v]), allowed, added)


def assert_same(fast: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor | None]) -> None:
    """Compare outputs and the gradients of all inputs."""
    results = []
    weight = None
    for function, dtype in ((fast, torch.float32), (truth, torch.float64)):
        given = [None if x is None else leaf(x, dtype) for x in inputs]
        out = function(*given)
        weight = torch.randn(out.shape, dtype=torch.float64) if weight is None else weight
        (out * weight.to(dtype)).sum().backward()
        results.append([out, *gradients(x for x in given if x is not None)])
    assert_close(results[0], results[1], 1e-5)


@pytest.mark.parametrize("plan_of", [grouped, one_group])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_causal_attention_equals_a_dense_mask_in_float64(
    lengths: list[int], biased: bool, plan_of: Callable[[Tensor, int], GroupPlan]
) -> None:
    torch.manual_seed(0)
    offsets, total = offsets_of(lengths), sum(lengths)
    plan = plan_of(offsets, total)
    bias = torch.randn(HEADS, 121) if biased else None
    assert_same(
        lambda qkv, b: causal_attention(qkv, plan, bias=b),
        lambda qkv, b: reference_causal(qkv, offsets, b),
        [torch.randn(total, 3, HEADS, WIDTH), bias],
    )


@pytest.mark.parametrize("plan_of", [grouped, one_group])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_candidate_attention_equals_a_dense_mask_in_float64(
    lengths: list[int], biased: bool, plan_of: Callable[[Tensor, int], GroupPlan]
) -> None:
    torch.manual_seed(0)
    offsets, total = offsets_of(lengths), sum(lengths)
    per_user = torch.tensor(CANDIDATES[: len(lengths)], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), per_user)
    plan = plan_of(offsets, total)
    bias = torch.randn(HEADS, 121) if biased else None
    assert_same(
        lambda qkv, kv, b: candidate_attention(qkv, kv, owner, plan, bias=b),
        lambda qkv, kv, b: reference_candidates(qkv, kv, owner, offsets, b),
        [torch.randn(len(owner), 3, HEADS, WIDTH), torch.randn(total, 2, HEADS, WIDTH), bias],
    )


def test_bf16_attention_stays_close_to_float64() -> None:
    torch.manual_seed(0)
    offsets = offsets_of(BATCHES[0])
    qkv = torch.randn(int(offsets[-1]), 3, HEADS, WIDTH)
    out = causal_attention(qkv.bfloat16(), plan_groups(offsets, len(qkv)))
    expected = reference_causal(qkv.double(), offsets, None)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


def test_bias_with_too_few_distances_is_refused() -> None:
    offsets = torch.tensor([0, 3])
    plan, qkv, bias = plan_groups(offsets, 3), torch.randn(3, 3, HEADS, WIDTH), torch.zeros(HEADS, 3)
    causal_attention(qkv, plan, bias=bias)
    with pytest.raises(ValueError, match="3 distances, but the longest sequence needs 4"):
        candidate_attention(qkv, qkv[:, 1:], torch.zeros(3, dtype=torch.int64), plan, bias=bias)
    with pytest.raises(ValueError, match="2 distances"):
        causal_attention(qkv, plan, bias=bias[:, :2])


@pytest.mark.parametrize("shift", [0, 1, 1000, 1_000_000])
def test_rotary_product_depends_on_the_distance_alone(shift: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64)
    product = [
        (rotary(q, torch.tensor([17 + by])) * rotary(k, torch.tensor([5 + by]))).sum().item() for by in (0, shift)
    ]
    assert product[1] == pytest.approx(product[0], abs=2e-5)


def test_rotary_keeps_lengths_and_leaves_position_zero_alone() -> None:
    x = torch.randn(4, HEADS, WIDTH)
    turned = rotary(x, torch.tensor([0, 1, 50, 64_000]))
    assert torch.equal(turned[0], x[0])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[1], x[1])


def test_rotary_wants_an_even_head_width() -> None:
    with pytest.raises(ValueError, match="width=7"):
        rotary(torch.randn(2, 1, 7), torch.arange(2))
