"""The exact, quadratic interest extractor: a pre-norm causal transformer over the history.

The truth that sparse attention is measured against, and a good choice for histories of a few hundred events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mufasa_rec.modules.event_embedding import EventEmbedding
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.mlp import GatedBlock
from mufasa_rec.ops.attention import candidate_attention, causal_attention, rotary
from mufasa_rec.ops.jagged import GroupPlan, last_index, plan_groups, positions, sequence_ids


@dataclass(frozen=True, kw_only=True)
class FullAttentionConfig:
    """Size of the extractor.

    Attributes:
        num_layers: Layers.
        num_heads: Attention heads; must divide the width into even parts.
        ffn_ratio: Hidden width of the gated feed-forward block over the model width.
        dropout: Probability of dropping a channel of a block's output.
        positions: ``rotary`` (by position in the user's stream), ``learned`` (a bias per head by distance into the past),
            or ``none``.
    """

    num_layers: int = 2
    num_heads: int = 2
    ffn_ratio: float = 2.0
    dropout: float = 0.1
    positions: Literal["rotary", "learned", "none"] = "rotary"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: choose at least 0 and below 1.")


class FullAttentionExtractor(InterestExtractor):
    """Causal transformer with the interface of `InterestExtractor`.

    Args:
        config: Size of the extractor.
        embedding: What an event is made of; its width is the model's.
        max_history: Longest history, events.

    Raises:
        ValueError: When the heads do not divide the width into even parts.
    """

    def __init__(self, config: FullAttentionConfig, embedding: EventEmbedding, max_history: int) -> None:
        super().__init__()
        width = embedding.config.width
        if width % config.num_heads or width // config.num_heads % 2:
            raise ValueError(f"num_heads={config.num_heads}: must divide the model width {width} into even parts.")
        self.max_history = max_history
        self.output_dim = width
        self.embedding = embedding
        self.layers = nn.ModuleList(_Layer(config, width, max_history) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.empty = nn.Parameter(torch.randn(width) * width**-0.5)

    def encode(self, history: History) -> Tensor:
        """Return one causal state per event, `[L, E]`."""
        states, _ = self._run(history, None)
        return states + 0.0 * self.empty

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per user `[B, E]`, or per candidate `[C, E]`; see `InterestExtractor.forward`."""
        states, scored = self._run(history, candidates)
        if scored is not None:
            return scored + 0.0 * self.empty
        missing = (history.offsets[1:] == history.offsets[:-1])[:, None]
        if not len(states):
            return self.empty.expand(len(missing), -1) + 0.0 * states.sum()
        return torch.where(missing, self.empty, states[last_index(history.offsets)])

    def _run(self, history: History, candidates: Candidates | None) -> tuple[Tensor, Tensor | None]:
        """Run events, and candidates beside them if any, through all layers."""
        x = self.embedding(history)
        plan = plan_groups(history.offsets, len(x), max_length=history.max_length or self.max_history)
        self.num_places = plan.num_places
        owner = sequence_ids(history.offsets, len(x))
        place = positions(history.offsets, len(x)) + history.start_position[owner]
        if candidates is None:
            for layer in self.layers:
                x, _ = layer(x, place, plan)
            return self.norm(x), None
        c = self.embedding.embed_candidates(history, candidates)
        whose = sequence_ids(candidates.offsets, len(c))
        end = (history.start_position + history.offsets[1:] - history.offsets[:-1])[whose]
        for layer in self.layers:
            x_next, key_value = layer(x, place, plan)
            c = layer.read(c, end, whose, key_value, plan)
            x = x_next
        return self.norm(x), self.norm(c)


class _Layer(nn.Module):
    """Pre-norm attention and gated feed-forward block, each with a residual."""

    def __init__(self, config: FullAttentionConfig, width: int, max_history: int) -> None:
        super().__init__()
        self.heads, self.positions = config.num_heads, config.positions
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = GatedBlock(width, int(width * config.ffn_ratio), config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        learned = config.positions == "learned"
        self.bias = nn.Parameter(torch.zeros(config.num_heads, max_history + 1)) if learned else None

    def forward(self, x: Tensor, place: Tensor, plan: GroupPlan) -> tuple[Tensor, Tensor]:
        """Events `[L, E]` at stream positions `place [L]`; returns the next states and this layer's keys and values."""
        qkv = self._project(x, place)  # [L, 3, H, D]
        attended = causal_attention(qkv, plan, bias=self.bias)
        return self._finish(x, attended), qkv[:, 1:]

    def read(self, c: Tensor, place: Tensor, owner: Tensor, key_value: Tensor, plan: GroupPlan) -> Tensor:
        """Candidates `[C, E]`, each reading its owner's events and itself."""
        q, k, v = self._project(c, place).unbind(1)
        return self._finish(c, candidate_attention(q, k, v, key_value, owner, plan, self.bias))

    def _project(self, x: Tensor, place: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).view(len(x), 3, self.heads, x.shape[1] // self.heads)
        if self.positions != "rotary":
            return qkv
        q, k, v = qkv.unbind(1)
        return torch.stack([rotary(q, place), rotary(k, place), v], dim=1)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended.reshape(len(x), x.shape[1])))
        return x + self.ffn(self.ffn_norm(x))
