"""The input of an extractor: one vector per event from its ids, content, action and time gap.

`x_s = LN(W_z z_item + e_id + sum e_categorical + e_action + e_gap)`, the event embedding of MUFASA's alignment layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mufasa_rec.modules.history import Candidates, History
from mufasa_rec.ops.jagged import last_index, sequence_ids

_UNKNOWN_ACTION = 0


@dataclass(frozen=True, kw_only=True)
class EventEmbeddingConfig:
    """What an event is made of.

    Attributes:
        width: Model width `E`.
        content: Width of each modality's vectors.
        num_actions: Action codes, `unknown` (0) included; 0 when the data has no actions.
        num_gap_buckets: Buckets of the time gap to the event before, on a base-2 scale of seconds; 0 for no time gaps.
        dropout: Probability of dropping a channel of the result.
    """

    width: int
    content: Mapping[str, int] = field(default_factory=dict)
    num_actions: int = 0
    num_gap_buckets: int = 0
    dropout: float = 0.0


class EventEmbedding(nn.Module):
    """Sums what is known about an event and normalises it.

    Args:
        config: What an event is made of.
    """

    def __init__(self, config: EventEmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.content = nn.ModuleDict({name: nn.Linear(p, config.width) for name, p in config.content.items()})
        self.action = nn.Embedding(config.num_actions, config.width) if config.num_actions else None
        self.gap = nn.Embedding(config.num_gap_buckets, config.width) if config.num_gap_buckets else None
        for table in (self.action, self.gap):
            if table is not None:
                nn.init.normal_(table.weight, std=config.width**-0.5)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, history: History) -> Tensor:
        """Return the events' vectors, `[L, E]`.

        Raises:
            ValueError: When a modality, the actions or the times that the model was built with are missing.
        """
        x = history.embedded + self._content(history.content, history.present)
        if self.action is not None:
            x = x + self.action(_required(history.actions, "History.actions", "num_actions"))
        if self.gap is not None:
            times = _required(history.timestamps_ms, "History.timestamps_ms", "num_gap_buckets")
            x = x + self.gap(self._gap_bucket(_gaps(times, history.offsets)))
        return self.dropout(self.norm(x))

    def embed_candidates(self, history: History, candidates: Candidates) -> Tensor:
        """Return the candidates' vectors, `[C, E]`: action `unknown`, gap from the newest event to the request."""
        x = candidates.embedded + self._content(candidates.content, candidates.present)
        if self.action is not None:
            x = x + self.action.weight[_UNKNOWN_ACTION]
        if self.gap is not None:
            request = _required(candidates.request_time_ms, "Candidates.request_time_ms", "num_gap_buckets")
            times = _required(history.timestamps_ms, "History.timestamps_ms", "num_gap_buckets")
            owner = sequence_ids(candidates.offsets, len(candidates.embedded))
            newest = last_index(history.offsets)[owner]
            empty = (history.offsets[1:] == history.offsets[:-1])[owner]
            last = times[newest] if len(times) else request
            x = x + self.gap(self._gap_bucket(torch.where(empty, 0, request - last)))
        return self.dropout(self.norm(x))

    def _content(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor | float:
        """Sum of the projected modalities; a missing one adds nothing, whatever numbers stand in its place."""
        total: Tensor | float = 0.0
        for name, projection in self.content.items():
            if name not in content:
                raise ValueError(
                    f"content[{name!r}]: missing; the model was built with modalities {list(self.content)}."
                )
            vectors = content[name]
            if name in present:
                vectors = torch.where(present[name][:, None], vectors, torch.zeros((), dtype=vectors.dtype))
                total = total + projection(vectors) * present[name][:, None]
            else:
                total = total + projection(vectors)
        return total

    def _gap_bucket(self, gap_ms: Tensor) -> Tensor:
        seconds = gap_ms.clamp(min=0).to(torch.float32) / 1000.0
        return torch.log2(1.0 + seconds).to(torch.int64).clamp(max=self.config.num_gap_buckets - 1)


def _gaps(times: Tensor, offsets: Tensor) -> Tensor:
    """Milliseconds since the event before, `[L]`; a sequence's first event has gap 0."""
    if not len(times):
        return times
    gap = torch.diff(times, prepend=times[:1])
    starts = offsets[:-1][offsets[1:] > offsets[:-1]]
    return gap.index_fill(0, starts, 0)


def _required(tensor: Tensor | None, field_name: str, because: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{field_name}=None: required because the extractor was built with {because} > 0.")
    return tensor
