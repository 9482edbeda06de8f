"""The next-item objective: cosine over a learnable temperature, softmax over all items or over sampled negatives.

`loss = world size / global number of targets * sum over this rank's targets of weight * cross-entropy`, so that the average over ranks
that DDP and TorchRec take is the mean over the global batch, however unevenly the targets fall on the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.ops.softmax import full_softmax_loss, sampled_softmax_loss


class Exchange(Protocol):
    """What the objective needs from the other ranks; a single process needs nothing (`LocalExchange`)."""

    world_size: int

    def counts(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's `values`, one list per rank."""
        ...

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows `[n_r, ...]` of all ranks end to end, with gradient; `sizes` are the ranks' row counts."""
        ...


class LocalExchange:
    """The exchange of a single process."""

    world_size = 1

    def counts(self, values: Sequence[int]) -> list[list[int]]:
        """Return `[values]`."""
        return [list(values)]

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return `x`."""
        return x


@dataclass(frozen=True, kw_only=True)
class NextItemConfig:
    """The objective.

    Attributes:
        temperature: Initial temperature of the cosine.
        min_temperature: Lower bound of the learned temperature.
        max_temperature: Upper bound of the learned temperature.
    """

    temperature: float = 0.05
    min_temperature: float = 0.01
    max_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(
                f"model.objective.temperature={self.temperature}: must lie within min_temperature={self.min_temperature} > 0 "
                f"and max_temperature={self.max_temperature}."
            )


@dataclass(frozen=True)
class Questions:
    """What this rank asks in a step; `T` targets, `C` candidates.

    Attributes:
        states: User states, `[T, E]`.
        positive: Unit vectors of the targets, `[T, E]`.
        target_row: Item row of each target, `[T]`.
        weight: `[T]`.
        candidates: Unit vectors of this rank's candidates, `[C, E]`.
        candidate_row: Their item rows, `[C]`.
        candidate_bias: Their `-log Q`, `[C]`.
    """

    states: Tensor
    positive: Tensor
    target_row: Tensor
    weight: Tensor
    candidates: Tensor
    candidate_row: Tensor
    candidate_bias: Tensor


class NextItemObjective(nn.Module):
    """See the module docstring.

    Args:
        config: The objective.
        full: Whether the ranks' candidates together are the whole catalog (then a target is one of them).
        exchange: Reaches the other ranks.
    """

    def __init__(self, config: NextItemConfig, *, full: bool, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.config, self.full = config, full
        self.exchange: Exchange = exchange or LocalExchange()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    @property
    def temperature(self) -> Tensor:
        """The learned temperature within its bounds, a scalar."""
        low, high = math.log(self.config.min_temperature), math.log(self.config.max_temperature)
        return self.log_temperature.clamp(low, high).exp()

    def forward(self, asked: Questions) -> tuple[Tensor, Tensor]:
        """Return this rank's loss (see the module docstring) and the unscaled sum of its targets' losses."""
        counts = self.exchange.counts([len(asked.states), len(asked.candidates)])
        sizes = [count[1] for count in counts]
        vectors = self.exchange.gather(asked.candidates, sizes)
        rows = self.exchange.gather(asked.candidate_row, sizes)
        query = F.normalize(asked.states.float(), dim=-1) / self.temperature
        if self.full:
            column = torch.searchsorted(rows, asked.target_row)
            total = full_softmax_loss(query, vectors, column, asked.weight)
        else:
            bias = self.exchange.gather(asked.candidate_bias, sizes)
            total = sampled_softmax_loss(query, asked.positive, vectors, bias, asked.target_row, rows, asked.weight)
        scale = self.exchange.world_size / max(sum(count[0] for count in counts), 1)
        return total * scale, total.detach()
