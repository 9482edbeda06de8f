"""The items of all ranks, as the fusion layer's losses read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mufasa_rec.modules.fusion import Fused, ItemContent
from mufasa_rec.modules.fusion_losses import genre_members
from mufasa_rec.modules.next_item import Exchange


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the training split says about a batch of items.

    Attributes:
        num_events: Training events of each item, `[N]` int64.
        vectors: Frozen collaborative vectors, `[N, Q]`, for `collaborative.kind='vectors'`; of an item with too few
            events they are never read.
        pairs: Items of this rank's batch that were chosen together, by their places in it, `[pairs, 2]` int64, for
            `collaborative.kind='pairs'`. The order within a pair says nothing.
    """

    num_events: Tensor
    vectors: Tensor | None = None
    pairs: Tensor | None = None


@dataclass(frozen=True)
class Reads:
    """What is to be gathered; the same on all ranks, since each gather is collective.

    Attributes:
        content: Modalities whose vectors are read.
        projected: Modalities whose projections are read.
        behaviour: Which of `Behaviour` is read.
        width: Width `Q` of the collaborative vectors.
    """

    content: tuple[str, ...]
    projected: tuple[str, ...]
    behaviour: Literal["vectors", "pairs"] | None
    width: int


@dataclass(frozen=True)
class GlobalBatch:
    """The items of all ranks, rank after rank, `N` in all; numbers in single precision at least.

    Attributes:
        z: Fused vectors, `[N, E]`, with gradient.
        projected: Projections by modality, each `[N, E]`, with gradient.
        content: Content vectors by modality, each `[N, P]`.
        present: Which items have the modality, `[N]` bool.
        members: Which items have each genre, `[N, G]` bool.
        num_events: Training events of each item, `[N]`.
        behaviour: Collaborative vectors `[N, Q]`, pairs by place in this batch `[pairs, 2]`, or nothing.
    """

    z: Tensor
    projected: dict[str, Tensor]
    content: dict[str, Tensor]
    present: dict[str, Tensor]
    members: Tensor
    num_events: Tensor
    behaviour: Tensor


def gather_batch(
    fused: Fused, items: ItemContent, behaviour: Behaviour | None, reads: Reads, exchange: Exchange
) -> GlobalBatch:
    """Bring together what the losses read; collective.

    Args:
        fused: This rank's fused items.
        items: What they were fused from.
        behaviour: What the training split says of them.
        reads: What is to be gathered.
        exchange: Reaches the other ranks.

    Returns:
        The items of all ranks.

    Raises:
        ValueError: When the behaviour that is read is missing or of another shape.
    """
    mine = _own_behaviour(fused.z, behaviour, reads)
    counts = exchange.counts([len(fused.z), len(items.genres), len(mine)])
    rows, genres, own = ([count[i] for count in counts] for i in range(3))
    gathered = exchange.gather(mine, own)
    if reads.behaviour == "pairs":
        gathered = gathered + _starts(rows, own).to(gathered.device)[:, None]
    num_events = torch.zeros_like(items.genre_lengths) if behaviour is None else behaviour.num_events
    lengths, num_events = exchange.gather(torch.stack([items.genre_lengths, num_events], dim=1), rows).unbind(1)
    names = list(fused.projected)
    bits = torch.stack([items.present[name] for name in names], dim=1).to(torch.uint8)  # not all backends send bool
    z = _exact(fused.z)
    return GlobalBatch(
        z=exchange.gather(z, rows),
        projected={name: exchange.gather(fused.projected[name].to(z.dtype), rows) for name in reads.projected},
        content={name: exchange.gather(items.content[name], rows).to(z.dtype) for name in reads.content},
        present=dict(zip(names, exchange.gather(bits, rows).bool().unbind(1), strict=True)),
        members=genre_members(exchange.gather(items.genres, genres), lengths),
        num_events=num_events,
        behaviour=gathered,
    )


def _own_behaviour(z: Tensor, behaviour: Behaviour | None, reads: Reads) -> Tensor:
    """This rank's vectors or pairs."""
    if reads.behaviour is None:
        return z.new_zeros(0)
    found = None if behaviour is None else getattr(behaviour, reads.behaviour)
    if found is None:
        raise ValueError(
            f"behaviour.{reads.behaviour}=None: collaborative.kind={reads.behaviour!r} reads it; give it each time."
        )
    expected = (len(found), 2) if reads.behaviour == "pairs" else (len(z), reads.width)
    if found.shape != expected:
        raise ValueError(f"behaviour.{reads.behaviour}: shape {tuple(found.shape)}, expected {expected}.")
    return found if reads.behaviour == "pairs" else found.detach().to(_exact(z).dtype)


def _starts(rows: Sequence[int], owned: Sequence[int]) -> Tensor:
    """First place in the global batch of the rank that each pair is from, `[sum of owned]`."""
    sizes = torch.tensor(rows)
    return torch.repeat_interleave(sizes.cumsum(0) - sizes, torch.tensor(owned))


def _exact(x: Tensor) -> Tensor:
    """In single precision at least: a threshold between cosines and the moments of a batch need it."""
    return x if x.dtype == torch.float64 else x.float()
