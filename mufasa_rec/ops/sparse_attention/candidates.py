"""Sparse attention from candidates: plain PyTorch, each candidate over what it gathers from its user's history.

A candidate reads `window + num_selected * block + K` rows of its own, so a few hundred candidates are a ranker's load,
not a catalog. They are taken in chunks whose intermediate results are computed again in backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected
from mufasa_rec.ops.sparse_attention.selection import best_blocks, block_scores

_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class _Users:
    """Of each candidate `[C]`: its user, the bounds of its events, its own block's first event and place."""

    owner: Tensor
    begin: Tensor
    end: Tensor
    own: Tensor
    place: Tensor

    def part(self, rows: slice) -> _Users:
        return _Users(*(getattr(self, name)[rows] for name in ("owner", "begin", "end", "own", "place")))


def candidates_blocked(
    candidates: Projected, x: Projected, k_block: Tensor, v_block: Tensor, owner: Tensor, layout: Layout
) -> Tensor:
    """Attend from candidates; arguments and result are those of `api.candidate_sparse_attention`."""
    # Every input stays in the graph, also where no candidate reads it, so that each has a gradient.
    inputs = [*candidates.tensors().values(), *x.tensors().values(), k_block, v_block]
    nothing = sum(tensor[:0].sum() for tensor in inputs)
    if not len(owner):
        return candidates.q + nothing
    users = _users(owner, layout)
    size = max(1, _CHUNK_ELEMENTS // (_reach(layout) * x.k_window.shape[1] * x.k_window.shape[2]))
    outputs = []
    for begin in range(0, len(owner), size):
        rows = slice(begin, begin + size)
        part = Projected(**{name: tensor[rows] for name, tensor in candidates.tensors().items()})
        arguments = part, x, k_block, v_block, users.part(rows), layout
        outputs.append(
            checkpoint(_attend_chunk, *arguments, use_reentrant=False)
            if len(owner) > size
            else _attend_chunk(*arguments)
        )
    return torch.cat(outputs) + nothing


def _users(owner: Tensor, layout: Layout) -> _Users:
    """Find each candidate's own block: the user's last block unless that is full."""
    pattern, blocks = layout.pattern, layout.blocks
    begin, end = layout.offsets[:-1], layout.offsets[1:]
    count = blocks.offsets.diff()
    last = (blocks.offsets[1:] - 1).clamp(min=0)
    if len(blocks.begin):
        first_event, last_event = blocks.begin[last], blocks.end[last]
    else:
        first_event = last_event = end
    if pattern.segmentation == "fixed":
        full = (end - begin + layout.start_position) % pattern.selection_block == 0
    else:
        full = last_event - first_event == pattern.block
    is_open = (count > 0) & ~full
    own = torch.where(is_open, first_event, end)
    found = (begin, end, own, count - is_open.long())
    return _Users(owner, *(values.to(owner.device)[owner] for values in found))


def _reach(layout: Layout) -> int:
    """Rows that a candidate gathers at most in one branch."""
    pattern, longest = layout.pattern, int(layout.offsets.diff().max())
    window = longest if pattern.window is None else min(pattern.window, longest)
    selected = min(pattern.num_selected * pattern.selection_block, longest + pattern.selection_block)
    return 1 + max(window, selected, int(layout.tokens.offsets.diff().max()))


def _attend_chunk(
    c: Projected, x: Projected, k_block: Tensor, v_block: Tensor, users: _Users, layout: Layout
) -> Tensor:
    """Attended values `[c, H, D]` of some candidates."""
    pattern = layout.pattern
    token, readable = _tokens(users, layout)
    out = torch.zeros_like(c.q, dtype=_exact(c.q))
    with torch.autocast(c.q.device.type, enabled=False):
        if pattern.window_branch:
            itself = torch.ones_like(users.place, dtype=torch.bool)
            mixed = _mix(c.q, (x.k_window, x.v_window), *_window(users, layout), (c.k_window, c.v_window, itself))
            out = out + c.gates[..., WINDOW, None] * mixed
        if pattern.selected_branch:
            chosen = _choose(c.q_block.detach(), k_block.detach(), token, readable, users, layout)
            index, seen, itself = _selected(chosen, users, layout)
            own = c.k_selected, c.v_selected, itself
            mixed = _mix(c.q, (x.k_selected, x.v_selected), index, seen, own)
            out = out + c.gates[..., SELECTED, None] * mixed
        if pattern.block_branch and token.shape[1]:
            out = out + c.gates[..., BLOCK, None] * _mix(c.q_block, (k_block, v_block), token[:, None], readable, None)
    return out.to(c.q.dtype)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mix(
    q: Tensor,
    rows: tuple[Tensor, Tensor],
    index: Tensor,
    seen: Tensor,
    own: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Softmax attention of each candidate over rows of its own choice, and over itself.

    Args:
        q: Queries, `[c, H, D]`.
        rows: Keys and values, each `[L, G, D]`.
        index: Rows that each candidate reads, `[c, 1 or G, n]`.
        seen: Which of them it may see, `[c, 1 or G, n]`.
        own: The candidates' own keys and values, each `[c, G, D]`, and which see themselves, `[c]`; or None.

    Returns:
        Values, `[c, H, D]`; zero where nothing is seen.
    """
    count, groups = len(q), rows[0].shape[1]
    head = torch.arange(groups, device=q.device)[:, None]
    some = (x if len(x) else x.new_zeros(1, *x.shape[1:]) for x in rows)  # a batch without events has unseen ones
    keys, values = (x[index, head].to(_exact(x)) for x in some)  # [c, G, n, D]
    mask = seen.expand(-1, groups, -1)
    if own is not None:
        keys, values = (torch.cat([a, b[:, :, None].to(a.dtype)], dim=2) for a, b in zip((keys, values), own))
        mask = torch.cat([mask, own[2][:, None, None].expand(-1, groups, 1)], dim=2)
    by_group = q.to(keys.dtype).view(count, groups, -1, q.shape[-1])
    logits = by_group @ keys.transpose(2, 3) * q.shape[-1] ** -0.5  # [c, G, R, n]
    lowest = torch.finfo(logits.dtype).min
    weights = logits.masked_fill(~mask[:, :, None], lowest).softmax(-1) * mask[:, :, None]
    return (weights @ values).view(q.shape)


def _tokens(users: _Users, layout: Layout) -> tuple[Tensor, Tensor]:
    """All tokens of each candidate's user, `[c, n]`, and which places hold one, `[c, 1, n]`."""
    offsets, device = layout.tokens.offsets, users.owner.device
    first = offsets.to(device)[users.owner][:, None]
    end = offsets[1:].to(device)[users.owner][:, None]
    token = first + torch.arange(int(offsets.diff().max()), device=device)
    return token.clamp(max=max(layout.num_tokens - 1, 0)), (token < end)[:, None]


def _window(users: _Users, layout: Layout) -> tuple[Tensor, Tensor]:
    """The newest events of each candidate's window, `[c, 1, n]`, and which of them exist."""
    longest = int(layout.offsets.diff().max())
    count = longest if layout.pattern.window is None else min(layout.pattern.window - 1, longest)
    event = users.end[:, None, None] - 1 - torch.arange(count, device=users.end.device)
    return event.clamp(min=0), event >= users.begin[:, None, None]


def _choose(q: Tensor, k_block: Tensor, token: Tensor, readable: Tensor, users: _Users, layout: Layout) -> Tensor:
    """Places of the scored blocks, `[c, G, S]`; -1 where there are fewer."""
    pattern, (count, groups) = layout.pattern, (len(q), k_block.shape[1])
    size, first = pattern.num_scored, int(pattern.first_block)
    if not size or not token.shape[1]:
        return _nearest(users, size, first)[:, None].expand(-1, groups, -1)
    head = torch.arange(groups, device=q.device)[:, None]
    keys = k_block[token[:, None], head].to(_exact(q))
    by_group = q.to(keys.dtype).view(count, groups, -1, q.shape[-1])
    logits = (by_group @ keys.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~readable[:, :, None], float("-inf"))
    peak = logits.logsumexp(-1, keepdim=True)
    scores = (logits - peak.where(peak.isfinite(), 0.0)).logsumexp(2)[:, :, None]  # [c, G, 1, n]
    if not pattern.tokens_are_blocks:
        scores = block_scores(scores, layout, users.owner.cpu())
    missing = max(0, size - scores.shape[-1])
    scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    best = best_blocks(scores, users.place[:, None], size, first)[:, :, 0]
    available = (users.place - first)[:, None, None]
    return torch.where(torch.arange(size, device=q.device) < available, best, -1)


def _nearest(users: _Users, size: int, first: int) -> Tensor:
    """Scored blocks where no token can score them: the lowest places."""
    place = torch.arange(size, device=users.place.device) + first
    return torch.where(place < users.place[:, None], place, -1)


def _selected(chosen: Tensor, users: _Users, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Events of the selected blocks, `[c, G, n]`, which of them are seen, and who sees itself, `[c]`."""
    pattern, blocks, device = layout.pattern, layout.blocks, users.owner.device
    if pattern.first_block:
        always = torch.where(users.place > 0, 0, -1)[:, None, None].expand(-1, chosen.shape[1], -1)
        chosen = torch.cat([always, chosen], dim=2)
    block = blocks.offsets.to(device)[users.owner][:, None, None] + chosen.clamp(min=0)
    block = block.clamp(max=max(len(blocks.begin) - 1, 0))
    pad = torch.nn.functional.pad
    begin, end = (pad(x, (0, 1)).to(device)[block] for x in (blocks.begin, blocks.end))
    end = torch.where(chosen >= 0, end, begin)
    reads_own = torch.ones_like(users.place, dtype=torch.bool)
    if not pattern.own_block:
        reads_own = (users.place == 0) if pattern.first_block else ~reads_own
    own_end = torch.where(reads_own, users.end, users.own)
    shape = (-1, chosen.shape[1], 1)
    begin = torch.cat([begin, users.own[:, None, None].expand(*shape)], dim=2)
    end = torch.cat([end, own_end[:, None, None].expand(*shape)], dim=2)
    event = begin[..., None] + torch.arange(pattern.selection_block, device=device)
    seen = (event < end[..., None]).flatten(2)
    return event.flatten(2).clamp(max=max(layout.num_events - 1, 0)), seen, reads_own
