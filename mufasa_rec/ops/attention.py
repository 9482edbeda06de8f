"""Full causal attention over jagged sequences, with rotary positions: the exact, quadratic extractor's operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.ops.jagged import GroupPlan


def rotary(x: Tensor, position: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotate pairs of channels by an angle that grows with the position (RoPE, arXiv 2104.09864).

    Args:
        x: Queries or keys, `[L, H, D]`, D even.
        position: Position of each row in its user's stream, `[L]`.
        base: Longest wavelength over 2 pi.

    Returns:
        Rotated rows, `[L, H, D]`.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position.to(torch.float32)[:, None] * frequency  # [L, D/2]
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def causal_attention(qkv: Tensor, plan: GroupPlan, *, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention of every event over itself and the earlier events of its sequence.

    Args:
        qkv: Queries, keys and values, `[L, 3, H, D]`.
        plan: Padded groups of the batch, from `plan_groups`.
        bias: Added to the logits by distance into the past, `[H, N]` with N at least the longest sequence; or None.
        dropout: Probability of dropping an attention weight.

    Returns:
        Attended values, `[L, H, D]`.
    """
    _, _, heads, width = qkv.shape
    if not plan.groups:
        return qkv[:, 2] + 0.0 * qkv.sum()
    outputs = []
    for group in plan.groups:
        size, length = group.gather.shape
        padded = qkv.index_select(0, group.gather.reshape(-1)).view(size, length, 3, heads, width)
        q, k, v = padded.permute(2, 0, 3, 1, 4)  # each [b, H, n, D]
        mask = None if bias is None else _distance_mask(bias, length).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        outputs.append(out.transpose(1, 2).reshape(size * length, heads, width))
    return torch.cat(outputs).index_select(0, plan.restore)


def _distance_mask(bias: Tensor, length: int) -> Tensor:
    """Additive causal mask `[H, n, n]` from a bias by distance `[H, N]`."""
    step = torch.arange(length, device=bias.device)
    distance = step[:, None] - step[None]
    mask = bias[:, distance.clamp(min=0).reshape(-1)].view(-1, length, length)
    return mask.masked_fill(distance < 0, float("-inf"))


def candidate_attention(
    query: Tensor, key: Tensor, value: Tensor, history_kv: Tensor, owner: Tensor, plan: GroupPlan, bias: Tensor | None
) -> Tensor:
    """Attention of candidates, each over its user's whole history and itself, and over nothing else.

    Args:
        query: Candidate queries, `[C, H, D]`.
        key: Candidate keys, `[C, H, D]`.
        value: Candidate values, `[C, H, D]`.
        history_kv: Keys and values of the events, `[L, 2, H, D]`.
        owner: User of each candidate, `[C]`.
        plan: Padded groups of the histories.
        bias: Bias by distance, `[H, N + 1]`, the candidate being one step after the newest event; or None.

    Returns:
        Attended values, `[C, H, D]`; a candidate of a user without history attends to itself alone.
    """
    count, heads, width = query.shape
    scale = width**-0.5
    own = (query * key).sum(-1, keepdim=True) * scale  # [C, H, 1]
    if bias is not None:
        own = own + bias[None, :, :1]
    result = value + 0.0 * (own + history_kv.sum())
    for group in plan.groups:
        size, length = group.gather.shape
        place = torch.full((plan.num_sequences,), -1, dtype=torch.int64, device=owner.device)
        place[group.sequences] = torch.arange(size, device=owner.device)
        row = place[owner]
        mine = torch.nonzero(row >= 0).squeeze(1)
        if not len(mine):
            continue
        row = row[mine]
        kv = history_kv.index_select(0, group.gather.reshape(-1)).view(size, length, 2, heads, width)
        k, v = kv[row, :, 0], kv[row, :, 1]  # [c, n, H, D]
        logits = torch.einsum("chd,cnhd->chn", query[mine], k) * scale
        valid = group.valid[row]
        if bias is not None:
            distance = valid.sum(1, keepdim=True) - torch.arange(length, device=owner.device)
            logits = logits + bias.t()[distance.clamp(min=0)].transpose(1, 2)
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
        weight = torch.softmax(torch.cat([logits, own[mine]], dim=-1), dim=-1)
        out = torch.einsum("chn,cnhd->chd", weight[..., :-1], v) + weight[..., -1:] * value[mine]
        result = result.index_copy(0, mine, out.to(result.dtype))
    return result
