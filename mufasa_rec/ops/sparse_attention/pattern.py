"""What a query of sparse attention sees: the window, the block tokens, the selected blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Segmentation = Literal["fixed", "timegap", "coherence"]
Ablation = Literal["window only", "window and first block", "no selected", "no block", "full causal"]


@dataclass(frozen=True, kw_only=True)
class SparsePattern:
    """Sizes and switches of the three branches; the same object serves training, serving and every path.

    A sequence is cut into *selection blocks*, which the selected branch reads event by event, and into *token blocks*,
    each of which the block branch reads as one key and one value. By default they are the same blocks. A query reads a
    block's token once the block is complete. Of the selection blocks it always reads the first one and its own (up to
    itself), and the best-scored of the others before its own.

    Attributes:
        window: Newest events that the window branch sees, the query included; None for the whole history.
        block: Events of a token block; with a segmentation other than `fixed`, the most events of one.
        stride: Events from the begin of a token block to that of the next; None for `block` (no overlap).
        selected_block: Events of a selection block; None for `block`.
        num_selected: Selection blocks that a query reads, the always selected ones included.
        first_block: Whether the sequence's first block is always selected.
        own_block: Whether the query's own block is always selected.
        selection_stride: A tile of this many queries shares the scored blocks that its first query chooses; 1 is
            exact Native Sparse Attention, None is the whole selection block.
        max_blocks: Most token blocks of the longest history; None for no cap. See `resolve`.
        block_mixer: Whether the extractor mixes block tokens causally before they are read.
        segmentation: Where blocks end: `fixed` lengths, at long pauses (`timegap`), or where consecutive content
            differs (`coherence`).
        min_block: Fewest events of a block with a segmentation other than `fixed`; None for a quarter of `block`.
        window_branch: Whether the window branch counts.
        selected_branch: Whether the selected branch counts.
        block_branch: Whether the block branch counts. Without it the tokens are still scored for the selection, but
            nothing trains the scores.

    Raises:
        ValueError: For sizes that do not fit together, with the remedy.

    Example:
        >>> SparsePattern(block=64, num_selected=8).num_scored
        6
        >>> SparsePattern(block=64, stride=48)
        Traceback (most recent call last):
        ...
        ValueError: stride=48: must divide block=64; choose a divisor of it.
    """

    window: int | None = 256
    block: int = 64
    stride: int | None = None
    selected_block: int | None = None
    num_selected: int = 8
    first_block: bool = True
    own_block: bool = True
    selection_stride: int | None = None
    max_blocks: int | None = None
    block_mixer: bool = True
    segmentation: Segmentation = "fixed"
    min_block: int | None = None
    window_branch: bool = True
    selected_branch: bool = True
    block_branch: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "block", "stride", "selected_block", "selection_stride", "max_blocks", "min_block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: choose 1 or more.")
        self._check_blocks()
        if self.num_selected < self.num_always:
            raise ValueError(
                f"num_selected={self.num_selected}: first_block={self.first_block} and own_block={self.own_block} "
                f"take {self.num_always}; choose {self.num_always} or more, or switch them off."
            )
        if not (self.window_branch or self.selected_branch or self.block_branch):
            raise ValueError("window_branch, selected_branch, block_branch: all off; leave one on.")

    def _check_blocks(self) -> None:
        """Check that strides divide blocks, and what a segmentation by content allows."""
        for name, part, whole_name, whole in (
            ("stride", self.token_stride, "block", self.block),
            ("stride", self.token_stride, "selected_block", self.selection_block),
            ("selection_stride", self.tile, "selected_block", self.selection_block),
        ):
            if whole % part:
                raise ValueError(f"{name}={part}: must divide {whole_name}={whole}; choose a divisor of it.")
        if self.segmentation not in get_args(Segmentation):
            raise ValueError(f"segmentation={self.segmentation!r}: choose one of {get_args(Segmentation)}.")
        if self.segmentation != "fixed" and not self.block == self.token_stride == self.selection_block:
            raise ValueError(
                f"segmentation={self.segmentation!r}: its blocks are the token blocks and the selection blocks; leave "
                "stride and selected_block at None."
            )
        if self.shortest_block > self.block:
            raise ValueError(f"min_block={self.min_block}: above block={self.block}; choose at most that.")

    @property
    def token_stride(self) -> int:
        """Events from one token block to the next."""
        return self.block if self.stride is None else self.stride

    @property
    def selection_block(self) -> int:
        """Events of a selection block, at most."""
        return self.block if self.selected_block is None else self.selected_block

    @property
    def tile(self) -> int:
        """Queries that share their scored blocks."""
        return self.selection_block if self.selection_stride is None else self.selection_stride

    @property
    def shortest_block(self) -> int:
        """Fewest events of a block with a segmentation by content."""
        return max(1, self.block // 4) if self.min_block is None else self.min_block

    @property
    def num_always(self) -> int:
        """Blocks that need no score."""
        return int(self.first_block) + int(self.own_block)

    @property
    def num_scored(self) -> int:
        """Blocks chosen by score."""
        return self.num_selected - self.num_always if self.selected_branch else 0

    @property
    def tokens_are_blocks(self) -> bool:
        """Whether token blocks and selection blocks are the same, so that a block's score is its token's weight."""
        return self.block == self.token_stride == self.selection_block

    def resolve(self, max_history: int) -> SparsePattern:
        """Apply the cap on blocks, once per run and never from a sequence.

        Blocks grow to the next power of two that keeps the longest history within `max_blocks` of them, and fewer are
        selected, so that as many events are read as before. Tiles stay as they are.

        Args:
            max_history: Most events of a history.

        Returns:
            The pattern without a cap.

        Example:
            >>> capped = SparsePattern(block=64, num_selected=8, max_blocks=256).resolve(max_history=65_536)
            >>> capped.block, capped.num_selected, capped.tile
            (256, 2, 64)
        """
        if max_history < 1:
            raise ValueError(f"max_history={max_history}: choose 1 or more.")
        if self.max_blocks is None:
            return self
        block = max(self.block, 1 << (math.ceil(max_history / self.max_blocks) - 1).bit_length())
        if block == self.block and self.tokens_are_blocks:
            return replace(self, max_blocks=None)
        return replace(
            self,
            block=block,
            stride=None,
            selected_block=None,
            num_selected=max(self.num_always, self.num_selected * self.selection_block // block),
            selection_stride=math.gcd(self.tile, block),
            min_block=self.min_block,
            max_blocks=None,
        )


def ablate(pattern: SparsePattern, name: Ablation) -> SparsePattern:
    """Switch parts of a pattern off for a comparison.

    Args:
        pattern: The whole pattern.
        name: What is left: `window only`; `window and first block` (the cheap rival that recommenders ship);
            `no selected`; `no block` (the selection then follows untrained scores); `full causal` attention.

    Returns:
        The pattern with its switches set.

    Raises:
        ValueError: For an unknown name.

    Example:
        >>> ablate(SparsePattern(), "full causal").window is None
        True
    """
    if name == "window only":
        return replace(pattern, selected_branch=False, block_branch=False)
    if name == "window and first block":
        return replace(pattern, block_branch=False, first_block=True, own_block=False, num_selected=1)
    if name == "no selected":
        return replace(pattern, selected_branch=False)
    if name == "no block":
        return replace(pattern, block_branch=False)
    if name == "full causal":
        return replace(pattern, window=None, selected_branch=False, block_branch=False)
    raise ValueError(f"ablation={name!r}: choose one of {get_args(Ablation)}.")
