"""The click-through-rate ranker: requests with several candidates each, to one logit per candidate and task.

    batch.features -> SparseArch (sharded) -> Merge -> RankerArch (data-parallel): interests, over-arch, objective

A request's history is looked up, embedded and read once for all of its candidates. `RankerArch` has no sharded
descendant, so TorchRec's pipeline treats it as a leaf and it may use ordinary control flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.models.ranker_config import RankingFeatures
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.item_tower import mean_of_lists
from mufasa_rec.modules.over_arch import OverArch
from mufasa_rec.modules.ranking_objective import RankingObjective
from mufasa_rec.modules.similarity_interest import RestoringExtractor
from mufasa_rec.modules.sparse_arch import Merge, SparseArch
from mufasa_rec.ops.jagged import sequence_ids


class RankingInputs(Protocol):
    """What the ranker reads of a batch: `U` batch items, `B` requests, `L` events, `C` candidates, `T` tasks.

    Attributes:
        features: Ids to look up, one list per feature (stride 1): `item`, `item.<categorical>` and
            `content.<modality>` for the batch items, `event.<categorical>` for the events, the request's features (such
            as `user`) for the requests, `context.<name>` for the candidates.
        event_item: Batch item of each event, `[L]`.
        offsets: History of each request, `[B + 1]`.
        start_position: Position of each request's first event in its user's stream, `[B]`.
        timestamps_ms: Time of each event, `[L]`, or None.
        actions: Action of each event, `[L]`, or None.
        candidate_item: Batch item of each candidate, `[C]`.
        candidate_offsets: Candidates of each request, `[B + 1]`.
        request_time_ms: Time of each candidate's request, `[C]`, or None.
        content: Vectors of the batch items by modality, for those that travel with the batch, each `[U, P]`.
        present: Which batch items have each modality, `[U]` bool.
        category_lengths: Number of values of each multi-valued item categorical, `[U]`.
        dense: Numbers known about each candidate, `[C, F]`.
        labels: 0 or 1, or negative for no label, `[C, T]`.
        weight: Weight of each candidate in the loss, `[C]`.
        logit_offset: Added to the logits in training only, `[C]`: `-log(share of negatives that were kept)` makes the
            model's own logit that of unsampled data.
    """

    features: KeyedJaggedTensor
    event_item: Tensor
    offsets: Tensor
    start_position: Tensor
    timestamps_ms: Tensor | None
    actions: Tensor | None
    candidate_item: Tensor
    candidate_offsets: Tensor
    request_time_ms: Tensor | None
    content: dict[str, Tensor]
    present: dict[str, Tensor]
    category_lengths: dict[str, Tensor]
    dense: Tensor
    labels: Tensor
    weight: Tensor
    logit_offset: Tensor


@dataclass(frozen=True)
class RankerOutput:
    """What a forward gives beside the loss.

    Attributes:
        logits: Logits without the batch's offset, detached, `[C, T]`.
        loss_sum: Sum of this rank's weighted cross-entropies, detached; 0 in evaluation.
        divergence: This rank's mean divergence of restored histograms, detached; 0 without any.
        num_places: Places of the histories with the padding of the extractor that pads most.
        temperature: Always 0; the trainer reports one.
    """

    logits: Tensor
    loss_sum: Tensor
    divergence: Tensor
    num_places: int
    temperature: Tensor


class RankerArch(nn.Module):
    """The data-parallel part.

    Args:
        extractors: Read interests, by name.
        over_arch: Scores candidates.
        objective: Turns logits into a loss.
        features: What the data has.
        width: Width `E` of the embeddings.
    """

    def __init__(
        self,
        extractors: Mapping[str, InterestExtractor],
        over_arch: OverArch,
        objective: RankingObjective,
        features: RankingFeatures,
        width: int,
    ) -> None:
        super().__init__()
        self.extractors = nn.ModuleDict(extractors)
        self.over_arch, self.objective, self.features, self.width = over_arch, objective, features, width

    def forward(self, values: dict[str, Tensor], batch: RankingInputs) -> tuple[Tensor, RankerOutput]:
        """Run the data-parallel part of a step.

        Args:
            values: What was looked up for the batch and what it carries, by feature, as `Merge` gives it.
            batch: The batch.

        Returns:
            The loss (a zero in evaluation) and the output.
        """
        items = self._items(values, batch)
        history, candidates = self._history(items, values, batch), self._candidates(items, values, batch)
        interests, restored, places = self._interests(history, candidates)
        owner = sequence_ids(batch.candidate_offsets, len(batch.candidate_item))  # request of each candidate, [C]
        by_candidate = self._candidate(candidates, interests, values, batch)
        logits = self.over_arch(self._request(values, batch), by_candidate, owner)
        nothing = logits.new_zeros(())
        if not self.training:
            return nothing, RankerOutput(logits.detach(), nothing, nothing, places, nothing)
        asked = logits + batch.logit_offset[:, None]
        loss, total = self.objective(asked, batch.labels, batch.weight, restored)
        divergence = (restored[0] / restored[1].clamp(min=1)).detach()
        return loss, RankerOutput(logits.detach(), total, divergence, places, nothing)

    def _items(self, values: dict[str, Tensor], batch: RankingInputs) -> Tensor:
        """Ids and categoricals of the batch items summed, `[U, E]`."""
        embedded = values["item"].float()
        for name, multi_valued in self.features.item.items():
            found = values[f"item.{name}"].float()
            embedded = embedded + (mean_of_lists(found, batch.category_lengths[name]) if multi_valued else found)
        return embedded

    def _history(self, items: Tensor, values: dict[str, Tensor], batch: RankingInputs) -> History:
        embedded = items.index_select(0, batch.event_item)
        for name in self.features.event:
            embedded = embedded + values[f"event.{name}"].float()
        content, present = self._content(values, batch, batch.event_item)
        return History(
            embedded=embedded,
            offsets=batch.offsets,
            start_position=batch.start_position,
            timestamps_ms=batch.timestamps_ms,
            actions=batch.actions,
            content=content,
            present=present,
            max_length=self.features.max_history,
        )

    def _candidates(self, items: Tensor, values: dict[str, Tensor], batch: RankingInputs) -> Candidates:
        content, present = self._content(values, batch, batch.candidate_item)
        return Candidates(
            embedded=items.index_select(0, batch.candidate_item),
            offsets=batch.candidate_offsets,
            request_time_ms=batch.request_time_ms,
            content=content,
            present=present,
        )

    def _content(
        self, values: dict[str, Tensor], batch: RankingInputs, index: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Content of the rows that refer to batch items by `index`; a table is wider than its vectors."""
        if not self.extractors:
            return {}, {}
        widths = self.features.modalities
        content = {name: values[f"content.{name}"][:, :w].index_select(0, index).float() for name, w in widths.items()}
        return content, {name: batch.present[name].index_select(0, index) for name in widths}

    def _interests(self, history: History, candidates: Candidates) -> tuple[list[Tensor], tuple[Tensor, Tensor], int]:
        """Vectors of each extractor, each `[C, its width]`; what had to be restored; padded places."""
        vectors: list[Tensor] = []
        loss, histograms, places = history.embedded[:0].sum(), torch.zeros_like(history.offsets[0]), 0
        for extractor in self.extractors.values():
            assert isinstance(extractor, InterestExtractor)
            if self.training and isinstance(extractor, RestoringExtractor):
                found = extractor.restored(history, candidates)
                vectors.append(found.vectors)
                loss, histograms = loss + found.loss_sum, histograms + found.num_histograms
            else:
                vectors.append(extractor(history, candidates))
            places = max(places, extractor.num_places)
        return vectors, (loss, histograms), places

    def _request(self, values: dict[str, Tensor], batch: RankingInputs) -> Tensor:
        """What is the same for all candidates of a request, `[B, its width]`."""
        parts = [values[name].float() for name in self.features.request]
        return torch.cat(parts, dim=1) if parts else batch.dense.new_zeros(len(batch.start_position), 0)

    def _candidate(
        self, candidates: Candidates, interests: list[Tensor], values: dict[str, Tensor], batch: RankingInputs
    ) -> Tensor:
        context = [values[f"context.{name}"].float() for name in self.features.context]
        return torch.cat([candidates.embedded, *context, *interests, batch.dense.float()], dim=1)


class Ranker(nn.Module):
    """Sharded lookups, then everything else.

    Args:
        sparse: The lookups.
        dense: The data-parallel part.
    """

    def __init__(self, sparse: SparseArch, dense: RankerArch) -> None:
        super().__init__()
        self.sparse, self.merge, self.dense = sparse, Merge(sparse.packed), dense

    def forward(self, batch: RankingInputs) -> tuple[Tensor, RankerOutput]:
        """Return the loss and the output of a batch."""
        return self.dense(self.merge(self.sparse(batch.features), batch.content), batch)
