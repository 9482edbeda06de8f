"""The blocks of a batch, found once on the host and used by every layer.

All indices count events of the whole batch, so that nothing but `offsets` says where a sequence ends.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mufasa_rec.ops import host_reads
from mufasa_rec.ops.jagged import positions, sequence_ids
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.segments import fixed_borders

_counter = itertools.count()


@dataclass(frozen=True)
class Blocks:
    """Runs of events.

    Attributes:
        begin: First event of each block, `[K]` int64.
        end: Event after its last, `[K]` int64.
        readable: First event whose query may read the whole block, `[K]` int64; the number of events when none may.
        offsets: Blocks of each sequence, `[B + 1]` int64.
    """

    begin: Tensor
    end: Tensor
    readable: Tensor
    offsets: Tensor

    @cached_property
    def longest(self) -> int:
        """Events of the longest block."""
        return int((self.end - self.begin).max()) if len(self.begin) else 0


@dataclass(frozen=True)
class Tiles:
    """Runs of queries that share their scored blocks; they cross no block border.

    Attributes:
        begin: First query, `[N]` int64.
        end: Query after the last, `[N]` int64.
        block: The block that they lie in, `[N]` int64, an index into the selection blocks.
        place: That block's place in its sequence, `[N]` int64.
        sequence: Their sequence, `[N]` int64.
    """

    begin: Tensor
    end: Tensor
    block: Tensor
    place: Tensor
    sequence: Tensor


@dataclass(frozen=True)
class Layout:
    """Blocks and tiles of a batch, on the CPU whatever the device of the tensors.

    Attributes:
        pattern: What queries see; without a cap (`SparsePattern.resolve`).
        num_events: Events `L`.
        offsets: Offsets of the sequences, `[B + 1]` int64.
        start_position: Position of each sequence's first event in its user's stream, `[B]` int64.
        borders: Whether a selection block begins at each event, `[L]` bool.
        blocks: Selection blocks; the last of a sequence may be unfinished.
        tokens: Token blocks, complete ones only: the rows of `k_block` and `v_block`.
        packed: All of the above in one int64 tensor, which a registered operator can take; see `unpack`.
        plans: What a path has worked out for this batch, for the next layer.
    """

    pattern: SparsePattern
    num_events: int
    offsets: Tensor
    start_position: Tensor
    borders: Tensor
    blocks: Blocks
    tokens: Blocks
    packed: Tensor = field(repr=False)
    plans: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """Token blocks of the batch, `K`."""
        return len(self.tokens.begin)

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch, `B`."""
        return self.offsets.numel() - 1

    @cached_property
    def visible_tokens(self) -> Tensor:
        """How many tokens of its own sequence each event may read, `[L]` int64."""
        events = torch.arange(self.num_events)
        before = torch.searchsorted(self.tokens.readable, events, right=True)
        return before - self.tokens.offsets[sequence_ids(self.offsets, self.num_events)]

    @cached_property
    def tiles(self) -> Tiles:
        """Query tiles of the selected branch."""
        owner = sequence_ids(self.offsets, self.num_events)
        events = torch.arange(self.num_events)
        block = self.borders.cumsum(0) - 1
        if self.pattern.segmentation == "fixed":  # by position, so that a cut first block shifts no tile
            place = positions(self.offsets, self.num_events) + self.start_position[owner]
        else:
            place = events - self.blocks.begin[block]
        begin = torch.nonzero(self.borders | (place % self.pattern.tile == 0)).squeeze(1)
        end = torch.cat([begin[1:], begin.new_tensor([self.num_events])[: len(begin)]])
        block, sequence = block[begin], owner[begin]
        return Tiles(begin, end, block, block - self.blocks.offsets[sequence], sequence)


def plan_layout(
    offsets: Tensor, pattern: SparsePattern, *, start_position: Tensor | None = None, borders: Tensor | None = None
) -> Layout:
    """Find the blocks of a batch. Reads the values of its arguments: on an accelerator once per batch, not per layer.

    Args:
        offsets: Offsets of the sequences, `[B + 1]` int64.
        pattern: What queries see.
        start_position: Position of each sequence's first event in its user's stream, `[B]` int64; None for 0.
        borders: Where blocks begin, `[L]` bool, from `segments`; None for fixed lengths.

    Returns:
        The layout, for all layers and for `sparse_attention` and `candidate_sparse_attention`.

    Raises:
        ValueError: When offsets do not begin at 0 or decrease, a cap on blocks is not resolved, or borders are missing,
            superfluous, of another length, or leave a block longer than the pattern's.

    Example:
        >>> layout = plan_layout(torch.tensor([0, 5, 5, 9]), SparsePattern(block=2, window=4))
        >>> layout.tokens.begin.tolist(), layout.tokens.offsets.tolist()
        ([0, 2, 5, 7], [0, 2, 2, 4])
    """
    # The blocks of a batch decide shapes, so somebody must read them: here, once for all layers.
    with host_reads.argued("blocks are planned on the host from offsets and positions, once a batch for all layers"):
        offsets = offsets.detach().to("cpu", torch.int64)
        if start_position is not None:
            start_position = start_position.detach().to("cpu", torch.int64)
        if borders is not None:
            borders = borders.detach().to("cpu")
    num_events = _check_offsets(offsets)
    if pattern.max_blocks is not None:
        raise ValueError(
            f"max_blocks={pattern.max_blocks}: not applied yet; call pattern.resolve(max_history) once per run."
        )
    start = torch.zeros_like(offsets[1:]) if start_position is None else start_position
    if start.shape != offsets[1:].shape:
        raise ValueError(f"start_position: shape {tuple(start.shape)}, expected ({len(offsets) - 1},): one a sequence.")
    if (borders is None) != (pattern.segmentation == "fixed"):
        raise ValueError(
            f"borders: {'none' if borders is None else 'given'}, but segmentation={pattern.segmentation!r}; pass those "
            "of segments.timegap_borders or segments.coherence_borders, and none when blocks are fixed."
        )
    if borders is None:
        borders = fixed_borders(offsets, start, num_events, pattern.selection_block)
    borders = _check_borders(borders, offsets, num_events)
    return _layout(pattern, num_events, offsets, start, borders)


def _layout(pattern: SparsePattern, num_events: int, offsets: Tensor, start: Tensor, borders: Tensor) -> Layout:
    blocks = _selection_blocks(pattern, num_events, offsets, start, borders)
    if blocks.longest > pattern.selection_block:
        raise ValueError(
            f"borders: a block of {blocks.longest} events, but block={pattern.selection_block}; pass longest="
            f"{pattern.selection_block} to the segmentation."
        )
    tokens = _finished(blocks, num_events) if pattern.tokens_are_blocks else _sliding(pattern, offsets, start)
    packed = _pack(pattern, offsets, start, borders)
    return Layout(pattern, num_events, offsets, start, borders, blocks, tokens, packed)


def _selection_blocks(
    pattern: SparsePattern, num_events: int, offsets: Tensor, start: Tensor, borders: Tensor
) -> Blocks:
    """Cut sequences at borders.

    A block of full length is readable from its last event on. A shorter one ends because the *next* event turned out
    to begin another: it is readable from that event on, or its own last query would know what comes after it.
    """
    begin = torch.nonzero(borders).squeeze(1)
    of_block = sequence_ids(offsets, num_events)[begin]
    last_of_sequence = torch.ones_like(begin, dtype=torch.bool)
    last_of_sequence[:-1] = of_block[1:] != of_block[:-1]
    end = torch.where(last_of_sequence, offsets[of_block + 1], begin.roll(-1))
    if pattern.segmentation == "fixed":
        full = (end - offsets[of_block] + start[of_block]) % pattern.selection_block == 0
    else:
        full = end - begin == pattern.block
    readable = torch.where(full, end - 1, torch.where(last_of_sequence, num_events, end))
    return Blocks(begin, end, readable, _offsets_of(of_block, len(offsets) - 1))


def _finished(blocks: Blocks, num_events: int) -> Blocks:
    """Leave out blocks that no event may read."""
    keep = blocks.readable < num_events
    sequence = sequence_ids(blocks.offsets, len(keep))[keep]
    offsets = _offsets_of(sequence, len(blocks.offsets) - 1)
    return Blocks(blocks.begin[keep], blocks.end[keep], blocks.readable[keep], offsets)


def _sliding(pattern: SparsePattern, offsets: Tensor, start: Tensor) -> Blocks:
    """Token blocks that begin every `stride` events of a user's stream and lie wholly within the sequence."""
    stride, length = pattern.token_stride, pattern.block
    first = offsets[:-1] + (-start) % stride
    count = torch.div(offsets[1:] - first - length, stride, rounding_mode="floor").add(1).clamp(min=0)
    per_sequence = torch.cat([count.new_zeros(1), count.cumsum(0)])
    num_tokens = int(per_sequence[-1])
    sequence = sequence_ids(per_sequence, num_tokens)
    begin = first[sequence] + positions(per_sequence, num_tokens) * stride
    return Blocks(begin, begin + length, begin + length - 1, per_sequence)


def _offsets_of(sequence: Tensor, num_sequences: int) -> Tensor:
    """Offsets `[B + 1]` of rows that belong to `sequence`, which is sorted."""
    return torch.searchsorted(sequence, torch.arange(num_sequences + 1))


def _check_offsets(offsets: Tensor) -> int:
    if offsets.dim() != 1 or not len(offsets) or int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets={offsets.tolist()[:10]}: must begin at 0 and never fall; pass a batch's [B + 1].")
    return int(offsets[-1])


def _check_borders(borders: Tensor, offsets: Tensor, num_events: int) -> Tensor:
    if borders.dtype != torch.bool or borders.shape != (num_events,):
        raise ValueError(f"borders: {borders.dtype} of shape {tuple(borders.shape)}, expected bool ({num_events},).")
    borders = borders.clone()
    borders[offsets[:-1][offsets[:-1] < offsets[1:]]] = True
    return borders


_FIELDS = ("window", "block", "stride", "selected_block", "num_selected", "selection_stride", "min_block")
_SWITCHES = ("first_block", "own_block", "block_mixer", "window_branch", "selected_branch", "block_branch")
_SEGMENTATIONS = ("fixed", "timegap", "coherence")


def _pack(pattern: SparsePattern, offsets: Tensor, start: Tensor, borders: Tensor) -> Tensor:
    """Write a layout's definition, begun by a number of its own, into one tensor."""
    sizes = [getattr(pattern, name) for name in _FIELDS]
    numbers = [-1 if x is None else x for x in sizes] + [int(getattr(pattern, name)) for name in _SWITCHES]
    head = [next(_counter), *numbers, _SEGMENTATIONS.index(pattern.segmentation), len(start), len(borders)]
    events = torch.nonzero(borders).squeeze(1)
    return torch.cat([torch.tensor(head, dtype=torch.int64), offsets, start, events])


def unpack(packed: Tensor) -> Layout:
    """Rebuild a layout from `Layout.packed`.

    Example:
        >>> layout = plan_layout(torch.tensor([0, 5, 9]), SparsePattern(block=2, window=None))
        >>> again = unpack(layout.packed)
        >>> again.pattern == layout.pattern, torch.equal(again.tokens.begin, layout.tokens.begin)
        (True, True)
    """
    size = 1 + len(_FIELDS) + len(_SWITCHES)
    _, *numbers = packed[:size].tolist()
    segmentation, num_sequences, num_events = packed[size : size + 3].tolist()
    named: dict[str, Any] = {name: None if value < 0 else value for name, value in zip(_FIELDS, numbers)}
    switches = {name: bool(value) for name, value in zip(_SWITCHES, numbers[len(_FIELDS) :])}
    named |= {**switches, "segmentation": _SEGMENTATIONS[segmentation]}
    pattern = SparsePattern(**named)
    offsets, start, events = packed[size + 3 :].split(
        [num_sequences + 1, num_sequences, packed.numel() - size - 4 - 2 * num_sequences]
    )
    borders = torch.zeros(num_events, dtype=torch.bool)
    borders[events] = True
    return _layout(pattern, num_events, offsets, start, borders)
