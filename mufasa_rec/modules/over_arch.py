"""The over-arch of a ranker: everything known about an impression to one logit per task.

What is the same for all candidates of a request passes its share of the first layer once per request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OverArch(nn.Module):
    """An MLP over request and candidate, shared by the tasks, with one head each.

    Args:
        request_width: Width of what is known about a request; 0 for nothing.
        candidate_width: Width of what is known about a candidate.
        hidden: Widths of the hidden layers, at least one.
        num_tasks: Tasks `T`.
        dropout: Probability of dropping a channel of a hidden layer.

    Raises:
        ValueError: Without a hidden layer or a task.

    Example:
        >>> arch = OverArch(3, 5, hidden=(8, 4), num_tasks=2)
        >>> arch(torch.randn(2, 3), torch.randn(6, 5), torch.tensor([0, 0, 0, 1, 1, 1])).shape
        torch.Size([6, 2])
    """

    def __init__(
        self, request_width: int, candidate_width: int, *, hidden: Sequence[int], num_tasks: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden={tuple(hidden)}: give the width of one hidden layer or more.")
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks}: a ranker has 1 task or more.")
        self.of_request = nn.Linear(request_width, hidden[0], bias=False) if request_width else None
        self.of_candidate = nn.Linear(candidate_width, hidden[0])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(hidden[:-1], hidden[1:], strict=True))
        self.heads = nn.ModuleList(nn.Linear(hidden[-1], 1) for _ in range(num_tasks))
        self.dropout = nn.Dropout(dropout)

    def forward(self, request: Tensor, candidate: Tensor, owner: Tensor) -> Tensor:
        """Score candidates.

        Args:
            request: What is known about each request, `[B, request_width]`.
            candidate: What is known about each candidate, `[C, candidate_width]`.
            owner: Request of each candidate, `[C]` int64.

        Returns:
            Logits in fp32 at least, `[C, T]`.
        """
        x = self.of_candidate(candidate)
        if self.of_request is not None:
            x = x + self.of_request(request).index_select(0, owner)
        x = self._finish(x, 0)
        for index, layer in enumerate(self.layers, start=1):
            x = self._finish(layer(x), index)
        logits = torch.cat([head(x) for head in self.heads], dim=1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _finish(self, x: Tensor, index: int) -> Tensor:
        return self.dropout(F.silu(self.norms[index](x)))
