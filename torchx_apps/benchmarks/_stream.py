"""An endless stream of 64-bit ids for benchmarks: Zipf-distributed, drifting, and the same when a step is made again.

An event has rank r with probability (ln(r + 1) - ln r) / ln R for ranks 1 to R = 10^18: few ranks are very frequent,
and half of all events belong to ranks that hardly ever come again. Each rank stands for one id for `lifetime` steps,
then for another one, at a time of its own: new ids come and old ones fade at every frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mufasa_rec.distributed.id_keys import mix

_LOG_RANKS = 18 * math.log(10)
_EPOCH = 0x2545F4914F6CDD1D  # odd: (rank, epoch) to one number without two of them meeting in practice


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The stream.

    Attributes:
        batch: Events of a step.
        lifetime: Steps for which a rank stands for one id.
        seed: Seed of all draws.
    """

    batch: int
    lifetime: int
    seed: int = 0

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """Ranks of a step's events and the ids that they stand for, each int64 `[batch]`."""
        stream = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        uniform = torch.rand(self.batch, dtype=torch.float64, generator=stream)
        ranks = torch.exp(uniform * _LOG_RANKS).long()
        return ranks, mix(ranks + self._epoch(ranks, step) * _EPOCH)

    def _epoch(self, ranks: Tensor, step: int) -> Tensor:
        """How many ids a rank has stood for before."""
        return torch.div(step + self._phase(ranks), self.lifetime, rounding_mode="floor")

    def _phase(self, ranks: Tensor) -> Tensor:
        return mix(ranks ^ self.seed) % self.lifetime  # torch's remainder is not negative

    def expected_counts(self, ranks: Tensor, step: int, window: tuple[int, int]) -> Tensor:
        """Expected number of events of a window of steps that had the ids that ranks `[n]` stand for at `step`."""
        begin = self._epoch(ranks, step) * self.lifetime - self._phase(ranks)
        steps = (window[1] - begin.clamp_min(window[0])).clamp_min(0)
        return self.batch * steps * torch.log1p(1.0 / ranks.double()) / _LOG_RANKS

    def expected_distinct(self, steps: int) -> float:
        """Expected number of distinct ids of the first steps.

        Of a rank with λ events a step, an id that stands for it during x steps is seen with probability 1 - exp(-λx);
        the rank's own times are spread evenly.
        """
        edges = np.unique(np.floor(np.exp(np.linspace(0.0, _LOG_RANKS, 200_001))))
        mass = np.diff(np.log(edges)) / _LOG_RANKS  # of the ranks from each edge to the next
        number = np.diff(edges)
        rate = self.batch * mass / number
        life, whole = float(self.lifetime), float(steps)

        def seen(x: float) -> np.ndarray:
            return -np.expm1(-rate * x)

        def mean(x: float) -> np.ndarray:  # of `seen` over 0 to x
            return np.where(rate * x > 1e-9, 1.0 - seen(x) / np.maximum(rate * x, 1e-300), rate * x / 2)

        if whole >= life:
            found = (whole / life - 1.0) * seen(life) + 2.0 * mean(life)
        else:
            found = (1.0 - whole / life) * seen(whole) + whole / life * 2.0 * mean(whole)
        return float((number * found).sum())

    def steps_for(self, distinct: float) -> int:
        """Steps after which so many distinct ids are expected."""
        low, high = 1, 2
        while self.expected_distinct(high) < distinct:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.expected_distinct(middle) >= distinct else (middle, high)
        return high
