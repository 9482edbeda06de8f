"""Registration of the tiled path as an operator, so that `torch.compile` works around it.

A registered operator takes tensors and numbers only, so a layout travels as `Layout.packed` and is found again by the
number that it begins with, or rebuilt from it.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mufasa_rec.ops.sparse_attention import blocked
from mufasa_rec.ops.sparse_attention.layout import Layout, unpack
from mufasa_rec.ops.sparse_attention.projected import FIELDS, Projected

_KEPT = 32
_layouts: OrderedDict[int, Layout] = OrderedDict()
_lock = Lock()


def remember(layout: Layout) -> Tensor:
    """Keep a layout (with the tiles that will be found in it) for the operator; returns what to hand to it."""
    number = int(layout.packed[0])
    with _lock:
        _layouts[number] = layout
        _layouts.move_to_end(number)
        while len(_layouts) > _KEPT:
            _layouts.popitem(last=False)
    return layout.packed


def recall(packed: Tensor) -> Layout:
    """The layout that was packed, rebuilt where it is no longer kept."""
    with _lock:
        layout = _layouts.get(int(packed[0]))
    if layout is None:
        layout = unpack(packed)
        with _lock:
            _layouts[int(packed[0])] = layout
    return layout


@torch.library.custom_op("mufasa_rec::sparse_attention", mutates_args=())
def sparse_attention_op(
    rows: list[Tensor], k_block: Tensor, v_block: Tensor, packed: Tensor, selected: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `blocked.forward`; `rows` are the tensors of a `Projected`, shared keys and values once."""
    layout, x = recall(packed), _projected(rows, shared)
    with torch.autocast(k_block.device.type, enabled=False):
        out, lse, chosen = blocked.forward(x, k_block, v_block, layout, selected)
    return out, lse, chosen.clone() if chosen is selected else chosen


@torch.library.custom_op("mufasa_rec::sparse_attention_backward", mutates_args=())
def sparse_attention_backward_op(
    grad: Tensor,
    rows: list[Tensor],
    k_block: Tensor,
    v_block: Tensor,
    packed: Tensor,
    saved: list[Tensor],
    shared: bool,
) -> list[Tensor]:
    """Run `blocked.backward`; gradients in the order of `rows`, then of `k_block` and `v_block`."""
    layout, x = recall(packed), _projected(rows, shared)
    with torch.autocast(k_block.device.type, enabled=False):
        found = blocked.backward(grad, x, (k_block, v_block), layout, (saved[0], saved[1]))
    return [found[name] for name in (*_names(shared), "k_block", "v_block")]


def rows_of(x: Projected) -> list[Tensor]:
    """The tensors that the operator takes, contiguous; shared keys and values once."""
    tensors = x.tensors()
    return [tensors[name].contiguous() for name in _names(x.shared)]


def _names(shared: bool) -> list[str]:
    return [name for name in FIELDS if not (shared and name in ("k_selected", "v_selected"))]


def _projected(rows: list[Tensor], shared: bool) -> Projected:
    named = dict(zip(_names(shared), rows))
    if shared:
        named |= {"k_selected": named["k_window"], "v_selected": named["v_window"]}
    return Projected(**named)


@sparse_attention_op.register_fake
def _(
    rows: list[Tensor], k_block: Tensor, v_block: Tensor, packed: Tensor, selected: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q = rows[0]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if selected is None:
        size = torch.library.get_ctx()
        shape = [size.new_dynamic_size(), k_block.shape[1], size.new_dynamic_size()]
        selected = q.new_empty(shape, dtype=torch.int64)
    lse = q.new_empty(3, *q.shape[:2], dtype=exact)
    return torch.empty_like(q), lse, torch.empty_like(selected)


@sparse_attention_backward_op.register_fake
def _(
    grad: Tensor,
    rows: list[Tensor],
    k_block: Tensor,
    v_block: Tensor,
    packed: Tensor,
    saved: list[Tensor],
    shared: bool,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*rows, k_block, v_block)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, k_block, v_block, packed, _, ctx.shared = inputs
    ctx.num_rows = len(rows)
    ctx.save_for_backward(*rows, k_block, v_block, packed, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # activation checkpointing lets them be read once only
    rows, rest = list(saved[: ctx.num_rows]), saved[ctx.num_rows :]
    found = sparse_attention_backward_op(grad, rows, *rest[:3], list(rest[3:]), ctx.shared)
    return found[: ctx.num_rows], *found[ctx.num_rows :], None, None, None


sparse_attention_op.register_autograd(_backward, setup_context=_setup)
