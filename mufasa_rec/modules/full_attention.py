"""The exact, quadratic interest extractor: a pre-norm causal transformer over the history.

The truth that sparse attention is measured against, and a good choice for histories of a few hundred events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mufasa_rec.modules.event_embedding import EventEmbedding
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.mlp import GatedBlock
from mufasa_rec.ops.attention import candidate_attention, causal_attention, rotate, rotation
from mufasa_rec.ops.jagged import GroupPlan, last_index, lengths_of, plan_groups, positions, sequence_ids

Positions = Literal["rotary", "learned", "none"]
Turn = tuple[Tensor, Tensor]  # cosines and sines of rotary positions, each [rows, D / 2]


@dataclass(frozen=True, kw_only=True)
class FullAttentionConfig:
    """Size of the extractor.

    Attributes:
        num_layers: Layers.
        num_heads: Attention heads; must divide the width into even parts.
        ffn_ratio: Hidden width of the gated feed-forward block over the model width.
        dropout: Probability of dropping a channel of a block's output.
        positions: ``rotary`` (by position in the user's stream), ``learned`` (a bias per head by distance into the
            past), or ``none``.
    """

    num_layers: int = 2
    num_heads: int = 2
    ffn_ratio: float = 2.0
    dropout: float = 0.1
    positions: Positions = "rotary"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: choose at least 0 and below 1.")
        if self.ffn_ratio <= 0:
            raise ValueError(f"ffn_ratio={self.ffn_ratio}: choose above 0.")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions={self.positions!r}: choose one of {get_args(Positions)}.")


class FullAttentionExtractor(InterestExtractor):
    """Causal transformer with the interface of `InterestExtractor`.

    Args:
        config: Size of the extractor.
        embedding: What an event is made of; its width is the model's.
        max_history: Longest history, events.

    Raises:
        ValueError: When the heads do not divide the width into even parts, or `max_history` is not positive.

    Example:
        >>> from mufasa_rec.modules.event_embedding import EventEmbeddingConfig
        >>> embedding = EventEmbedding(EventEmbeddingConfig(width=8))
        >>> extractor = FullAttentionExtractor(FullAttentionConfig(), embedding, max_history=10)
        >>> users = torch.tensor([0, 2, 2, 5])  # the second has no history
        >>> history = History(embedded=torch.randn(5, 8), offsets=users, start_position=torch.zeros(3).long())
        >>> items = Candidates(embedded=torch.randn(4, 8), offsets=torch.tensor([0, 1, 3, 4]))
        >>> extractor.encode(history).shape, extractor(history).shape, extractor(history, items).shape
        (torch.Size([5, 8]), torch.Size([3, 8]), torch.Size([4, 8]))
    """

    def __init__(self, config: FullAttentionConfig, embedding: EventEmbedding, max_history: int) -> None:
        super().__init__()
        width = embedding.config.width
        if width % config.num_heads or width // config.num_heads % 2:
            raise ValueError(f"num_heads={config.num_heads}: must divide the model width {width} into even parts.")
        if max_history < 1:
            raise ValueError(f"max_history={max_history}: choose 1 or more.")
        self.max_history = max_history
        self.output_dim = width
        self.embedding = embedding
        self.head_width = width // config.num_heads if config.positions == "rotary" else 0
        self.layers = nn.ModuleList(_Layer(config, width, max_history) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.empty = nn.Parameter(torch.randn(width) * width**-0.5)

    def encode(self, history: History) -> Tensor:
        """Return one causal state per event, `[L, E]`; see `InterestExtractor.encode`.

        Raises:
            ValueError: When a history is longer than `max_history`, or lacks what the extractor was built with.
        """
        x, plan, turn = self._start(history)
        for layer in self._layers():
            x = layer(x, turn, plan)
        return self.norm(x) + self.empty[:0].sum()  # keeps the parameter in the graph

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per user `[B, E]`, or per candidate `[C, E]`; see `InterestExtractor.forward`.

        Raises:
            ValueError: As `encode`, and when the candidates do not fit the histories.
        """
        if candidates is not None:
            return self._score(history, candidates)
        states = self.encode(history)
        if not len(states):
            return self.empty.expand(history.offsets.numel() - 1, -1) + states.sum()
        missing = (lengths_of(history.offsets) == 0)[:, None]
        return torch.where(missing, self.empty, states[last_index(history.offsets)])

    def _score(self, history: History, candidates: Candidates) -> Tensor:
        """Run the candidates beside the events; the last layer's events are only read as keys and values."""
        x, plan, turn = self._start(history)
        c = self.embedding.embed_candidates(history, candidates)
        owner = sequence_ids(candidates.offsets, len(c))
        after = self._turn((history.start_position + lengths_of(history.offsets))[owner])
        for index, layer in enumerate(self._layers()):
            qkv = layer.project(x, turn)
            c = layer.read(c, after, qkv[:, 1:], owner, plan)
            if index + 1 < len(self.layers):
                x = layer.attend(x, qkv, plan)
        return self.norm(c) + self.empty[:0].sum()

    def _start(self, history: History) -> tuple[Tensor, GroupPlan, Turn | None]:
        """Embed the events, plan their padding, and turn their positions into angles."""
        longest = self.max_history if history.max_length is None else history.max_length
        if longest > self.max_history:
            raise ValueError(
                f"History.max_length={longest}: the extractor was built with max_history={self.max_history}; keep the "
                "newest events only, or build it for longer histories."
            )
        x = self.embedding(history)
        plan = plan_groups(history.offsets, len(x), max_length=longest)
        self.num_places = plan.num_places
        owner = sequence_ids(history.offsets, len(x))
        return x, plan, self._turn(positions(history.offsets, len(x)) + history.start_position[owner])

    def _turn(self, place: Tensor) -> Turn | None:
        return rotation(place, self.head_width) if self.head_width else None

    def _layers(self) -> Iterator[_Layer]:
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            yield layer


class _Layer(nn.Module):
    """Pre-norm attention and gated feed-forward block, each with a residual."""

    def __init__(self, config: FullAttentionConfig, width: int, max_history: int) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = GatedBlock(width, max(1, int(width * config.ffn_ratio)), config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        learned = config.positions == "learned"
        self.bias = nn.Parameter(torch.zeros(config.num_heads, max_history + 1)) if learned else None

    def forward(self, x: Tensor, turn: Turn | None, plan: GroupPlan) -> Tensor:
        """Transform events `[L, E]`."""
        return self.attend(x, self.project(x, turn), plan)

    def project(self, x: Tensor, turn: Turn | None) -> Tensor:
        """Queries, keys and values of rows `[n, E]`, `[n, 3, H, D]`; queries and keys turned by their positions."""
        qkv = self.qkv(self.attention_norm(x)).view(len(x), 3, self.heads, x.shape[1] // self.heads)
        return qkv if turn is None else torch.cat([rotate(qkv[:, :2], turn), qkv[:, 2:]], dim=1)

    def attend(self, x: Tensor, qkv: Tensor, plan: GroupPlan) -> Tensor:
        """Finish the layer for events `[L, E]` with projections `[L, 3, H, D]`."""
        return self._finish(x, causal_attention(qkv, plan, bias=self.bias))

    def read(self, c: Tensor, turn: Turn | None, history_kv: Tensor, owner: Tensor, plan: GroupPlan) -> Tensor:
        """Transform candidates `[C, E]`, each reading its owner's keys and values `[L, 2, H, D]` and itself."""
        qkv = self.project(c, turn)
        return self._finish(c, candidate_attention(qkv, history_kv, owner, plan, bias=self.bias))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended.reshape(len(x), x.shape[1])))
        return x + self.ffn(self.ffn_norm(x))
