"""The loss of a ranker: binary cross-entropy per task, and what an extractor must restore.

    loss = sum over tasks of v_t * (sum of weighted cross-entropies of this rank) * world size / global number of labels
           + lambda * (sum of divergences of this rank) * world size / global number of histograms

DDP and TorchRec average over ranks, so the gradient is that of the global means, whatever the ranks' shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.ops import host_reads


class SumExchange(Protocol):
    """What the loss needs from the other ranks."""

    world_size: int

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over ranks, without gradient; `x` may be changed in place."""
        ...


class NoExchange:
    """A world of one rank."""

    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class RankingObjective(nn.Module):
    """See the module docstring.

    Args:
        task_weights: Weight `v_t` of each task.
        distribution_weight: Weight `lambda` of what must be restored.
        exchange: Reaches the other ranks; None for a world of one.

    Raises:
        ValueError: For a negative weight.

    Example:
        >>> objective = RankingObjective([1.0], distribution_weight=0.1)
        >>> labels, ones = torch.tensor([[1.0], [0.0]]), torch.ones(2)
        >>> nothing = torch.zeros(()), torch.tensor(0)
        >>> loss, total = objective(torch.zeros(2, 1), labels, ones, nothing)
        >>> round(loss.item(), 4), round(total.item(), 4)
        (0.6931, 1.3863)
    """

    def __init__(
        self, task_weights: Sequence[float], *, distribution_weight: float, exchange: SumExchange | None = None
    ) -> None:
        super().__init__()
        if distribution_weight < 0 or min(task_weights) < 0:
            raise ValueError(
                f"task_weights={tuple(task_weights)}, distribution_weight={distribution_weight}: choose 0 or more."
            )
        self.register_buffer("task_weights", torch.tensor(task_weights), persistent=False)
        self.distribution_weight = distribution_weight
        self.exchange: SumExchange = exchange or NoExchange()

    def forward(
        self, logits: Tensor, labels: Tensor, weight: Tensor, restored: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compare logits with labels; collective.

        Args:
            logits: Logits, `[C, T]`.
            labels: 0 or 1, `[C, T]`; a negative one is no label, and is not asked for.
            weight: Weight of each candidate, `[C]`; 0 leaves it out.
            restored: Sum of this rank's divergences, and their number.

        Returns:
            This rank's loss, and the unscaled sum of its weighted cross-entropies, detached.

        Raises:
            ValueError: On a CPU, for labels that are neither 0, 1 nor negative.
        """
        _check_labels(labels)
        asked = (labels >= 0) & (weight > 0)[:, None]
        losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
        task_weights = self.get_buffer("task_weights")
        sums = torch.where(asked, losses * weight[:, None], 0.0).sum(0) * task_weights
        divergence, histograms = restored
        numbers = torch.cat([asked.sum(0), histograms[None]]).double()
        scale = self.exchange.world_size / self.exchange.sum(numbers).clamp(min=1).to(sums.dtype)
        loss = (sums * scale[:-1]).sum() + self.distribution_weight * divergence * scale[-1]
        return loss, sums.sum().detach()


def _check_labels(labels: Tensor) -> None:
    if host_reads.free(labels) and len(labels) and not bool(((labels == 0) | (labels == 1) | (labels < 0)).all()):
        wrong = labels[(labels != 0) & (labels != 1) & ~(labels < 0)][0]
        raise ValueError(f"labels: {float(wrong)}; cross-entropy wants 0 or 1, and a negative number for no label.")
