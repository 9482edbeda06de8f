"""Blocks of events as tokens: what sparse attention reads of the far past, and how interests evolve over blocks.

A token is a learned convex combination of its block's keys (before rotary positions) and values, to which each place
inside a block adds a learned vector: phi of MUFASA's block branch, whose form is ours. The mixer then lets each token
see the tokens before it, so that a query reads not only what a block was about but what became of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mufasa_rec.ops.attention import causal_attention, rotate
from mufasa_rec.ops.jagged import GroupPlan
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.pooling import pool_blocks

Turn = tuple[Tensor, Tensor]  # cosines and sines of rotary positions, each [rows, D / 2]


class BlockTokens(nn.Module):
    """Pools keys and values of blocks, and mixes them causally.

    Args:
        groups: Key/value heads `G`.
        head_width: Width of a head `D`.
        block: Most events of a block.
        mixer: Whether tokens see the tokens before them.

    Example:
        >>> from mufasa_rec.ops.sparse_attention.layout import plan_layout
        >>> from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
        >>> layout = plan_layout(torch.tensor([0, 5, 9]), SparsePattern(block=2, window=4))
        >>> tokens = BlockTokens(groups=1, head_width=4, block=2, mixer=False)
        >>> k_block, v_block = tokens(torch.randn(9, 1, 4), torch.randn(9, 1, 4), layout)
        >>> k_block.shape  # two complete blocks in each sequence
        torch.Size([4, 1, 4])
    """

    def __init__(self, groups: int, head_width: int, block: int, *, mixer: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, block, groups))  # of keys and of values; zeros: the mean
        self.places = nn.Parameter(torch.randn(2, block, groups, head_width) * 0.02)
        self.mixer = BlockMixer(groups, head_width) if mixer else None

    def forward(
        self, k: Tensor, v: Tensor, layout: Layout, plan: GroupPlan | None = None, turn: Turn | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make the tokens of a batch.

        Args:
            k: Keys of the events before rotary positions, `[L, G, D]`.
            v: Values of the events, `[L, G, D]`.
            layout: The batch's blocks.
            plan: Padded groups of `layout.tokens`; read with the mixer only.
            turn: Rotary angles of the tokens' first events, `[K, D / 2]` each; None for no positions.

        Returns:
            Keys and values of the tokens, each `[K, G, D]`.
        """
        k_block = pool_blocks(k, layout, logits=self.logits[0], positions=self.places[0])
        v_block = pool_blocks(v, layout, logits=self.logits[1], positions=self.places[1])
        if self.mixer is None:
            return k_block, v_block
        assert plan is not None, "the mixer reads the tokens' padded groups"
        return self.mixer(k_block, v_block, plan, turn)


class BlockMixer(nn.Module):
    """The evolution of interest blocks: one pre-norm causal attention over the tokens of each sequence.

    A token depends on its own and earlier blocks alone, so whoever may read it may read what was mixed into it. Memory
    is linear in the tokens; time is quadratic in the tokens of a sequence, which are a block's length fewer than its
    events (and at most `max_blocks`, where the pattern has a cap).

    Args:
        groups: Key/value heads `G`, the heads of this attention too.
        head_width: Width of a head `D`.
    """

    def __init__(self, groups: int, head_width: int) -> None:
        super().__init__()
        self.groups, self.head_width = groups, head_width
        width = groups * head_width
        self.norm = nn.LayerNorm(2 * width)
        self.qkv = nn.Linear(2 * width, 3 * width)
        self.out = nn.Linear(width, 2 * width)

    def forward(self, k_block: Tensor, v_block: Tensor, plan: GroupPlan, turn: Turn | None) -> tuple[Tensor, Tensor]:
        """Mix tokens `[K, G, D]`; see `BlockTokens.forward`."""
        tokens, shape = len(k_block), k_block.shape
        both = torch.cat([k_block.flatten(1), v_block.flatten(1)], dim=1)  # [K, 2 G D]
        qkv = self.qkv(self.norm(both)).view(tokens, 3, self.groups, self.head_width)
        if turn is not None:
            qkv = torch.cat([rotate(qkv[:, :2], turn), qkv[:, 2:]], dim=1)
        added = self.out(causal_attention(qkv, plan).reshape(tokens, self.groups * self.head_width))
        k_added, v_added = added.to(k_block.dtype).chunk(2, dim=1)
        return k_block + k_added.view(shape), v_block + v_added.view(shape)
