"""The choice of blocks: scores of block tokens by the first query of each tile, and the best of them.

Scores are compared as logarithms, so that blocks whose weights differ by more than a float can hold keep their order.
Nothing here has a gradient: the scores learn through the block branch, which uses the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.plan import prefix_groups
from mufasa_rec.ops.sparse_attention.runs import gather_runs, run_index
from mufasa_rec.ops.sparse_attention.tile_group import TileGroup

_CHUNK_ELEMENTS = 1 << 19
_NEVER = float("-inf")


@dataclass(frozen=True)
class SelectionPlan:
    """What the choice needs to know about a batch.

    Attributes:
        easy: Scored blocks of tiles that have no choice (all blocks before their own), `[N, S]` int64, padded by -1.
        tiles: Tiles with a choice, `[M]` int64.
        queries: First query of each of them, `[M]` int64.
        place: Place of the block that it lies in, `[M]` int64.
        sequence: Its sequence, `[M]` int64.
        groups: The tiles with a choice as queries of prefixes of tokens.
    """

    easy: Tensor
    tiles: Tensor
    queries: Tensor
    place: Tensor
    sequence: Tensor
    groups: list[TileGroup]


def plan_selection(layout: Layout) -> SelectionPlan:
    """Find the tiles that have a choice."""
    pattern, tiles = layout.pattern, layout.tiles
    first = int(pattern.first_block)
    scored = torch.arange(pattern.num_scored)
    available = (tiles.place - first).clamp(min=0)
    easy = torch.where(scored < available[:, None], scored + first, -1)
    chooses = torch.nonzero(available > pattern.num_scored if pattern.num_scored else available < 0).squeeze(1)
    queries, sequence = tiles.begin[chooses], tiles.sequence[chooses]
    offsets = torch.searchsorted(sequence, torch.arange(layout.num_sequences + 1))
    groups = prefix_groups(offsets, layout.visible_tokens[queries], layout.tokens.offsets[:-1], 64)
    return SelectionPlan(easy, chooses, queries, tiles.place[chooses], sequence, groups)


def select_blocks(q_block: Tensor, k_block: Tensor, layout: Layout, plan: SelectionPlan) -> Tensor:
    """Choose the scored blocks of each tile.

    Args:
        q_block: Queries of the block branch, `[L, H, D]`.
        k_block: Keys of the tokens, `[K, G, D]`.
        layout: The batch's blocks.
        plan: From `plan_selection`.

    Returns:
        Places of the chosen blocks in their sequence, best first, `[N, G, S]` int64; -1 where there are fewer. Equal
        scores go to the lower place.
    """
    groups = k_block.shape[1]
    chosen = plan.easy.to(q_block.device)[:, None].repeat(1, groups, 1)
    if not len(plan.tiles):
        return chosen
    exact = torch.float64 if q_block.dtype == torch.float64 else torch.float32
    first_queries = q_block.index_select(0, plan.queries.to(q_block.device))
    k_block = k_block.contiguous()
    for group in plan.groups:
        per_tile = group.rows * q_block.shape[1] * group.columns
        for part in group.split(max(1, _CHUNK_ELEMENTS // per_tile)):
            scores = _token_scores(part, first_queries, k_block, exact)  # [C, G, rows, columns]
            rows = part.queries[:, None] + torch.arange(part.rows)
            if not layout.pattern.tokens_are_blocks:
                scores = block_scores(scores, layout, plan.sequence[part.queries])
            best = best_blocks(scores, plan.place[rows], layout.pattern.num_scored, int(layout.pattern.first_block))
            chosen[plan.tiles[rows].to(chosen.device)] = best.transpose(1, 2)
    return chosen


def _token_scores(part: TileGroup, queries: Tensor, k_block: Tensor, exact: torch.dtype) -> Tensor:
    """Logarithms of the tokens' weights, summed over the heads of a group, `[C, G, rows, columns]`."""
    (_, heads, width), groups, count = queries.shape, k_block.shape[1], len(part.queries)
    ratio, device = heads // groups, queries.device
    rows = queries.view(len(queries), groups, ratio * width)
    q = gather_runs(rows, run_index(part.queries.to(device), groups), part.rows).view(-1, part.rows * ratio, width)
    k = gather_runs(k_block, run_index(part.keys.to(device), groups), part.columns)
    logits = torch.bmm(q.to(exact) * width**-0.5, k.to(exact).transpose(1, 2))
    logits = logits.view(count, groups, part.rows, ratio, part.columns)
    for begin, end, added in part.masks:
        logits[..., begin:end] += added.to(logits)[:, None]
    if ratio == 1:  # one head's weights are ordered as its logits
        return logits.squeeze(3)
    return (logits - logits.logsumexp(-1, keepdim=True)).logsumexp(3)


def block_scores(scores: Tensor, layout: Layout, sequence: Tensor) -> Tensor:
    """Scores of selection blocks from those of overlapping tokens: each counts once per stride that they share.

    This is the sum over `p[(l' / d) j + m - n]` of Native Sparse Attention, counted from 0, for sequences that begin
    anywhere.
    """
    blocks, tokens, stride = layout.blocks, layout.tokens, layout.pattern.token_stride
    columns, device = scores.shape[-1], scores.device
    first_block, first_token = blocks.offsets[sequence], tokens.offsets[sequence]
    most = int((blocks.offsets.diff()[sequence]).max())
    block = first_block[:, None] + torch.arange(most)
    block = torch.minimum(block, blocks.offsets[sequence + 1][:, None] - 1)
    begin, end = blocks.begin[block], blocks.end[block]  # [C, J]
    origin = tokens.begin[first_token][:, None]
    earliest = torch.div(begin - origin - layout.pattern.block, stride, rounding_mode="floor") + 1
    reach = (layout.pattern.selection_block + layout.pattern.block) // stride
    token = earliest[..., None] + torch.arange(reach)  # [C, J, reach]
    token_begin = origin[..., None] + token * stride
    shared = torch.minimum(token_begin + layout.pattern.block, end[..., None]) - torch.maximum(
        token_begin, begin[..., None]
    )
    counts = (shared > 0) & (token >= 0) & (token < columns)
    weight = torch.where(counts, shared / stride, 0.0).log().to(scores)
    index = token.clamp(0, columns - 1).to(device)
    expanded = index[:, None, None].expand(*scores.shape[:3], *index.shape[1:])
    picked = scores.gather(-1, expanded.flatten(3)).view(expanded.shape)
    return (picked + weight[:, None, None]).logsumexp(-1)


def best_blocks(scores: Tensor, place: Tensor, count: int, first: int) -> Tensor:
    """The `count` best blocks of `first ... place - 1` by `scores [C, G, rows, J]`, `[C, G, rows, count]`."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    allowed = (block >= first) & (block < place.to(scores.device)[..., None])
    lowest = torch.finfo(scores.dtype).min
    scores = scores.clamp(min=lowest).masked_fill(~allowed[:, None], _NEVER)
    found = []
    for _ in range(count):  # `argmax` takes the first of equals, which `topk` does not promise
        best = scores.argmax(-1, keepdim=True)
        scores.scatter_(-1, best, _NEVER)
        found.append(best)
    return torch.cat(found, dim=-1)
