"""Sparse attention in tiles: plain PyTorch on any device, memory of order L, with its own backward.

Key/value heads are worked off one by one, those of small batches together. A tile's keys are gathered as runs, its
logits live in the cache, and forward keeps nothing but a log-sum-exp for each branch: backward computes the logits
again. Every branch has a maximum of its own for each row, so that a branch whose logits lie far below another's does
not underflow. Matrix products are in fp32 (float64 for float64), also for bf16 inputs: the logits of a softmax need the
digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention import chunk
from mufasa_rec.ops.sparse_attention.heads import Scratch, exact_dtype, for_each_part, parts_of, zeros
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.plan import Plan, plan_tiles
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected
from mufasa_rec.ops.sparse_attention.selection import SelectionPlan, plan_selection, select_blocks
from mufasa_rec.ops.sparse_attention.tile_group import TileGroup
from mufasa_rec.ops.sparse_attention.tiles import LOG2E, Heads, Runs


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
    out, lse = zeros(tuple(x.q.shape), x.q, exact), zeros((3, *x.q.shape[:2]), x.q, exact)

    work = list(_work(layout))

    def attend(part: range, scratch: Scratch) -> None:
        heads = Heads(part.start, len(part), groups, ratio, x.q.shape[-1], layout, selected, scratch)
        for branch, tile in work:
            q, k, v = (given[name] for name in _names(branch, x.shared))
            size = heads.chunk_size(tile)
            for runs in heads.pieces(tile):
                queries = heads.take_rows("q", q, runs).mul_(q.shape[-1] ** -0.5 * LOG2E)
                mixed = heads.rows_like("mixed", queries)
                gates = heads.take_rows("gates", x.gates, runs)[..., branch : branch + 1]
                found = []
                for chunked, one_q, one_out, gate in _cut(size, runs, queries, mixed, gates):
                    taken = one_q, heads.take_keys("k", k, chunked), heads.take_keys("v", v, chunked)
                    found.append(chunk.forward_chunk(heads, chunked, taken, gate, one_out))
                heads.add_rows(out, runs, mixed)
                heads.add_rows(lse[branch], runs, torch.cat(found))

    for_each_part(attend, parts_of(groups, layout.num_events, out.device), out.device)
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
    found = {name: zeros(tuple(tensor.shape), tensor, lse.dtype) for name, tensor in given.items()}
    by_gate = zeros(tuple(lse.shape), lse, lse.dtype)

    work = list(_work(layout))

    def attend(part: range, scratch: Scratch) -> None:
        heads = Heads(part.start, len(part), groups, ratio, x.q.shape[-1], layout, selected, scratch)
        for branch, tile in work:
            names = _names(branch, x.shared)
            (q, k, v), (_, grad_k, grad_v) = ([tensors[name] for name in names] for tensors in (given, found))
            size = heads.chunk_size(tile)
            for runs in heads.pieces(tile):
                queries = heads.take_rows("q", q, runs).mul_(scale * LOG2E)
                mine, by_q = heads.take_rows("grad", grad, runs), heads.rows_like("by_q", queries)
                gates = heads.take_rows("gates", x.gates, runs)[..., branch : branch + 1]
                gated_q = torch.mul(queries, gates / LOG2E, out=heads.rows_like("gated_q", queries))
                gated_grad = torch.mul(mine, gates, out=heads.rows_like("gated_grad", mine))
                lses, means = heads.take_rows("lse", lse[branch], runs), []
                rows = queries, mine, by_q, gates, lses, gated_q, gated_grad
                for chunked, one_q, one_grad, one_out, *numbers, by_gate_q, by_gate_grad in _cut(size, runs, *rows):
                    taken = one_q, heads.take_keys("k", k, chunked), heads.take_keys("v", v, chunked), one_grad
                    gated = by_gate_q, by_gate_grad
                    by_k, by_v, mean = chunk.backward_chunk(
                        heads, chunked, taken, gated, (numbers[0], numbers[1]), one_out
                    )
                    heads.add_keys(grad_k, chunked, by_k)
                    heads.add_keys(grad_v, chunked, by_v)
                    means.append(mean)
                heads.add_rows(found[names[0]], runs, by_q.mul_(scale))
                heads.add_rows(by_gate[branch], runs, torch.cat(means))

    for_each_part(attend, parts_of(groups, layout.num_events, grad.device), grad.device)
    found["gates"] = by_gate.movedim(0, -1)
    return {name: tensor.to(x.q.dtype) for name, tensor in found.items()}


def _work(layout: Layout) -> Iterator[tuple[int, TileGroup]]:
    """Groups of tiles, each with the branch that it serves."""
    pattern = layout.pattern
    if "tiles" not in layout.plans:
        layout.plans["tiles"] = plan_tiles(layout)
    plan: Plan = layout.plans["tiles"]
    for branch, tiles, on in (
        (WINDOW, plan.window, pattern.window_branch),
        (SELECTED, plan.selected, pattern.selected_branch),
        (BLOCK, plan.block, pattern.block_branch),
    ):
        if on:
            yield from ((branch, tile) for tile in tiles)


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


def _selection_plan(layout: Layout) -> SelectionPlan:
    if "selection" not in layout.plans:
        layout.plans["selection"] = plan_selection(layout)
    return layout.plans["selection"]
