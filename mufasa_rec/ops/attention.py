"""Full causal attention over jagged sequences, with rotary positions: the exact, quadratic extractor's operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mufasa_rec.ops import host_reads
from mufasa_rec.ops.jagged import GroupPlan, PaddedGroup


def rotation(position: Tensor, width: int, *, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (RoPE, arXiv 2104.09864), to be shared by all layers.

    The angles are formed in float64: in fp32 that of position 100,000 is off by 0.004, and would not be relative.

    Args:
        position: Position of each row in its user's stream, `[L]`.
        width: Head width `D`, even.
        base: Longest wavelength over 2 pi.

    Returns:
        Cosines and sines, each `[L, D / 2]` fp32.

    Raises:
        ValueError: When the width is odd.
    """
    if width % 2:
        raise ValueError(f"width={width}: rotary positions turn pairs of channels; choose an even head width.")
    half = width // 2
    frequency = base ** (-torch.arange(half, device=position.device, dtype=torch.float64) / half)
    angle = position.to(torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs `(i, i + D / 2)` of rows by the angles of `rotation`, in fp32.

    Args:
        x: Queries or keys, `[L, ..., D]`.
        turn: Cosines and sines, each `[L, D / 2]`.

    Returns:
        Rotated rows, of the shape and dtype of `x`.
    """
    shape = (len(x), *(1 for _ in x.shape[1:-1]), x.shape[-1] // 2)
    return _Rotate.apply(x, turn[0].view(shape), turn[1].view(shape))


class _Rotate(torch.autograd.Function):
    """A rotation: its gradient is the rotation back. Four passes over the rows, none of them kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rows turned by the angles, or back."""
    exact = torch.promote_types(x.dtype, cos.dtype)
    out = torch.empty_like(x, dtype=exact, memory_format=torch.contiguous_format)
    left, right = x.to(exact).chunk(2, dim=-1)
    by_left, by_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=by_left).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=by_right).addcmul_(left, sin, value=sign)
    return out.to(x.dtype)


def rotary(x: Tensor, position: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotate queries or keys `[L, H, D]` by their positions `[L]`; see `rotation` and `rotate`.

    The product of a rotated query and a rotated key depends on the difference of their positions alone.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 8)
        >>> near = rotary(q, torch.tensor([5])) * rotary(k, torch.tensor([2]))
        >>> far = rotary(q, torch.tensor([905])) * rotary(k, torch.tensor([902]))
        >>> torch.allclose(near.sum(), far.sum(), atol=1e-5)
        True
    """
    return rotate(x, rotation(position, x.shape[-1], base=base))


def causal_attention(qkv: Tensor, plan: GroupPlan, *, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of every event over itself and the earlier events of its sequence.

    Args:
        qkv: Queries, keys and values, `[L, 3, H, D]`.
        plan: Padded groups of the batch, from `plan_groups`.
        bias: Added to the logits by distance into the past, `[H, N]` with N at least the longest sequence; or None.

    Returns:
        Attended values, `[L, H, D]`. A batch without events still connects `qkv` and `bias` to the graph, so that
        data-parallel training sees a gradient (of zeros) for every parameter.

    Raises:
        ValueError: When `bias` has fewer distances than the longest sequence has events.

    Example:
        >>> from mufasa_rec.ops.jagged import plan_groups
        >>> qkv = torch.randn(5, 3, 2, 4)
        >>> out = causal_attention(qkv, plan_groups(torch.tensor([0, 1, 5]), 5))
        >>> torch.allclose(out[:2], qkv[:2, 2])  # the first event of a sequence sees itself alone
        True
    """
    _, _, heads, width = qkv.shape
    if not plan.groups:
        return qkv[:, 2] if bias is None else qkv[:, 2] + bias[:0].sum()
    outputs = []
    for group in plan.groups:
        size, length = group.gather.shape
        padded = qkv.index_select(0, group.gather.reshape(-1)).view(size, length, 3, heads, width)
        q, k, v = padded.permute(2, 0, 3, 1, 4)  # each [b, H, n, D]
        mask = None if bias is None else _causal_mask(bias, length).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        outputs.append(out.transpose(1, 2).reshape(size * length, heads, width))
    return torch.cat(outputs).index_select(0, plan.restore)


def candidate_attention(
    qkv: Tensor, history_kv: Tensor, owner: Tensor, plan: GroupPlan, *, bias: Tensor | None = None
) -> Tensor:
    """Attention of candidates, each over its user's whole history and itself, and over nothing else.

    Each candidate reads a copy of its user's padded keys and values, `C x N` rows in all: right for a few candidates
    per user, as a ranker has, and not for scoring a catalog.

    Args:
        qkv: Queries, keys and values of the candidates, `[C, 3, H, D]`.
        history_kv: Keys and values of the events, `[L, 2, H, D]`.
        owner: User of each candidate, `[C]`.
        plan: Padded groups of the histories.
        bias: Bias by distance, `[H, N]` with N above the longest sequence, the candidate being one step after the
            newest event; or None.

    Returns:
        Attended values, `[C, H, D]`; a candidate of a user without history gets its own value.

    Raises:
        ValueError: When `bias` has too few distances.
    """
    result = qkv[:, 2] + history_kv[:0].sum()  # keeps every parameter in the graph, without reading a value
    if bias is not None:
        result = result + bias[:0].sum()
    for group in plan.groups:
        if len(group.sequences) == plan.num_sequences and not host_reads.free(owner):
            result = _attend(qkv, history_kv, owner, group, bias)  # `nonzero` would wait for the device
            break
        place = torch.full((plan.num_sequences,), -1, dtype=torch.int64, device=owner.device)
        place[group.sequences] = torch.arange(len(group.sequences), device=owner.device)
        row = place[owner]
        mine = torch.nonzero(row >= 0).squeeze(1)
        if len(mine):
            out = _attend(qkv[mine], history_kv, row[mine], group, bias)
            result = result.index_copy(0, mine, out.to(result.dtype))
    return result


def _attend(qkv: Tensor, history_kv: Tensor, row: Tensor, group: PaddedGroup, bias: Tensor | None) -> Tensor:
    """Candidates `[c, 3, H, D]` over the histories `row [c]` of a group and over themselves, `[c, H, D]`."""
    (size, length), (_, _, heads, width) = group.gather.shape, qkv.shape
    padded = history_kv.index_select(0, group.gather.reshape(-1)).view(size, length, 2, heads, width)
    keys = torch.cat([padded[row], qkv[:, None, 1:]], dim=1)  # [c, n + 1, 2, H, D], itself last
    k, v = keys.permute(2, 0, 3, 1, 4)  # each [c, H, n + 1, D]
    valid = F.pad(group.valid[row], (0, 1), value=True)
    mask = valid[:, None, None]
    if bias is not None:
        _check_distances(bias, length + 1)
        step = torch.arange(length + 1, device=row.device)
        distance = (valid.sum(1, keepdim=True) - 1 - step).clamp(min=0)  # itself: 0, the newest event: 1
        added = bias.index_select(1, distance.reshape(-1)).view(heads, len(row), 1, length + 1).transpose(0, 1)
        mask = added.masked_fill(~mask, float("-inf")).to(qkv.dtype)
    return F.scaled_dot_product_attention(qkv[:, 0, :, None], k, v, attn_mask=mask).squeeze(2)


def _causal_mask(bias: Tensor, length: int) -> Tensor:
    """Additive causal mask `[H, n, n]` from a bias by distance `[H, N]`."""
    _check_distances(bias, length)
    step = torch.arange(length, device=bias.device)
    distance = step[:, None] - step[None]
    mask = bias.index_select(1, distance.clamp(min=0).reshape(-1)).view(-1, length, length)
    return mask.masked_fill(distance < 0, float("-inf"))


def _check_distances(bias: Tensor, needed: int) -> None:
    if bias.shape[1] < needed:
        raise ValueError(
            f"bias: {bias.shape[1]} distances, but the longest sequence needs {needed}; build the extractor with a "
            f"max_history of at least {needed}."
        )
