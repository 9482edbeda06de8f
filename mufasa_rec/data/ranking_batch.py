"""A finished batch of requests: histories, the candidates that were shown, and what came of them.

As in `mufasa_rec.data.batch`, ids are looked up once per distinct item: events and candidates refer to the batch's
items by index, and `features` is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.data.batch import Moving

USER = "user"


@dataclass
class RankingBatch(Moving):
    """One rank's share of a step. `U` batch items, `L` events, `B` rows, `C` candidates, `T` tasks, `F` numbers.

    A row is a request with its candidates, or with `data.requests.per_request: false` one candidate.

    Attributes:
        features: Ids to look up, one list per feature (stride 1): item features have `U` ids (multi-valued ones more),
            event features `L`, `user` has `B`, context features `C`.
        item_row: Row of each batch item in the item store, `[U]`.
        event_item: Batch item of each history event, `[L]`.
        offsets: History of each row, `[B + 1]`: the newest events strictly before the request.
        start_position: Position of each row's first event in its user's stream, `[B]`.
        candidate_item: Batch item of each candidate, `[C]`.
        candidate_offsets: Candidates of each row, `[B + 1]`; a row may have none.
        dense: Numbers of each candidate, `[C, F]` float32: standardised, 0 where one is missing.
        labels: What came of each candidate, `[C, T]` float32, 0 or 1.
        weight: Weight of each candidate in the loss, `[C]` float32.
        logit_offset: Added to a candidate's logits in training, `[C]` float32: makes up for dropped negatives.
        user: User of each row, `[B]` (raw id or hash).
        request: The source's number of each row's request, `[B]`.
        impression: The source's row of each candidate, `[C]`: the same for every model.
        item_count: Training impressions (and events) of each candidate's item, `[C]`.
        history_length: Events before each request, not only those kept, `[B]`.
        request_time_ms: Time of each candidate's request, `[C]`.
        timestamps_ms: Time of each event, `[L]`, or None.
        actions: Action of each event, `[L]`, or None.
        present: Which batch items have each modality, `[U]` bool.
        content: Vectors of the batch items by modality, for those that travel with the batch, each `[U, P]` float16.
        category_lengths: Number of values of each multi-valued item categorical, `[U]`.
        num_targets: Candidates `C`, known on the host.
        num_asked: Items that events, targets and candidates ask for; `U` of them are distinct and looked up.
        num_rows: Rows `B` that are real: a rank without rows gets one empty row.
        epoch: Epoch of the batch.
        step: Step inside the epoch.
    """

    features: KeyedJaggedTensor
    item_row: Tensor
    event_item: Tensor
    offsets: Tensor
    start_position: Tensor
    candidate_item: Tensor
    candidate_offsets: Tensor
    dense: Tensor
    labels: Tensor
    weight: Tensor
    logit_offset: Tensor
    user: Tensor
    request: Tensor
    impression: Tensor
    item_count: Tensor
    history_length: Tensor
    request_time_ms: Tensor
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
        """What histories are read for: candidates, those of a row reading one."""
        return self.num_targets
