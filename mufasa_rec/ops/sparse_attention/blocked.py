"""Sparse attention in tiles: plain PyTorch on any device, memory of order L, with its own backward.

A tile's queries and keys are gathered as runs, its logits live in the cache, and only outputs and log-sum-exps are
kept per branch: backward computes the logits again. Every branch has a maximum of its own for each row, so that a
branch whose logits lie far below another's does not underflow. Matrix products are in fp32 (float64 for float64), also
for bf16 inputs: the logits of a softmax need the digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.fused import backward_fused, forward_fused
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.plan import Plan, TileGroup, plan_tiles
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected
from mufasa_rec.ops.sparse_attention.selection import SelectionPlan, plan_selection, select_blocks
from mufasa_rec.ops.sparse_attention.tiles import (
    LOG2E,
    Runs,
    add_keys,
    add_rows,
    chunks_of,
    exact_dtype,
    masked_logits,
    take_keys,
    take_queries,
    take_rows,
)

_CHUNK_EVENTS = 1 << 11


@dataclass(frozen=True)
class _Branch:
    """One branch: what it attends with, and its tiles."""

    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    groups: list[TileGroup]


def forward(
    x: Projected, k_block: Tensor, v_block: Tensor, layout: Layout, selected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend.

    Returns:
        The attended values, `[L, H, D]`; each branch's own, `[3, L, H, D]`, and base-2 log-sum-exp, `[3, L, H]`, for
        the backward; the scored blocks, `[N, G, S]`.
    """
    exact = exact_dtype(x.q.dtype)
    if selected is None:
        selected = select_blocks(x.q_block, k_block, layout, _selection_plan(layout))
    partial = x.q.new_zeros(3, *x.q.shape)
    lse = x.q.new_zeros(3, *x.q.shape[:2], dtype=exact)
    for runs in chunks_of(_plan(layout, x.shared).fused, x.q, x.k_window, layout, selected):
        forward_fused(x, runs, partial, lse)
    for branch in _branches(x, k_block, v_block, layout):
        for runs in chunks_of(branch.groups, branch.q, branch.k, layout, selected):
            _forward_chunk(branch, runs, partial[branch.number], lse[branch.number])
    return _gated(partial, x.gates, layout), partial, lse, selected


def backward(
    grad: Tensor,
    x: Projected,
    keys: tuple[Tensor, Tensor],
    layout: Layout,
    saved: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Tensor]:
    """Gradients of all inputs, by name.

    Args:
        grad: Gradient of the attended values, `[L, H, D]`.
        x: What `forward` was given.
        keys: `k_block` and `v_block`.
        layout: The batch's blocks.
        saved: Each branch's values, log-sum-exp, and the scored blocks, from `forward`.
    """
    partial, lse, selected = saved
    exact, grad = exact_dtype(x.q.dtype), grad.contiguous()
    grad_gates = _grad_gates(partial, grad, layout, exact)  # [3, L, H]
    gates = x.gates.movedim(-1, 0).to(exact).contiguous()
    found = {name: torch.zeros(t.shape, dtype=exact, device=t.device) for name, t in _sources(x, keys).items()}
    numbers = torch.cat([torch.stack([gates[b], grad_gates[b], lse[b]], dim=-1) for b in (WINDOW, SELECTED)], dim=-1)
    for runs in chunks_of(_plan(layout, x.shared).fused, x.q, x.k_window, layout, selected):
        backward_fused(x, runs, (grad, numbers), (found["q"], found["k_window"], found["v_window"]))
    for branch in _branches(x, *keys, layout):
        names = _names(branch.number, x.shared)
        targets = found[names[0]], found[names[1]], found[names[2]]
        gate = gates[branch.number]
        rows = torch.stack([gate, gate * grad_gates[branch.number], lse[branch.number]], dim=-1)
        for runs in chunks_of(branch.groups, branch.q, branch.k, layout, selected):
            _backward_chunk(branch, runs, (grad, rows), targets)
    found["gates"] = grad_gates.movedim(0, -1)
    return {name: tensor.to(x.q.dtype) for name, tensor in found.items()}


def _sources(x: Projected, keys: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Tensors that need a sum of gradients, by name; shared keys and values stand for both branches."""
    named = {**x.tensors(), "k_block": keys[0], "v_block": keys[1]}
    left_out = {"gates", "k_selected", "v_selected"} if x.shared else {"gates"}
    return {name: tensor for name, tensor in named.items() if name not in left_out}


def _names(branch: int, shared: bool) -> tuple[str, str, str]:
    """Names of the queries, keys and values of a branch."""
    if branch == BLOCK:
        return "q_block", "k_block", "v_block"
    return ("q", "k_selected", "v_selected") if branch == SELECTED and not shared else ("q", "k_window", "v_window")


def _branches(x: Projected, k_block: Tensor, v_block: Tensor, layout: Layout) -> Iterator[_Branch]:
    """The branches that the pattern has, with the tiles that are not fused."""
    pattern, plan = layout.pattern, _plan(layout, x.shared)
    if pattern.window_branch:
        yield _Branch(WINDOW, x.q, x.k_window, x.v_window, plan.window)
    if pattern.selected_branch:
        yield _Branch(SELECTED, x.q, x.k_selected, x.v_selected, plan.selected)
    if pattern.block_branch:
        yield _Branch(BLOCK, x.q_block, k_block, v_block, plan.block)


def _plan(layout: Layout, shared: bool) -> Plan:
    """The tiles of a batch, found when first wanted."""
    key = "shared" if shared else "separate"
    if key not in layout.plans:
        layout.plans[key] = plan_tiles(layout, fuse=shared)
    return layout.plans[key]


def _selection_plan(layout: Layout) -> SelectionPlan:
    if "selection" not in layout.plans:
        layout.plans["selection"] = plan_selection(layout)
    return layout.plans["selection"]


def _forward_chunk(branch: _Branch, runs: Runs, out: Tensor, lse: Tensor) -> None:
    """Attend from a chunk of tiles into `out [L, H, D]` and `lse [L, H]`, which are zero there."""
    q, k = take_queries(branch.q, branch.k, runs), take_keys(branch.k, runs)
    logits = masked_logits(q, k, runs)  # [C * G, rows * R, columns]
    peak = logits.amax(-1, keepdim=True)
    total = logits.sub_(peak).exp2_().sum(-1, keepdim=True)
    mixed = torch.bmm(logits, take_keys(branch.v, runs)).div_(total)
    add_rows(out, runs, mixed)
    add_rows(lse[..., None], runs, total.log2_().add_(peak))


def _backward_chunk(
    branch: _Branch, runs: Runs, rows: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add a chunk's gradients to those of the branch's queries, keys and values.

    Args:
        branch: The branch.
        runs: The chunk.
        rows: Gradient of the output `[L, H, D]`; and, `[L, H, 3]`, the branch's gate, the gate times its gradient,
            and the branch's log-sum-exp.
        targets: Gradients of queries, keys and values.
    """
    grad, numbers = (take_rows(x, branch.k.shape[1], runs) for x in rows)
    gate, delta, lse = numbers.split(1, dim=-1)
    grad = grad.to(gate.dtype).mul_(gate)
    q, k, v = take_queries(branch.q, branch.k, runs), take_keys(branch.k, runs), take_keys(branch.v, runs)
    weights = masked_logits(q, k, runs).sub_(lse).exp2_()
    change = torch.bmm(grad, v.transpose(1, 2)).sub_(delta).mul_(weights)
    grad_q, grad_k, grad_v = targets
    add_keys(grad_v, runs, torch.bmm(weights.transpose(1, 2), grad))
    add_keys(grad_k, runs, torch.bmm(change.transpose(1, 2), q.div_(LOG2E)))
    add_rows(grad_q, runs, torch.bmm(change, k).mul_(branch.q.shape[-1] ** -0.5))


def _gated(partial: Tensor, gates: Tensor, layout: Layout) -> Tensor:
    """Sum of the branches by their gates, a cacheful of events at a time."""
    pattern = layout.pattern
    used = [(WINDOW, pattern.window_branch), (SELECTED, pattern.selected_branch), (BLOCK, pattern.block_branch)]
    out = torch.empty_like(partial[0])
    for begin in range(0, len(out), _CHUNK_EVENTS):
        rows = slice(begin, begin + _CHUNK_EVENTS)
        terms = [partial[branch, rows] * gates[rows, :, branch, None] for branch, on in used if on]
        out[rows] = sum(terms[1:], terms[0])
    return out


def _grad_gates(partial: Tensor, grad: Tensor, layout: Layout, exact: torch.dtype) -> Tensor:
    """Gradient of each branch's gate, `[3, L, H]`."""
    found = torch.empty(partial.shape[:-1], dtype=exact, device=grad.device)
    for begin in range(0, len(grad), _CHUNK_EVENTS):
        rows = slice(begin, begin + _CHUNK_EVENTS)
        for branch in (WINDOW, SELECTED, BLOCK):
            found[branch, rows] = (partial[branch, rows] * grad[rows]).to(exact).sum(-1)
    return found
