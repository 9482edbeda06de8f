"""What each rank of a fusion run reads: its part of every global batch, and of the held-out items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mufasa_rec.data.item_sampler import ItemSampler
from mufasa_rec.data.randomness import uniform
from mufasa_rec.modules.fusion import ItemContent
from mufasa_rec.modules.fusion_batch import Behaviour
from mufasa_rec.training.fusion_items import FusionItems

_HOLDOUT_STREAM = 13


def hold_out(rows: np.ndarray, ids: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part item rows into those to train on and those held out, keyed by seed and id.

    Args:
        rows: Item rows, `[n]`.
        ids: Their raw ids, `[n]`.
        share: Share to hold out.
        seed: Seed of the run.

    Returns:
        Rows to train on and rows held out, in the given order.

    Example:
        >>> trained, held = hold_out(np.arange(1000), np.arange(1000), 0.1, seed=0)
        >>> len(trained) + len(held), 70 < len(held) < 130
        (1000, True)
    """
    held = uniform(seed, _HOLDOUT_STREAM, ids) < share
    return rows[~held], rows[held]


@dataclass(frozen=True, eq=False)
class RankFeed:
    """Implements `fusion_trainer.Feed`.

    Attributes:
        items: The catalog.
        sampler: Gives global batches.
        held: Held-out item rows, `[n]`; there may be none.
        rank: This rank.
        world_size: Number of ranks.
    """

    items: FusionItems
    sampler: ItemSampler
    held: np.ndarray
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold as many items as there are to train on."""
        return self.sampler.steps_per_epoch

    def batch(self, step: int) -> tuple[ItemContent, Behaviour]:
        """This rank's part of the batch of a step."""
        return self._part(self.sampler.batch(step))

    def held_out(self) -> Iterator[tuple[ItemContent, Behaviour]]:
        """This rank's parts of the batches of held-out items, batches of about the same size."""
        pieces = -(-len(self.held) // self.sampler.batch_size)
        for rows in np.array_split(self.held, pieces) if pieces else ():
            yield self._part(rows)

    def _part(self, rows: np.ndarray) -> tuple[ItemContent, Behaviour]:
        start, stop = (len(rows) * place // self.world_size for place in (self.rank, self.rank + 1))
        return self.items.content(rows[start:stop]), self.items.behaviour(rows, start, stop)
