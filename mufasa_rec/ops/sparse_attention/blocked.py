"""Sparse attention in tiles: plain PyTorch on any device, memory of order L, with its own backward.

Key/value heads are worked off one by one. A tile's keys are gathered as runs, its logits live in the cache, and forward
keeps nothing but a log-sum-exp for each branch: backward computes the logits again. Every branch has a maximum of its
own for each row, so that a branch whose logits lie far below another's does not underflow. Matrix products are in fp32
(float64 for float64), also for bf16 inputs: the logits of a softmax need the digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention import chunk, fused
from mufasa_rec.ops.sparse_attention.heads import Scratch, exact_dtype, for_each_head
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.plan import Plan, TileGroup, plan_tiles
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected
from mufasa_rec.ops.sparse_attention.selection import SelectionPlan, plan_selection, select_blocks
from mufasa_rec.ops.sparse_attention.tiles import LOG2E, Head, Runs

_Branches = tuple[int, ...]


def forward(
    x: Projected, k_block: Tensor, v_block: Tensor, layout: Layout, selected: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend.

    Returns:
        The attended values, `[L, H, D]`; each branch's base-2 log-sum-exp, `[3, L, H]`, for the backward; the scored
        blocks, `[N, G, S]`.
    """
    if selected is None:
        selected = select_blocks(x.q_block, k_block, layout, _selection_plan(layout))
    groups, ratio = x.groups, x.q.shape[1] // x.groups
    exact, given = exact_dtype(x.q.dtype), _sources(x, (k_block, v_block))
    out = torch.zeros_like(x.q, dtype=exact)
    lse = x.q.new_zeros(3, *x.q.shape[:2], dtype=exact)

    work = list(_work(layout, x.shared))

    def attend(number: int, scratch: Scratch) -> None:
        head = Head(number, groups, ratio, layout, selected, scratch)
        for branches, tile in work:
            q, k, v = (given[name] for name in _names(branches[0], x.shared))
            runs, size = head.runs(tile), head.chunk_size(tile)
            queries = head.take_rows("q", q, runs).mul_(q.shape[-1] ** -0.5 * LOG2E)
            mixed, gates = head.rows_like("mixed", queries), head.take_rows("gates", x.gates, runs).split(1, dim=-1)
            step = chunk.forward_chunk if len(branches) == 1 else fused.forward_chunk
            found = []
            for part, one_q, one_out, *one_gate in _cut(size, runs, queries, mixed, *(gates[b] for b in branches)):
                taken = one_q, head.take_keys("k", k, part), head.take_keys("v", v, part)
                found.append(step(head, part, taken, one_gate, one_out))
            head.add_rows(out, runs, mixed)
            for branch, numbers in zip(branches, zip(*found)):
                head.add_rows(lse[branch], runs, torch.cat(numbers))

    for_each_head(attend, groups, out.device)
    return out.to(x.q.dtype), lse, selected


def backward(
    grad: Tensor,
    x: Projected,
    keys: tuple[Tensor, Tensor],
    layout: Layout,
    saved: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Gradients of all inputs, by name.

    Args:
        grad: Gradient of the attended values, `[L, H, D]`.
        x: What `forward` was given.
        keys: `k_block` and `v_block`.
        layout: The batch's blocks.
        saved: Log-sum-exps and the scored blocks, from `forward`.
    """
    lse, selected = saved
    groups, ratio, scale = x.groups, x.q.shape[1] // x.groups, x.q.shape[-1] ** -0.5
    given, grad = _sources(x, keys), grad.contiguous()
    found = {name: torch.zeros_like(tensor, dtype=lse.dtype) for name, tensor in given.items()}
    by_gate = torch.zeros_like(lse)

    work = list(_work(layout, x.shared))

    def attend(number: int, scratch: Scratch) -> None:
        head = Head(number, groups, ratio, layout, selected, scratch)
        for branches, tile in work:
            names = _names(branches[0], x.shared)
            (q, k, v), (_, grad_k, grad_v) = ([tensors[name] for name in names] for tensors in (given, found))
            runs, size = head.runs(tile), head.chunk_size(tile)
            queries = head.take_rows("q", q, runs).mul_(scale * LOG2E)
            mine, by_q = head.take_rows("grad", grad, runs), head.rows_like("by_q", queries)
            gates = head.take_rows("gates", x.gates, runs).split(1, dim=-1)
            numbers = [gates[b] for b in branches] + [head.take_rows(f"lse {b}", lse[b], runs) for b in branches]
            step = chunk.backward_chunk if len(branches) == 1 else fused.backward_chunk
            by_gates = []
            for part, one_q, one_grad, one_out, *rest in _cut(size, runs, queries, mine, by_q, *numbers):
                taken = one_q, head.take_keys("k", k, part), head.take_keys("v", v, part), one_grad
                gate_and_lse = rest[: len(branches)], rest[len(branches) :]
                by_k, by_v, means = step(head, part, taken, gate_and_lse, one_out)
                head.add_keys(grad_k, part, by_k)
                head.add_keys(grad_v, part, by_v)
                by_gates.append(means)
            head.add_rows(found[names[0]], runs, by_q.mul_(scale))
            for branch, means in zip(branches, zip(*by_gates)):
                head.add_rows(by_gate[branch], runs, torch.cat(means))

    for_each_head(attend, groups, grad.device)
    found["gates"] = by_gate.movedim(0, -1)
    return {name: tensor.to(x.q.dtype) for name, tensor in found.items()}


def _work(layout: Layout, shared: bool) -> Iterator[tuple[_Branches, TileGroup]]:
    """Groups of tiles, each with the branches that it serves."""
    pattern, plan = layout.pattern, _plan(layout, shared)
    work = [((WINDOW, SELECTED), plan.fused, True), ((WINDOW,), plan.window, pattern.window_branch)]
    work += [((SELECTED,), plan.selected, pattern.selected_branch), ((BLOCK,), plan.block, pattern.block_branch)]
    for branches, tiles, on in work:
        if on:
            yield from ((branches, tile) for tile in tiles)


def _cut(size: int, runs: Runs, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Chunks of at most `size` tiles: their runs, and their part of each of `rows`."""
    return zip(runs.split(size), *(tensor.split(size) for tensor in rows))


def _sources(x: Projected, keys: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values by name; shared keys and values stand for both branches."""
    named = {**x.tensors(), "k_block": keys[0], "v_block": keys[1]}
    left_out = {"gates", "k_selected", "v_selected"} if x.shared else {"gates"}
    return {name: tensor for name, tensor in named.items() if name not in left_out}


def _names(branch: int, shared: bool) -> tuple[str, str, str]:
    """Names of the queries, keys and values of a branch."""
    if branch == BLOCK:
        return "q_block", "k_block", "v_block"
    return ("q", "k_selected", "v_selected") if branch == SELECTED and not shared else ("q", "k_window", "v_window")


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
