"""One layer of the sparse interest extractor: three branches of attention over the past, gated, then a gated block."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from mufasa_rec.modules.block_tokens import BlockTokens, Turn
from mufasa_rec.modules.full_attention import FullAttentionConfig
from mufasa_rec.modules.mlp import GatedBlock
from mufasa_rec.modules.segmentation import BorderConfig
from mufasa_rec.ops.attention import rotate
from mufasa_rec.ops.jagged import GroupPlan
from mufasa_rec.ops.sparse_attention.api import Backend, candidate_sparse_attention, sparse_attention
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.projected import Projected


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(FullAttentionConfig):
    """Size of a transformer, and what its attention reads; full attention takes the size alone.

    Attributes:
        kv_groups: Key/value heads, which must divide the heads; None for one per head. The heads of a group share
            their choice of blocks.
        shared_kv: Whether the branches share keys and values, which saves weights, memory and time.
        pattern: What a query sees. The default suits histories of a few hundred events.
        borders: Thresholds of a segmentation by pauses or content.
        recompute: Whether a layer's activations are computed again in the backward instead of kept.
    """

    kv_groups: int | None = None
    shared_kv: bool = False
    pattern: SparsePattern = field(default_factory=lambda: SparsePattern(window=32, block=8, num_selected=4))
    borders: BorderConfig = field(default_factory=BorderConfig)
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_groups is not None and (self.kv_groups < 1 or self.num_heads % self.kv_groups):
            raise ValueError(f"kv_groups={self.kv_groups}: must divide num_heads={self.num_heads}; or None.")

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.num_heads if self.kv_groups is None else self.kv_groups


@dataclass(frozen=True)
class SharedByLayers:
    """What all layers share: blocks, angles of the events, and for the mixer groups and angles of the tokens."""

    layout: Layout
    turn: Turn | None
    token_plan: GroupPlan | None = None
    token_turn: Turn | None = None


@dataclass(frozen=True)
class Read:
    """A layer's projections of the events, and the tokens of their blocks."""

    x: Projected
    k_block: Tensor
    v_block: Tensor


class SparseLayer(nn.Module):
    """Pre-norm sparse attention and gated feed-forward block, each with a residual."""

    def __init__(
        self, config: SparseAttentionConfig, width: int, pattern: SparsePattern, backend: Backend | None
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.head_width = config.num_heads, config.groups, width // config.num_heads
        self.pairs = 2 if pattern.window_branch and pattern.selected_branch and not config.shared_kv else 1
        self.backend = backend
        self.attention_norm = nn.LayerNorm(width)
        self.tokens: BlockTokens | None = None
        if reads_tokens(pattern):
            self.tokens = BlockTokens(self.groups, self.head_width, pattern.block, mixer=pattern.block_mixer)
        own = int(self.tokens is not None and not config.shared_kv)  # a pair of their own for the tokens
        self.num_rows = self.heads + 2 * (self.pairs + own) * self.groups
        self.qkv = nn.Linear(width, self.num_rows * self.head_width)
        self.gate = nn.Linear(width, 3 * self.heads)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = GatedBlock(width, max(1, int(width * config.ffn_ratio)), config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, batch: SharedByLayers) -> Tensor:
        """Transform events `[L, E]`."""
        return self.attend(x, self.project(x, batch), batch)

    def project(self, x: Tensor, batch: SharedByLayers) -> Read:
        """Project events `[L, E]` and make the tokens of their blocks."""
        projected, k, v = self._project(x, batch.turn)
        if self.tokens is None:
            nothing = k.new_zeros(batch.layout.num_tokens, self.groups, self.head_width)
            return Read(projected, nothing, nothing)
        return Read(projected, *self.tokens(k, v, batch.layout, batch.token_plan, batch.token_turn))

    def attend(self, x: Tensor, read: Read, batch: SharedByLayers) -> Tensor:
        """Finish the layer for events `[L, E]`."""
        attended = sparse_attention(read.x, read.k_block, read.v_block, batch.layout, backend=self.backend)
        return self._finish(x, attended)

    def read(self, c: Tensor, turn: Turn | None, read: Read, owner: Tensor, batch: SharedByLayers) -> Tensor:
        """Transform candidates `[C, E]`, each reading its owner's history and itself."""
        own = self._project(c, turn)[0]
        attended = candidate_sparse_attention(
            own, read.x, read.k_block, read.v_block, owner, batch.layout, backend=self.backend
        )
        return self._finish(c, attended)

    def _project(self, x: Tensor, turn: Turn | None) -> tuple[Projected, Tensor, Tensor]:
        """Projections of rows `[n, E]`, and the keys and values `[n, G, D]` that tokens are made of.

        A row of `qkv` holds queries, keys of the window (and selected) branch, their values, keys and values of tokens.
        """
        x = self.attention_norm(x)
        rows = self.qkv(x).view(len(x), self.num_rows, self.head_width)
        heads, keys = self.heads, self.pairs * self.groups
        turned = rows[:, : heads + keys] if turn is None else rotate(rows[:, : heads + keys], turn)
        k = turned[:, heads:].split(self.groups, dim=1)
        v = rows[:, heads + keys : heads + 2 * keys].split(self.groups, dim=1)
        projected = Projected(
            q=turned[:, :heads],
            q_block=rows[:, :heads],
            k_window=k[0],
            v_window=v[0],
            k_selected=k[-1],
            v_selected=v[-1],
            gates=self.gate(x).sigmoid().view(len(x), heads, 3),
        )
        if self.num_rows > heads + 2 * keys:
            k_tokens, v_tokens = rows[:, heads + 2 * keys :].split(self.groups, dim=1)
            return projected, k_tokens, v_tokens
        return projected, rows[:, heads : heads + self.groups], v[0]

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended.reshape(len(x), x.shape[1])))
        return x + self.ffn(self.ffn_norm(x))


def reads_tokens(pattern: SparsePattern) -> bool:
    """Whether anything is made of block tokens: values that are read, or scores that blocks are chosen by."""
    return pattern.block_branch or pattern.num_scored > 0
