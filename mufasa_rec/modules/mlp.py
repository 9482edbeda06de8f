"""Feed-forward blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GatedBlock(nn.Module):
    """Gated feed-forward block: `W2 (W1 x * silu(Wg x))` (SwiGLU, arXiv 2002.05202).

    Args:
        width: Width of input and output.
        hidden: Width between.
        dropout: Probability of dropping a channel of the output.

    Example:
        >>> import torch
        >>> GatedBlock(8, 16)(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.into = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `[..., width]`."""
        value, gate = self.into(x).chunk(2, dim=-1)
        return self.dropout(self.out(value * F.silu(gate)))
