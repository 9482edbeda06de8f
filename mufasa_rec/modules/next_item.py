"""The next-item objective: cosine over a learnable temperature, softmax over all items or over sampled negatives.

`loss = world size / global number of targets * sum over this rank's targets of weight * cross-entropy`, so that the
average over ranks that DDP and TorchRec take is the mean over the global batch, however unevenly the targets fall on
the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.ops import host_reads
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
                f"model.objective.temperature={self.temperature}: must lie within "
                f"min_temperature={self.min_temperature} > 0 and max_temperature={self.max_temperature}."
            )


@dataclass(frozen=True)
class Questions:
    """What this rank asks in a step; `T` targets, `C` candidates.

    Attributes:
        states: User states, of any length, `[T, E]`.
        positive: Unit vectors of the targets, `[T, E]`; read with sampled negatives only.
        target_row: Item row of each target, `[T]`.
        weight: Weight of each target, `[T]`.
        candidates: Unit vectors of this rank's candidates, `[C, E]`.
        candidate_row: Their item rows, `[C]`; of a whole catalog ascending, rank after rank.
        candidate_bias: Their `-log Q`, `[C]`; read with sampled negatives only.
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

    Example:
        >>> objective = NextItemObjective(NextItemConfig(), full=False)
        >>> unit = torch.eye(4)
        >>> rows, ones, bias = torch.arange(4), torch.ones(2), torch.zeros(4)
        >>> loss, total = objective(Questions(unit[:2], unit[:2], rows[:2], ones, unit, rows, bias))
        >>> bool(loss < 1e-6)  # states equal to their targets, and at right angles to everything else
        True
    """

    def __init__(self, config: NextItemConfig, *, full: bool, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.config, self.full = config, full
        self.exchange: Exchange = exchange or LocalExchange()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    @property
    def temperature(self) -> Tensor:
        """The learned temperature within its bounds, a scalar."""
        return self.log_temperature.clone().clamp(*self._bounds()).exp()

    def _bounds(self) -> tuple[float, float]:
        return math.log(self.config.min_temperature), math.log(self.config.max_temperature)

    def forward(self, asked: Questions) -> tuple[Tensor, Tensor]:
        """Compare states with candidates; collective.

        Args:
            asked: What this rank asks.

        Returns:
            This rank's loss (see the module docstring), and the unscaled sum of its targets' losses, detached.

        Raises:
            ValueError: On a CPU, when the candidates should be the whole catalog but lack a target.
        """
        if self.training:
            with torch.no_grad():  # outside the bounds the clamp has no gradient, and the parameter would never return
                self.log_temperature.clamp_(*self._bounds())
        counts = self.exchange.counts([len(asked.states), len(asked.candidates)])
        sizes = [count[1] for count in counts]
        vectors = self.exchange.gather(asked.candidates, sizes)
        rows = self.exchange.gather(asked.candidate_row, sizes)
        query = F.normalize(asked.states.float(), dim=-1) / self.temperature
        if self.full:
            total = full_softmax_loss(query, vectors, _columns(rows, asked.target_row), asked.weight)
        else:
            bias = self.exchange.gather(asked.candidate_bias, sizes)
            total = sampled_softmax_loss(query, asked.positive, vectors, bias, asked.target_row, rows, asked.weight)
        scale = self.exchange.world_size / max(sum(count[0] for count in counts), 1)
        return total * scale, total.detach()


def _columns(rows: Tensor, target_row: Tensor) -> Tensor:
    """Column of each target among the ascending candidate rows."""
    column = torch.searchsorted(rows, target_row)
    if host_reads.free(rows) and len(rows):
        absent = rows[column.clamp(max=len(rows) - 1)] != target_row
        if bool(absent.any()):
            raise ValueError(
                f"target_row: {int(absent.sum())} targets are not among the {len(rows)} candidates (such as row "
                f"{int(target_row[absent][0])}); a full softmax needs every item that may be a target, ascending."
            )
    return column
