"""The interface of interest extractors: what a user's own DLRM hands in, and what it gets back.

Every extractor (full attention here, sparse attention and similarity interests later) reads a `History`, optionally
`Candidates`, and returns plain tensors. It holds no sharded module and no rank, so it runs data-parallel as an ordinary
child of any model.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mufasa_rec.ops import host_reads


@dataclass(frozen=True, kw_only=True)
class History:
    """Events of a batch of users, oldest first, laid end to end.

    Shapes and dtypes are checked when it is made; what stands in `offsets` only on a CPU, where reading it is free.

    Attributes:
        embedded: Looked-up embedding of each event's item (ids and categoricals summed), `[L, E]`.
        offsets: Where each user's events begin and end, `[B + 1]` int64; a user may have none.
        start_position: Position of each user's first event here in that user's whole stream, `[B]` int64.
        timestamps_ms: Time of each event, `[L]` int64 milliseconds; None where the data has no times.
        actions: Action code of each event, `[L]` int64, 0 = unknown; None where the data has no actions.
        content: Content vectors of the events by modality, each `[L, P]`.
        present: Which events have the modality, `[L]` bool; the only way to say "missing".
        max_length: Upper bound of the events of one user; lets an accelerator work without reading the offsets.

    Raises:
        ValueError: For a field whose shape, dtype or offsets do not fit the others.

    Example:
        >>> events, users = torch.zeros(3, 8), torch.tensor([0, 2, 2, 3])
        >>> History(embedded=events, offsets=users, start_position=torch.zeros(2, dtype=torch.int64))
        Traceback (most recent call last):
        ...
        ValueError: History.start_position: shape (2,), expected (3,): one for each user.
    """

    embedded: Tensor
    offsets: Tensor
    start_position: Tensor
    timestamps_ms: Tensor | None = None
    actions: Tensor | None = None
    content: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    max_length: int | None = None

    def __post_init__(self) -> None:
        _check_rows("History", self.embedded, self.offsets, self.content, self.present)
        _check_column("History.start_position", self.start_position, self.offsets.numel() - 1, "user")
        for name in ("timestamps_ms", "actions"):
            _check_column(f"History.{name}", getattr(self, name), len(self.embedded), "event")


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Items to be scored for the users of a `History`, several per user.

    Attributes:
        embedded: Looked-up embedding of each candidate, `[C, E]`.
        offsets: Candidates of each user, `[B + 1]` int64; 0 to k per user.
        request_time_ms: Time of the request of each candidate, `[C]` int64 milliseconds; None without times.
        content: Content vectors by modality, each `[C, P]`.
        present: Which candidates have the modality, `[C]` bool.

    Raises:
        ValueError: For a field whose shape, dtype or offsets do not fit the others.
    """

    embedded: Tensor
    offsets: Tensor
    request_time_ms: Tensor | None = None
    content: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rows("Candidates", self.embedded, self.offsets, self.content, self.present)
        _check_column("Candidates.request_time_ms", self.request_time_ms, len(self.embedded), "candidate")


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


def _check_rows(
    owner: str, embedded: Tensor, offsets: Tensor, content: Mapping[str, Tensor], present: Mapping[str, Tensor]
) -> None:
    """Check what a History and Candidates have in common."""
    if embedded.dim() != 2:
        raise ValueError(f"{owner}.embedded: shape {tuple(embedded.shape)}, expected two dimensions, rows and width.")
    rows = len(embedded)
    _check_offsets(f"{owner}.offsets", offsets, rows)
    for name, vectors in content.items():
        if vectors.dim() != 2 or len(vectors) != rows:
            raise ValueError(
                f"{owner}.content[{name!r}]: shape {tuple(vectors.shape)}, expected ({rows}, width): one for each row."
            )
        if name not in present:
            raise ValueError(
                f"{owner}.present[{name!r}]: missing; it alone says which rows have the modality. Pass ones for all."
            )
    for name, has in present.items():
        if has.dtype != torch.bool or has.shape != (rows,):
            raise ValueError(
                f"{owner}.present[{name!r}]: {has.dtype} of shape {tuple(has.shape)}, expected bool of shape ({rows},)."
            )


def _check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    if offsets.dim() != 1 or not offsets.numel() or offsets.dtype != torch.int64:
        raise ValueError(
            f"{name}: {offsets.dtype} of shape {tuple(offsets.shape)}, expected int64 of shape (users + 1,); "
            "a KeyedJaggedTensor's offsets may need .long()."
        )
    if not host_reads.free(offsets) or torch.compiler.is_compiling():
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"{name}: from {int(offsets[0])} to {int(offsets[-1])} for {rows} rows; they must begin at 0, "
            "never fall, and end at the number of rows."
        )


def _check_column(name: str, column: Tensor | None, rows: int, of: str) -> None:
    if column is None:
        return
    if column.shape != (rows,):
        raise ValueError(f"{name}: shape {tuple(column.shape)}, expected ({rows},): one for each {of}.")
    if column.is_floating_point() or column.dtype == torch.bool:
        raise ValueError(f"{name}: {column.dtype}, expected int64.")
