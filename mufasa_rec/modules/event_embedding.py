"""The input of an extractor: one vector per event from its ids, content, action and time gap.

`x_s = LN(W_z z_item + e_id + sum e_categorical + e_action + e_gap)`, the event embedding of MUFASA's alignment layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mufasa_rec.modules.history import Candidates, History
from mufasa_rec.modules.modalities import ModalityProjections
from mufasa_rec.ops import host_reads
from mufasa_rec.ops.jagged import last_index, positions, sequence_ids

_UNKNOWN_ACTION = 0


@dataclass(frozen=True, kw_only=True)
class EventEmbeddingConfig:
    """What an event is made of.

    Attributes:
        width: Model width `E`.
        content: Width of each modality's vectors.
        num_actions: Action codes, `unknown` (0) included; 0 when the data has no actions.
        num_gap_buckets: Buckets of the time gap to the event before, on a base-2 scale of seconds; 0 for no time gaps.
            Bucket 0 is a gap below a second, and the first event that is seen of a user.
        dropout: Probability of dropping a channel of the result.
    """

    width: int
    content: Mapping[str, int] = field(default_factory=dict)
    num_actions: int = 0
    num_gap_buckets: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("num_actions", 0), ("num_gap_buckets", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: choose at least 0 and below 1.")


class EventEmbedding(nn.Module):
    """Sums what is known about an event and normalises it.

    Args:
        config: What an event is made of.

    Example:
        >>> embedding = EventEmbedding(EventEmbeddingConfig(width=8, num_actions=3))
        >>> history = History(
        ...     embedded=torch.randn(3, 8),
        ...     offsets=torch.tensor([0, 2, 3]),
        ...     start_position=torch.zeros(2, dtype=torch.int64),
        ...     actions=torch.tensor([1, 0, 2]),
        ... )
        >>> embedding(history).shape
        torch.Size([3, 8])
    """

    def __init__(self, config: EventEmbeddingConfig) -> None:
        super().__init__()
        self.config = config
        self.content = ModalityProjections(config.content, config.width) if config.content else None
        self.action = nn.Embedding(config.num_actions, config.width) if config.num_actions else None
        self.gap = nn.Embedding(config.num_gap_buckets, config.width) if config.num_gap_buckets else None
        for table in (self.action, self.gap):
            if table is not None:
                nn.init.normal_(table.weight, std=config.width**-0.5)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, history: History) -> Tensor:
        """Embed the events.

        Args:
            history: The events.

        Returns:
            Their vectors, `[L, E]`.

        Raises:
            ValueError: When the width differs, a modality, the actions or the times that the model was built with are
                missing, or (on a CPU) an action code is unknown to it.
        """
        x = self._sum("History", history)
        if self.action is not None:
            x = x + self.action(self._known(_required(history.actions, "History.actions", "num_actions")))
        if self.gap is not None:
            times = _required(history.timestamps_ms, "History.timestamps_ms", "num_gap_buckets")
            x = x + self.gap(self._gap_bucket(_gaps(times, history.offsets)))
        return self.dropout(self.norm(x))

    def embed_candidates(self, history: History, candidates: Candidates) -> Tensor:
        """Embed the candidates: action `unknown`, time gap from the user's newest event to the request.

        Args:
            history: The users' events.
            candidates: The candidates of the same users.

        Returns:
            Their vectors, `[C, E]`.

        Raises:
            ValueError: When the users are not as many, or something that the model was built with is missing.
        """
        if candidates.offsets.shape != history.offsets.shape:
            raise ValueError(
                f"Candidates.offsets: {candidates.offsets.numel() - 1} users, but History has "
                f"{history.offsets.numel() - 1}; give every user an entry, empty where there are no candidates."
            )
        x = self._sum("Candidates", candidates)
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

    def _sum(self, owner: str, rows: History | Candidates) -> Tensor:
        """Ids and categoricals plus the projected modalities; a missing one adds nothing."""
        if rows.embedded.shape[1] != self.config.width:
            raise ValueError(
                f"{owner}.embedded: width {rows.embedded.shape[1]}, but the extractor was built for "
                f"{self.config.width}; look the ids up in tables of that width."
            )
        x = rows.embedded.to(self.norm.weight.dtype)
        return x if self.content is None else x + self.content(rows.content, rows.present)[0]

    def _known(self, actions: Tensor) -> Tensor:
        """Refuse unknown codes where looking costs nothing."""
        if host_reads.free(actions) and len(actions) and not torch.compiler.is_compiling():
            low, high = (int(x) for x in actions.aminmax())
            if low < 0 or high >= self.config.num_actions:
                raise ValueError(
                    f"History.actions: codes from {low} to {high}, but the extractor was built with num_actions="
                    f"{self.config.num_actions}; code an unknown action as 0."
                )
        return actions

    def _gap_bucket(self, gap_ms: Tensor) -> Tensor:
        return time_bucket(gap_ms, self.config.num_gap_buckets)


def time_bucket(gap_ms: Tensor, num_buckets: int) -> Tensor:
    """Bucket `floor(log2(1 + seconds))` of each gap, the last one open; a clock that went back counts as no gap.

    Example:
        >>> time_bucket(torch.tensor([-5, 999, 1000, 3000, 9_000_000]), 4).tolist()
        [0, 0, 1, 2, 3]
    """
    seconds = gap_ms.clamp(min=0).to(torch.float64) / 1000.0
    bucket = torch.frexp(1.0 + seconds).exponent - 1  # exact at powers of two, where a log2 may round down
    return bucket.to(torch.int64).clamp(max=num_buckets - 1)


def _gaps(times: Tensor, offsets: Tensor) -> Tensor:
    """Milliseconds since the event before, `[L]`; a sequence's first event has gap 0."""
    if not len(times):
        return times
    gap = torch.diff(times, prepend=times[:1])
    return gap.masked_fill(positions(offsets, len(times)) == 0, 0)


def _required(tensor: Tensor | None, field_name: str, because: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{field_name}=None: required because the extractor was built with {because} > 0.")
    return tensor
