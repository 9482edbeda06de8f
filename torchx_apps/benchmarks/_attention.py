"""What the attention benchmark compares: inputs of a shape, a sparse and a dense step, and the check of a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.ops.attention import causal_attention
from mufasa_rec.ops.jagged import plan_groups, sequence_ids
from mufasa_rec.ops.sparse_attention.api import attend_and_select
from mufasa_rec.ops.sparse_attention.layout import Layout, plan_layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.plan import num_selected_blocks
from mufasa_rec.ops.sparse_attention.pooling import pool_blocks
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_SAMPLED = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape.

    Attributes:
        pattern: What queries see.
        sizes: Events of each sequence.
        lengths: How they are distributed.
        dtype: Dtype of all inputs.
        groups: Key/value heads.
        shared: Whether branches share keys and values; else each has its own, and blocks are pooled by learned weights.
        mixer: Whether block tokens are mixed causally before they are read.
        clustered: Whether queries and keys share topics, so that many queries select the same blocks.
        heads: Query heads.
        width: Head width.
    """

    pattern: SparsePattern
    sizes: tuple[int, ...]
    lengths: str = "uniform"
    dtype: torch.dtype = torch.float32
    groups: int = 4
    shared: bool = False
    mixer: bool = False
    clustered: bool = False
    heads: int = 4
    width: int = 64

    @property
    def events(self) -> int:
        """Events of the batch."""
        return sum(self.sizes)

    @cached_property
    def offsets(self) -> Tensor:
        """Offsets of the sequences, `[B + 1]`."""
        return torch.tensor([0, *self.sizes]).cumsum(0)


class SparseStep:
    """Forward and backward of pooling, block mixer, selection and attention; projections are not part of it."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.layout = plan_layout(case.offsets, case.pattern)
        self.x = _inputs(case)
        k, v = (self.x.k_window, self.x.v_window) if case.shared else (_rows(case, True), _rows(case, False))
        self.k, self.v = k, v
        learned = torch.randn(case.pattern.block, case.groups).to(case.dtype).requires_grad_()
        self.logits = None if case.shared else learned
        self.weight = torch.randn(self.x.q.shape).to(case.dtype)
        self.plan = plan_groups(self.layout.tokens.offsets, self.layout.num_tokens)

    @property
    def leaves(self) -> list[Tensor]:
        """All that gets a gradient, once."""
        tensors = [*self.x.tensors().values(), self.k, self.v]
        return [*{id(t): t for t in tensors + ([] if self.logits is None else [self.logits])}.values()]

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the block tokens."""
        k, v = (pool_blocks(t, self.layout, logits=self.logits) for t in (self.k, self.v))
        if self.case.mixer:
            mixed = causal_attention(torch.stack([k, k, v], dim=1), self.plan)
            return k + mixed, v + mixed
        return k, v

    def __call__(self) -> None:
        """Run a step."""
        for tensor in self.leaves:
            tensor.grad = None
        out, _ = attend_and_select(self.x, *self.tokens(), self.layout)
        out.backward(self.weight)


def dense_step(case: Case) -> tuple[Callable[[], None], float]:
    """Full causal attention, sequence by sequence; and by what to multiply its time.

    One sequence of each length and one head of very long ones stand for all: the others take as long.
    """
    heads = 1 if max(case.sizes) > 20_000 else case.heads
    sizes = [*dict.fromkeys(case.sizes)] if case.lengths == "uniform" else list(case.sizes)
    scale = len(case.sizes) / len(sizes) * case.heads / heads
    inputs = [[torch.randn(1, heads, n, case.width).to(case.dtype).requires_grad_() for _ in range(3)] for n in sizes]
    weights = [torch.randn_like(q) for q, _, _ in inputs]

    def step() -> None:
        for (q, k, v), weight in zip(inputs, weights, strict=True):
            q.grad = k.grad = v.grad = None
            F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(weight)

    return step, scale


def useful_flops(layout: Layout, case: Case) -> float:
    """Floating-point operations, forward and backward, on the pairs that the budget has: seven products a pair."""
    pattern, tiles = layout.pattern, layout.tiles
    place = torch.arange(layout.num_events) - layout.offsets[sequence_ids(layout.offsets, layout.num_events)]
    window = (place + 1).clamp(max=pattern.window).sum()
    rows = tiles.end - tiles.begin
    own = (tiles.begin - layout.blocks.begin[tiles.block]) * rows + rows * (rows + 1) // 2
    selected = (num_selected_blocks(layout) * pattern.selection_block * rows + own).sum()
    pairs = int(window + selected + layout.visible_tokens.sum())
    return 14.0 * pairs * case.heads * case.width


def check(step: SparseStep) -> None:
    """Compare a few queries of a shape, and the gradients that they cause, with dense rows in float64.

    Raises:
        AssertionError: When the outputs, the gradients or the selected blocks are wrong.
    """
    case, layout = step.case, step.layout
    k_block, v_block = (t.detach().requires_grad_() for t in step.tokens())
    last = layout.offsets[1:][layout.offsets.diff() > 0] - 1
    picked = torch.cat([last[:2], torch.randint(0, case.events, (_SAMPLED,))]).unique()
    out, chosen = attend_and_select(step.x, k_block, v_block, layout)
    weight = torch.zeros_like(out)
    weight[picked] = step.weight[picked]
    leaves = [*{id(t): t for t in (*step.x.tensors().values(), k_block, v_block)}.values()]
    got = [out.detach()[picked], *torch.autograd.grad((out * weight).sum(), leaves)]
    exact = {id(t): t.detach().double().requires_grad_() for t in leaves}
    x = Projected(**{name: exact[id(t)] for name, t in step.x.tensors().items()})
    tokens = exact[id(k_block)], exact[id(v_block)]
    rows = torch.stack([_query(x, *tokens, layout, t, chosen) for t in picked.tolist()])
    truth = [rows.detach(), *torch.autograd.grad((rows * weight[picked]).sum(), list(exact.values()))]
    scale = max(float(t.norm()) for t in truth)
    for mine, right in zip(got, truth, strict=True):
        error, size = float((mine.double() - right).norm()), max(float(right.norm()), 0.01 * scale)
        assert error <= _TOLERANCE[case.dtype] * size, f"{case}: error {error / size:.1e}"


def _query(x: Projected, k_block: Tensor, v_block: Tensor, layout: Layout, t: int, chosen: Tensor) -> Tensor:
    """Attended values of one query, `[H, D]`, in float64, and a check of the blocks that it was given."""
    pattern, tiles = layout.pattern, layout.tiles
    tile = int(torch.searchsorted(tiles.begin, t, right=True)) - 1
    sequence, place, first = int(tiles.sequence[tile]), int(tiles.place[tile]), int(tiles.begin[tile])
    start, token = int(layout.offsets[sequence]), int(layout.tokens.offsets[sequence])
    block, ratio = pattern.block, x.q.shape[1] // x.groups
    window = torch.arange(max(start, t + 1 - (pattern.window or t + 1)), t + 1)
    out = []
    for head in range(x.q.shape[1]):
        group = head // ratio
        places = {0, place, *chosen[tile, group].tolist()} - {-1}
        _check_choice(x, k_block, first, range(token, token + (first - start) // block), places, group)
        events = torch.cat([torch.arange(start + j * block, start + (j + 1) * block) for j in sorted(places)])
        parts = (
            (WINDOW, x.q, x.k_window, x.v_window, window),
            (SELECTED, x.q, x.k_selected, x.v_selected, events[events <= t]),
            (BLOCK, x.q_block, k_block, v_block, torch.arange(token, token + (t + 1 - start) // block)),
        )
        total = x.gates.new_zeros(x.q.shape[-1])
        for branch, q, k, v, seen in parts:
            weights = (k[seen, group] @ q[t, head] * q.shape[-1] ** -0.5).softmax(0)
            total = total + x.gates[t, head, branch] * (weights @ v[seen, group])
        out.append(total)
    return torch.stack(out)


def _check_choice(x: Projected, k_block: Tensor, first: int, readable: range, places: set[int], group: int) -> None:
    """Check that no block was left out whose score is above that of a chosen one."""
    ratio, count = x.q.shape[1] // x.groups, len(readable)
    heads = x.q_block[first, group * ratio : (group + 1) * ratio].detach()
    keys = k_block[readable.start : readable.stop, group].detach()
    scores = (heads @ keys.T * x.q.shape[-1] ** -0.5).softmax(-1).sum(0)
    picked = [j for j in places if 0 < j < count]
    left = [j for j in range(1, count) if j not in places]
    if picked and left:
        assert float(scores[left].max()) <= float(scores[picked].min()) * (1 + 1e-4)


def _inputs(case: Case) -> Projected:
    k, v = _rows(case, True), _rows(case, False)
    return Projected(
        q=_rows(case, True, case.heads),
        q_block=_rows(case, True, case.heads),
        k_window=k,
        v_window=v,
        k_selected=k if case.shared else _rows(case, True),
        v_selected=v if case.shared else _rows(case, False),
        gates=torch.rand(case.events, case.heads, 3).to(case.dtype).requires_grad_(),
    )


def _rows(case: Case, topical: bool, heads: int | None = None) -> Tensor:
    """Random rows `[L, G, D]`; with topics that last for some hundred events, where asked for."""
    rows = torch.randn(case.events, heads or case.groups, case.width)
    if topical and case.clustered:
        generator = torch.Generator().manual_seed(1)
        topics = torch.randn(6, 1, case.width, generator=generator)
        topic = torch.randint(0, 6, (case.events // 300 + 1,), generator=generator).repeat_interleave(300)
        rows += topics[topic[: case.events]]
    return rows.to(case.dtype).requires_grad_()
