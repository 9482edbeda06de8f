"""A drawing of what sparse attention reads, made by the operator itself.

With values that name their own row, attended values are attention weights: so the drawing cannot differ from the code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from mufasa_rec.ops.sparse_attention.api import sparse_attention
from mufasa_rec.ops.sparse_attention.layout import Layout, plan_layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.projected import BLOCK, SELECTED, WINDOW, Projected

EXAMPLE = SparsePattern(window=12, block=8, num_selected=4)
_EVENTS = 72
_COLOURS = {WINDOW: "#3b6fb6", SELECTED: "#d1792b", BLOCK: "#4f8f5b"}
_TITLES = {
    WINDOW: "window: the newest events",
    SELECTED: "selected: events of a few blocks",
    BLOCK: "block: a token per complete block",
}


def branch_masks(pattern: SparsePattern, num_events: int) -> dict[int, Tensor]:
    """What each branch reads, for random queries and keys.

    Args:
        pattern: What a query sees.
        num_events: Length of the one sequence.

    Returns:
        By branch, whether a query reads an event, `[L, L]` bool: in the block branch through the token of its block.

    Example:
        >>> masks = branch_masks(SparsePattern(window=2, block=2, num_selected=2), 5)
        >>> masks[WINDOW].int().tolist()[4], masks[BLOCK].int().tolist()[4]
        ([0, 0, 0, 1, 1], [1, 1, 1, 1, 0])
    """
    pattern = replace(pattern, window_branch=True, selected_branch=True, block_branch=True)
    layout = plan_layout(torch.tensor([0, num_events]), pattern)
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, num_events, 1, num_events, generator=generator)
    k_block = torch.randn(layout.num_tokens, 1, num_events, generator=generator)
    rows, tokens = torch.eye(num_events)[:, None], _members(layout, num_events)[:, None]
    found = {}
    for branch in (WINDOW, SELECTED, BLOCK):
        gates = torch.zeros(num_events, 1, 3)
        gates[..., branch] = 1.0
        x = Projected(q=q, q_block=q, k_window=k, v_window=rows, k_selected=k, v_selected=rows, gates=gates)
        found[branch] = sparse_attention(x, k_block, tokens, layout)[:, 0] > 0
    return found


def _members(layout: Layout, num_events: int) -> Tensor:
    """Which events each token stands for, `[K, L]` of zeros and ones."""
    event = torch.arange(num_events)
    tokens = layout.tokens
    return ((event >= tokens.begin[:, None]) & (event < tokens.end[:, None])).float()


@mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attention mask", "font.size": 9.5})
def draw_mask(file: Path, pattern: SparsePattern = EXAMPLE, num_events: int = _EVENTS) -> None:
    """Draw the three branches side by side.

    Args:
        file: Where the drawing is written; its suffix decides the format.
        pattern: What a query sees.
        num_events: Length of the history that is drawn.
    """
    figure = Figure(figsize=(10.5, 3.9), layout="constrained", facecolor="white")
    masks = branch_masks(pattern, num_events)
    for axes, (branch, mask) in zip(figure.subplots(1, len(masks), sharey=True), masks.items(), strict=True):
        shades = ListedColormap(["white", "#ececec", _COLOURS[branch]])
        past = torch.ones(num_events, num_events, dtype=torch.bool).tril()
        axes.imshow((past.int() + (mask & past).int()).numpy(), cmap=shades, vmin=0, vmax=2, interpolation="none")
        for border in range(0, num_events, pattern.selection_block):
            for line in (axes.axvline, axes.axhline):
                line(border - 0.5, color="#999999", linewidth=0.4)
        axes.set_title(_TITLES[branch], fontsize=10)
        axes.set_xlabel("event that is read")
        axes.set_xticks(range(0, num_events, 2 * pattern.selection_block))
        axes.set_yticks(range(0, num_events, 2 * pattern.selection_block))
    figure.axes[0].set_ylabel("event that asks")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=160)
