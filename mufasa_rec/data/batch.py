"""A finished batch: everything that a training or evaluation step reads, in tensors that need no further preparation.

The ids of a batch are looked up once per *distinct item*: events, targets and negatives refer to the batch's items by
index. On a catalog with popular items that saves most of the lookups, the exchange between ranks and the projection of
content vectors. `features` is complete here because a KeyedJaggedTensor that is built or changed above a sharded
module is silently not pipelined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable
from typing_extensions import Self

# Feature of item ids; item categorical c is `item.c`, modality m is `content.m`, event categorical c is `event.c`.
ITEM = "item"
# A table may have more features than one: `item#1` has the second key of each id (their vectors are summed),
# `item#drawn` ids that come after those of `item` and were not seen by anybody.
SUFFIX = "#"
DRAWN = f"{SUFFIX}drawn"


def salted(feature: str, salt: int) -> str:
    """The feature of an id's key by one salt."""
    return f"{feature}{SUFFIX}{salt}" if salt else feature


class Moving(Pipelineable):
    """A dataclass of tensors, dicts of tensors and plain values that moves to a device as a whole."""

    def _map(self, change: Callable[[Any], Any]) -> Self:
        values: dict[str, Any] = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if isinstance(value, dict):
                values[entry.name] = {key: change(tensor) for key, tensor in value.items()}
            elif isinstance(value, (Tensor, KeyedJaggedTensor)):
                values[entry.name] = change(value)
            else:
                values[entry.name] = value
        return type(self)(**values)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return a copy on `device`."""
        return self._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory, from which copies to a GPU run beside computation."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the batch."""

        def record(value: Any) -> Any:
            value.record_stream(stream)
            return value

        self._map(record)


@dataclass
class Batch(Moving):
    """One rank's share of a step. `U` batch items, `L` events, `B` rows, `C` candidates.

    Attributes:
        features: Ids to look up, one list per feature (stride 1): item features have `U` ids (multi-valued ones more),
            event features `L`.
        item_row: Row of each batch item in the item store, `[U]`.
        event_item: Batch item of each history event, `[L]`.
        next_item: Batch item of the event after each history event, `[L]`: what its state is asked to predict.
        target_weight: Weight of each of those questions, `[L]` float32; 0 where it is not asked.
        offsets: History of each row, `[B + 1]`.
        start_position: Position of each row's first event in its user's stream, `[B]`.
        candidate_item: Batch item of each candidate (negatives, or this rank's part of the catalog), `[C]`.
        candidate_bias: Added to a candidate's score: `-log Q`, `[C]` float32.
        timestamps_ms: Time of each event, `[L]`, or None.
        actions: Action of each event, `[L]`, or None.
        present: Which batch items have each modality, `[U]` bool.
        content: Vectors of the batch items by modality, for those that travel with the batch, each `[U, P]` float16.
        category_lengths: Number of values of each multi-valued item categorical, `[U]`.
        user: User of each row, `[B]` (raw id or hash).
        target_row: Item-store row of each row's last target, `[B]`.
        seen_row: Item-store rows of all earlier events of every row's user, when asked for; else empty.
        seen_offsets: Offsets of `seen_row`, `[B + 1]`.
        num_targets: Sum of the positive entries of `target_weight > 0`, known on the host.
        num_asked: Items that events, targets and candidates ask for; `U` of them are distinct and looked up.
        num_rows: Rows `B` that are real: a rank without rows gets one empty row.
        epoch: Epoch of the batch.
        step: Step inside the epoch.
    """

    features: KeyedJaggedTensor
    item_row: Tensor
    event_item: Tensor
    next_item: Tensor
    target_weight: Tensor
    offsets: Tensor
    start_position: Tensor
    candidate_item: Tensor
    candidate_bias: Tensor
    user: Tensor
    target_row: Tensor
    seen_row: Tensor
    seen_offsets: Tensor
    timestamps_ms: Tensor | None = None
    actions: Tensor | None = None
    present: dict[str, Tensor] = field(default_factory=dict)
    content: dict[str, Tensor] = field(default_factory=dict)
    category_lengths: dict[str, Tensor] = field(default_factory=dict)
    num_targets: int = 0
    num_asked: int = 0
    num_rows: int = 0
    epoch: int = 0
    step: int = 0

    @property
    def num_events(self) -> int:
        """Events `L` of this rank's histories."""
        return len(self.event_item)

    @property
    def num_items(self) -> int:
        """Items `U` that are looked up."""
        return len(self.item_row)

    @property
    def num_readings(self) -> int:
        """What histories are read for: rows, each its own."""
        return self.num_rows
