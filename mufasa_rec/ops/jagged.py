"""Jagged tensors: sequences of different length laid end to end, `values [L, ...]` with `offsets [B + 1]`.

Attention wants rectangles. `plan_groups` sorts the sequences by length and cuts them into groups, each padded only to
its own longest sequence, so that a batch of very different lengths does not pay for its longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.ops import host_reads


@dataclass(frozen=True)
class PaddedGroup:
    """Sequences that are padded together.

    Attributes:
        sequences: Which sequences, `[b]` int64.
        gather: Event read at each place, `[b, n]` int64. A place behind the end of its sequence reads the sequence's
            last event: with a causal mask no valid query sees it, and its own output is never read.
        valid: Whether a place holds an event, `[b, n]` bool.
    """

    sequences: Tensor
    gather: Tensor
    valid: Tensor


@dataclass(frozen=True)
class GroupPlan:
    """How the events of a jagged batch go into padded groups and back.

    Attributes:
        groups: The groups; none in a batch without events. On a CPU sequences without events are in none; elsewhere
            one group holds every sequence, in order.
        restore: Place of each event in the concatenation of the groups' flattened places, `[L]` int64.
        num_places: Padded places in all groups; `1 - L / num_places` is the padding share.
        num_sequences: Sequences in the batch, empty ones included.
    """

    groups: list[PaddedGroup]
    restore: Tensor
    num_places: int
    num_sequences: int

    def to(self, device: torch.device) -> GroupPlan:
        """The plan on a device; one that was made on the CPU has tight groups, which no other device could find."""
        groups = [PaddedGroup(g.sequences.to(device), g.gather.to(device), g.valid.to(device)) for g in self.groups]
        return GroupPlan(groups, self.restore.to(device), self.num_places, self.num_sequences)


def lengths_of(offsets: Tensor) -> Tensor:
    """Lengths `[B]` of the sequences that `offsets [B + 1]` delimits.

    Example:
        >>> lengths_of(torch.tensor([0, 2, 2, 5])).tolist()
        [2, 0, 3]
    """
    return offsets[1:] - offsets[:-1]


def sequence_ids(offsets: Tensor, num_events: int) -> Tensor:
    """Sequence that each of the `num_events` events belongs to, `[L]` int64.

    Example:
        >>> sequence_ids(torch.tensor([0, 2, 2, 5]), 5).tolist()
        [0, 0, 2, 2, 2]
    """
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(index, lengths_of(offsets), output_size=num_events)


def positions(offsets: Tensor, num_events: int) -> Tensor:
    """Position of each event inside its sequence, `[L]` int64, counted from 0.

    Example:
        >>> positions(torch.tensor([0, 2, 2, 5]), 5).tolist()
        [0, 1, 0, 1, 2]
    """
    starts = offsets[:-1].index_select(0, sequence_ids(offsets, num_events))
    return torch.arange(num_events, device=offsets.device) - starts


def last_index(offsets: Tensor) -> Tensor:
    """Index of each sequence's last event, `[B]` int64; an empty sequence gives index 0 at least (mask it)."""
    return (offsets[1:] - 1).clamp(min=0)


def plan_groups(offsets: Tensor, num_events: int, *, max_groups: int = 6, max_length: int | None = None) -> GroupPlan:
    """Group sequences of similar length for padded attention.

    The cuts minimise the padded places greedily: sequences are sorted by length and a new group begins where that saves
    most. On an accelerator reading the lengths would wait for the device, so there all sequences form one group, padded
    to `max_length`, and nothing about the values of `offsets` can be checked.

    Args:
        offsets: Offsets of the sequences, `[B + 1]` int64.
        num_events: Number of events `L`, which the caller knows from a shape.
        max_groups: Most groups to form on a CPU.
        max_length: Upper bound of the lengths; required off the CPU.

    Returns:
        The plan, on the device of `offsets`.

    Raises:
        ValueError: Off the CPU without `max_length`; on a CPU when `offsets` do not end at `num_events` or a sequence
            is longer than `max_length`.

    Example:
        >>> plan = plan_groups(torch.tensor([0, 1, 1, 6]), 6)
        >>> [group.gather.tolist() for group in plan.groups]
        [[[1, 2, 3, 4, 5]], [[0]]]
        >>> plan.restore.tolist(), plan.num_places
        ([5, 0, 1, 2, 3, 4], 6)
    """
    if max_groups < 1:
        raise ValueError(f"max_groups={max_groups}: choose 1 or more.")
    num_sequences = offsets.numel() - 1
    if not host_reads.free(offsets):
        if max_length is None:
            raise ValueError("max_length=None: an accelerator needs an upper bound of the lengths; pass max_length.")
        if not num_events:
            return _plan(offsets, 0, [], [])
        everyone = torch.arange(num_sequences, device=offsets.device)
        return _plan(offsets, num_events, [everyone], [max_length])
    lengths = lengths_of(offsets)
    if int(offsets[-1]) != num_events:
        raise ValueError(f"offsets: end at {int(offsets[-1])}, but there are {num_events} events; they must agree.")
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    longest = lengths[order]
    if max_length is not None and len(longest) and int(longest[0]) > max_length:
        raise ValueError(
            f"max_length={max_length}: the longest sequence has {int(longest[0])} events; keep the newest {max_length} "
            "of each, or raise the bound (an extractor's max_history)."
        )
    cuts = _cuts(longest, max_groups)
    members = [order[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return _plan(offsets, num_events, members, [int(longest[a]) for a in cuts[:-1]])


def _cuts(lengths: Tensor, max_groups: int) -> list[int]:
    """Cut points `0 = c0 < ... < ck = n` of descending `lengths`, splitting where it saves the most places."""
    if not len(lengths):
        return [0]
    cuts = [0, len(lengths)]
    while len(cuts) <= max_groups:
        best, where = 0, -1
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            saved = torch.arange(b - a, 0, -1) * (lengths[a] - lengths[a:b])
            middle = int(saved.argmax())
            if int(saved[middle]) > best:
                best, where = int(saved[middle]), a + middle
        if best * 20 <= int(lengths.sum()):  # a group costs a few kernel launches: at least 5 % must be saved
            break
        cuts = sorted([*cuts, where])
    return cuts


def _plan(offsets: Tensor, num_events: int, members: list[Tensor], widths: list[int]) -> GroupPlan:
    """Build the gather indices of groups `members` padded to `widths`."""
    lengths = lengths_of(offsets)
    groups = []
    places = 0
    flat_start = torch.zeros_like(lengths)
    for sequences, width in zip(members, widths, strict=True):
        step = torch.arange(width, device=offsets.device)
        length = lengths.index_select(0, sequences)[:, None]
        start = offsets.index_select(0, sequences)[:, None]
        gather = (start + torch.minimum(step[None], (length - 1).clamp(min=0))).clamp(max=max(num_events - 1, 0))
        flat_start[sequences] = places + torch.arange(len(sequences), device=offsets.device) * width
        groups.append(PaddedGroup(sequences, gather, step[None] < length))
        places += len(sequences) * width
    owner = sequence_ids(offsets, num_events)
    restore = flat_start.index_select(0, owner) + positions(offsets, num_events)
    return GroupPlan(groups, restore, places, lengths.numel())
