"""The interface of interest extractors: what a user's own DLRM hands in, and what it gets back.

Every extractor (full attention here, sparse attention and similarity interests later) reads a `History`, optionally
`Candidates`, and returns plain tensors. It holds no sharded module and no rank, so it runs data-parallel as an ordinary child
of any model.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class History:
    """Events of a batch of users, oldest first, laid end to end.

    Attributes:
        embedded: Looked-up embedding of each event's item (ids and categoricals summed), `[L, E]`.
        offsets: Where each user's events begin and end, `[B + 1]` int64; a user may have none.
        start_position: Position of each user's first event here in that user's whole stream, `[B]` int64.
        timestamps_ms: Time of each event, `[L]` int64 milliseconds; None where the data has no times.
        actions: Action code of each event, `[L]` int64, 0 = unknown; None where the data has no actions.
        content: Content vectors of the events by modality, each `[L, P]`.
        present: Which events have the modality, `[L]` bool; the only way to say "missing".
        max_length: Upper bound of the events of one user; lets an accelerator work without reading the offsets.
    """

    embedded: Tensor
    offsets: Tensor
    start_position: Tensor
    timestamps_ms: Tensor | None = None
    actions: Tensor | None = None
    content: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Items to be scored for the users of a `History`, several per user.

    Attributes:
        embedded: Looked-up embedding of each candidate, `[C, E]`.
        offsets: Candidates of each user, `[B + 1]` int64; 0 to k per user.
        request_time_ms: Time of the request of each candidate, `[C]` int64 milliseconds; None without times.
        content: Content vectors by modality, each `[C, P]`.
        present: Which candidates have the modality, `[C]` bool.
    """

    embedded: Tensor
    offsets: Tensor
    request_time_ms: Tensor | None = None
    content: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)


class InterestExtractor(nn.Module, abc.ABC):
    """Reads histories into interest vectors.

    Attributes:
        output_dim: Width of the vectors that it returns.
        num_places: Places that the last batch took with its padding; `1 - L / num_places` is the padding share.
    """

    output_dim: int
    num_places: int = 0

    @abc.abstractmethod
    def encode(self, history: History) -> Tensor:
        """Return one causal state per event, `[L, output_dim]`: a later event changes no earlier state."""

    @abc.abstractmethod
    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per candidate, `[C, output_dim]`, or without candidates one per user, `[B, output_dim]`.

        A user's vector is that user's last state; a user without history gets a learned vector. A candidate sees its
        user's history and itself, and no other candidate.
        """
