"""Jagged tensors: sequences of different length laid end to end, `values [L, ...]` with `offsets [B + 1]`.

Attention wants rectangles. `plan_groups` sorts the sequences by length and cuts them into groups, each padded only to its own
longest sequence, so that a batch of very different lengths does not pay for its longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedGroup:
    """Sequences that are padded together.

    Attributes:
        sequences: Which sequences, `[b]` int64.
        gather: Event read at each place, `[b, n]` int64. A place behind the end of its sequence reads the sequence's last
            event: with a causal mask no valid query sees it, and its own output is never read.
        valid: Whether a place holds an event, `[b, n]` bool.
    """

    sequences: Tensor
    gather: Tensor
    valid: Tensor


@dataclass(frozen=True)
class GroupPlan:
    """How the events of a jagged batch go into padded groups and back.

    Attributes:
        groups: The groups; sequences without events are in none.
        restore: Place of each event in the concatenation of the groups' flattened places, `[L]` int64.
        num_places: Padded places in all groups; `1 - L / num_places` is the padding share.
        num_sequences: Sequences in the batch, empty ones included.
    """

    groups: list[PaddedGroup]
    restore: Tensor
    num_places: int
    num_sequences: int


def lengths_of(offsets: Tensor) -> Tensor:
    """Lengths `[B]` of the sequences that `offsets [B + 1]` delimits."""
    return offsets[1:] - offsets[:-1]


def sequence_ids(offsets: Tensor, num_events: int) -> Tensor:
    """Sequence that each of the `num_events` events belongs to, `[L]` int64."""
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(index, lengths_of(offsets), output_size=num_events)


def positions(offsets: Tensor, num_events: int) -> Tensor:
    """Position of each event inside its sequence, `[L]` int64, counted from 0."""
    starts = offsets[:-1].index_select(0, sequence_ids(offsets, num_events))
    return torch.arange(num_events, device=offsets.device) - starts


def last_index(offsets: Tensor) -> Tensor:
    """Index of each sequence's last event, `[B]` int64; an empty sequence gives index 0 at least (mask it)."""
    return (offsets[1:] - 1).clamp(min=0)


def plan_groups(offsets: Tensor, num_events: int, *, max_groups: int = 6, max_length: int | None = None) -> GroupPlan:
    """Group sequences of similar length for padded attention.

    The cuts minimise the padded places greedily: sequences are sorted by length and a new group begins where that saves
    most. On an accelerator reading the lengths would wait for the device, so there all sequences form one group, padded to
    `max_length`.

    Args:
        offsets: Offsets of the sequences, `[B + 1]` int64.
        num_events: Number of events `L`, which the caller knows from a shape.
        max_groups: Most groups to form on a CPU.
        max_length: Upper bound of the lengths; required off the CPU.

    Returns:
        The plan, on the device of `offsets`.

    Raises:
        ValueError: Off the CPU without `max_length`.
    """
    num_sequences = offsets.numel() - 1
    if offsets.device.type != "cpu":
        if max_length is None:
            raise ValueError("max_length=None: an accelerator needs an upper bound of the lengths; pass max_length.")
        everyone = torch.arange(num_sequences, device=offsets.device)
        return _plan(offsets, num_events, [everyone], [max_length])
    lengths = lengths_of(offsets)
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    longest = lengths[order]
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
