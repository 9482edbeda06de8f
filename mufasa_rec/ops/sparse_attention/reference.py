"""The definition of sparse attention: dense boolean masks in float64, one sequence at a time.

Every option means what it does here. Nothing but the borders of blocks is taken from the layout: which blocks are
complete, which tile a query lies in and what it may see are derived again, in the plainest way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected

_NOTHING = float("-inf")


@dataclass(frozen=True)
class _Sequence:
    """One sequence: its length, the bounds `[begin, end)` of its blocks, and of its tokens with their first readers."""

    length: int
    start: int
    blocks: list[tuple[int, int]]
    tokens: list[tuple[int, int]]
    readers: list[int]


def reference_attention(
    x: Projected, k_block: Tensor, v_block: Tensor, layout: Layout, selected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend by dense masks; the arguments and results of `api.sparse_attention`, differentiable by autograd.

    Returns:
        The attended values, `[L, H, D]` float64, and the scored blocks, `[N, G, S]` int64.
    """
    outputs, choices, tile = [], [], 0
    for index, (rows, tokens) in enumerate(_rows(layout)):
        part = Projected(**{name: tensor[rows].double() for name, tensor in x.tensors().items()})
        sequence = _describe(layout, index)
        starts = sorted({_tile_start(sequence, layout.pattern, t) for t in range(sequence.length)})
        given = None if selected is None else selected[tile : tile + len(starts)]
        tile += len(starts)
        keys = k_block[tokens].double(), v_block[tokens].double()
        out, chosen = _attend(part, *keys, sequence, layout.pattern, given)
        outputs.append(out)
        choices.append(chosen)
    return torch.cat([x.q[:0].double(), *outputs]), torch.cat([_none(0, x, layout.pattern), *choices])


def reference_scores(x: Projected, k_block: Tensor, layout: Layout) -> list[Tensor]:
    """Scores of the blocks before a query's own by each query, one `[G, L_b, J_b]` float64 for each sequence."""
    found = []
    for index, (rows, tokens) in enumerate(_rows(layout)):
        sequence = _describe(layout, index)
        weights = _softmax(_logits(x.q_block[rows].double(), k_block[tokens].double()), _token_mask(sequence))
        found.append(_block_scores(weights, x.groups, sequence, layout.pattern))
    return found


def reference_candidates(
    candidates: Projected, x: Projected, k_block: Tensor, v_block: Tensor, owner: Tensor, layout: Layout
) -> Tensor:
    """Attend from candidates: each is its user's next event, never shares a tile, and sees no other candidate.

    Returns:
        The attended values, `[C, H, D]` float64.
    """
    outputs = [candidates.q[:0].double()]
    bounds = _rows(layout)
    for c, user in enumerate(owner.tolist()):
        rows, tokens = bounds[user]
        last = {name: tensor[c : c + 1] for name, tensor in candidates.tensors().items()}
        both = Projected(**{name: torch.cat([t[rows], last[name]]).double() for name, t in x.tensors().items()})
        sequence = _with_candidate(_describe(layout, user), layout.pattern)
        keys = k_block[tokens].double(), v_block[tokens].double()
        outputs.append(_attend(both, *keys, sequence, layout.pattern, None, alone=True)[0][-1:])
    return torch.cat(outputs)


def _rows(layout: Layout) -> list[tuple[slice, slice]]:
    """Where each sequence's events and tokens lie."""
    events, tokens = layout.offsets.tolist(), layout.tokens.offsets.tolist()
    return [(slice(*events[b : b + 2]), slice(*tokens[b : b + 2])) for b in range(layout.num_sequences)]


def _describe(layout: Layout, index: int) -> _Sequence:
    """Derive the blocks and tokens of a sequence from its borders."""
    begin, end = layout.offsets[index : index + 2].tolist()
    start, length, pattern = int(layout.start_position[index]), end - begin, layout.pattern
    cuts = [*torch.nonzero(layout.borders[begin:end]).squeeze(1).tolist(), length]
    blocks = list(zip(cuts[:-1], cuts[1:], strict=True))
    if pattern.tokens_are_blocks:
        tokens, readers = [], []
        for a, b in blocks:
            full = (b + start) % pattern.block == 0 if pattern.segmentation == "fixed" else b - a == pattern.block
            if full or b < length:
                tokens.append((a, b))
                readers.append(b - 1 if full else b)  # a short block is known to have ended by the event after it
    else:
        grid = range(-(-start // pattern.token_stride) * pattern.token_stride - start, length, pattern.token_stride)
        tokens = [(a, a + pattern.block) for a in grid if a + pattern.block <= length]
        readers = [b - 1 for _, b in tokens]
    return _Sequence(length, start, blocks, tokens, readers)


def _with_candidate(sequence: _Sequence, pattern: SparsePattern) -> _Sequence:
    """Append the candidate: to the open block, or as a block of its own where the last one is full."""
    n, blocks = sequence.length, list(sequence.blocks)
    last_is_full = bool(blocks) and (
        (n + sequence.start) % pattern.selection_block == 0
        if pattern.segmentation == "fixed"
        else blocks[-1][1] - blocks[-1][0] == pattern.block
    )
    if blocks and not last_is_full:
        blocks[-1] = (blocks[-1][0], n + 1)
    else:
        blocks.append((n, n + 1))
    return _Sequence(n + 1, sequence.start, blocks, sequence.tokens, sequence.readers)


def _attend(
    x: Projected,
    k_block: Tensor,
    v_block: Tensor,
    sequence: _Sequence,
    pattern: SparsePattern,
    selected: Tensor | None,
    *,
    alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attended values `[n, H, D]` of a sequence and the scored blocks of its tiles; `alone`: each query is a tile."""
    n, count = sequence.length, pattern.num_scored
    past = torch.ones(n, n, dtype=torch.bool).tril()
    window = past if pattern.window is None else past & ~past.tril(-pattern.window)
    weights = _softmax(_logits(x.q_block, k_block), _token_mask(sequence))  # [H, n, K]
    first = [t if alone else _tile_start(sequence, pattern, t) for t in range(n)]
    tiles = sorted(set(first))
    if selected is None:
        scores = _block_scores(weights.detach(), x.groups, sequence, pattern)
        selected = _none(len(tiles), x, pattern)
        for row, t in enumerate(tiles):
            selected[row] = _best(scores[:, t], int(pattern.first_block), _block_of(sequence, t), count)
    seen = torch.zeros(x.groups, n, n, dtype=torch.bool)
    for t in range(n):
        own = _block_of(sequence, t)
        for group in range(x.groups):
            chosen = set(selected[tiles.index(first[t]), group].tolist()) - {-1}
            chosen |= {0} if pattern.first_block else set()
            chosen |= {own} if pattern.own_block else set()
            for block in chosen:
                seen[group, t, slice(*sequence.blocks[block])] = True
    heads = x.q.shape[1] // max(x.groups, 1)
    out = torch.zeros_like(x.q)
    if pattern.window_branch:
        out = out + x.gates[..., WINDOW, None] * _mix(x.q, x.k_window, x.v_window, window)
    if pattern.selected_branch:
        mask = (seen & past).repeat_interleave(heads, 0)
        out = out + x.gates[..., SELECTED, None] * _mix(x.q, x.k_selected, x.v_selected, mask)
    if pattern.block_branch:
        values = v_block.repeat_interleave(heads, 1)
        out = out + x.gates[..., BLOCK, None] * torch.einsum("hqk,khd->qhd", weights, values)
    return out, selected


def _block_of(sequence: _Sequence, t: int) -> int:
    return next(j for j, (a, b) in enumerate(sequence.blocks) if a <= t < b)


def _tile_start(sequence: _Sequence, pattern: SparsePattern, t: int) -> int:
    """First query of the tile of query `t`: tiles begin with blocks and cross no border."""
    begin = sequence.blocks[_block_of(sequence, t)][0]
    origin = sequence.start if pattern.segmentation == "fixed" else -begin
    return max(begin, t - (t + origin) % pattern.tile)


def _token_mask(sequence: _Sequence) -> Tensor:
    """Which tokens each query may read, `[n, K]`."""
    readers = torch.tensor(sequence.readers, dtype=torch.int64)
    return readers[None] <= torch.arange(sequence.length)[:, None]


def _block_scores(weights: Tensor, groups: int, sequence: _Sequence, pattern: SparsePattern) -> Tensor:
    """Scores `[G, n, J]`: weights `[H, n, K]` of the tokens, summed over a group's heads, in each block.

    A token counts for a block once per stride that they share: equations 8 to 10 of the paper, counted from 0.
    """
    weights = weights.unflatten(0, (groups, -1)).sum(1)
    shared = torch.zeros(len(sequence.tokens), len(sequence.blocks), dtype=weights.dtype)
    for i, (a, b) in enumerate(sequence.tokens):
        for j, (c, d) in enumerate(sequence.blocks):
            events = max(0, min(b, d) - max(a, c))
            shared[i, j] = float(events > 0) if pattern.tokens_are_blocks else events / pattern.token_stride
    return weights @ shared


def _best(scores: Tensor, first: int, own: int, count: int) -> Tensor:
    """The `count` best of the blocks `first ... own - 1` by scores `[G, J]`, the lower index first among equals."""
    order = torch.sort(scores[:, first:own], dim=-1, descending=True, stable=True).indices[:, :count] + first
    return torch.nn.functional.pad(order, (0, count - order.shape[1]), value=-1)


def _none(tiles: int, x: Projected, pattern: SparsePattern) -> Tensor:
    return torch.full((tiles, x.groups, pattern.num_scored), -1, dtype=torch.int64)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products of queries `[n, H, D]` and keys `[m, G, D]`, `[H, n, m]`."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over what the mask allows; zero where it allows nothing."""
    masked = logits.masked_fill(~mask, _NOTHING)
    peak = masked.detach().amax(-1, keepdim=True) if masked.shape[-1] else masked.sum(-1, keepdim=True)
    weights = (masked - peak.clamp(min=torch.finfo(masked.dtype).min)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(masked.dtype).tiny)


def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention, `[n, H, D]`."""
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", _softmax(_logits(q, k), mask), values)
