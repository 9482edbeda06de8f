"""The sequence retriever: histories to user vectors, items to item vectors, in one space.

    batch.features -> SparseArch (sharded) -> Merge -> RetrieverArch (data-parallel): item tower, extractor, objective

`RetrieverArch` has no sharded descendant, so TorchRec's pipeline treats it as a leaf and it may use ordinary control
flow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.data.batch import Batch
from mufasa_rec.modules.history import History, InterestExtractor
from mufasa_rec.modules.item_fusion import ItemFusion
from mufasa_rec.modules.item_tower import Items, ItemTower
from mufasa_rec.modules.next_item import NextItemConfig, NextItemObjective, Questions
from mufasa_rec.modules.sparse_arch import Merge, SparseArch
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig

Attention = Literal["sparse", "full"]
FUSED = "fused"  # the one content "modality" that the retriever hands to its extractor: the item's fused content


@dataclass(frozen=True)
class RetrieverOutput:
    """What a forward gives beside the loss.

    Attributes:
        user_vectors: Unit vector of each row's user, `[B, E]`; empty in training.
        item_vectors: Unit vectors of the batch's items, `[U, E]`; empty in training.
        loss_sum: Sum of this rank's target losses, detached; 0 in evaluation.
        num_places: Places that the events took with their padding.
        temperature: The objective's learned temperature, a scalar, detached.
    """

    user_vectors: Tensor
    item_vectors: Tensor
    loss_sum: Tensor
    num_places: int
    temperature: Tensor


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig:
    """The retriever.

    Attributes:
        width: Width `E` of embeddings, states and vectors.
        use_id: Whether item ids are used; False is the pure-content variant.
        use_content: Whether content vectors are used.
        use_categoricals: Whether item and event categoricals are used.
        fusion_source: Run folder of `fuse`, whose layer the retriever then holds: it reads the modalities that the
            layer was trained with, and fuses them itself. Empty where content is read as the data set has it.
        finetune_fusion: Whether that layer is trained on with the retriever, at `optimizer.fusion_share` of its
            learning rate.
        id_dropout: Probability of dropping an item's id embedding from its vector in training.
        init_std: Standard deviation of the tables' initial weights; small, so that content leads until ids have
            learned.
        num_gap_buckets: Buckets of the time gap between events (base-2 seconds), 0 for none; only where the data has
            absolute times.
        attention: What the extractor reads the history with: ``sparse`` attention, or ``full`` causal attention, which
            takes the extractor's size and leaves its sparse fields unread.
        extractor: The interest extractor.
        objective: The next-item objective.
    """

    width: int = 64
    use_id: bool = True
    use_content: bool = True
    use_categoricals: bool = True
    fusion_source: str = ""
    finetune_fusion: bool = False
    id_dropout: float = 0.1
    init_std: float = 0.02
    num_gap_buckets: int = 24
    attention: Attention = "full"
    extractor: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    objective: NextItemConfig = field(default_factory=NextItemConfig)

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ValueError(f"model.width={self.width}: choose a positive multiple of 4, as FBGEMM's tables want.")
        if not 0.0 <= self.id_dropout < 1.0:
            raise ValueError(f"model.id_dropout={self.id_dropout}: choose at least 0 and below 1.")
        for name in ("init_std", "num_gap_buckets"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)}: choose 0 or more.")
        if self.finetune_fusion and not self.fusion_source:
            raise ValueError("model.finetune_fusion=True: give model.fusion_source, the run folder of `fuse`.")
        if self.fusion_source and not self.use_content:
            raise ValueError(
                f"model.fusion_source={self.fusion_source!r}: model.use_content=False reads no content; drop one."
            )
        if self.attention not in get_args(Attention):
            raise ValueError(f"model.attention={self.attention!r}: choose one of {get_args(Attention)}.")
        if self.attention == "sparse" and self.extractor.positions == "learned":
            raise ValueError(
                "model.extractor.positions='learned': sparse attention has no bias by distance; choose 'rotary' or "
                "'none', or model.attention: full."
            )


class RetrieverArch(nn.Module):
    """The data-parallel part.

    Args:
        tower: Embeds items.
        extractor: Reads histories.
        objective: Turns states and candidates into a loss.
        max_history: Longest history of a row.
        event_categoricals: Event categoricals, whose embeddings are added to the events.
        raw_content: Modalities whose vectors the extractor gets as they are stored, beside the fused content.
        fusion: Fuses the batch's modalities into the one that the tower reads then, `FUSED`; None where the tower
            reads them itself.
    """

    def __init__(
        self,
        tower: ItemTower,
        extractor: InterestExtractor,
        objective: NextItemObjective,
        *,
        max_history: int,
        event_categoricals: tuple[str, ...] = (),
        raw_content: tuple[str, ...] = (),
        fusion: ItemFusion | None = None,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.tower, self.extractor, self.objective = tower, extractor, objective
        self.max_history, self.event_categoricals, self.raw_content = max_history, event_categoricals, raw_content

    def forward(self, values: dict[str, Tensor], batch: Batch) -> tuple[Tensor, RetrieverOutput]:
        """Run the data-parallel part of a step.

        Args:
            values: What was looked up for the batch and what it carries, by feature, as `Merge` gives it.
            batch: The batch.

        Returns:
            The loss (a zero in evaluation) and the output.
        """
        present = self._content(values, batch)
        items = self.tower(values["item"].float(), values, present, batch.category_lengths)
        history = self._history(items, values, batch)
        temperature = self.objective.temperature.detach()
        if not self.training:
            users = F.normalize(self.extractor(history).float(), dim=-1)
            nothing = users.new_zeros(())
            return nothing, RetrieverOutput(
                users, items.vectors.float(), nothing, self.extractor.num_places, temperature
            )
        states = self.extractor.encode(history)
        loss, total = self.objective(_questions(states, items, batch))
        empty = states.new_zeros(0, states.shape[1])
        return loss, RetrieverOutput(empty, empty, total, self.extractor.num_places, temperature)

    def _content(self, values: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Bring looked-up content into the form that the tower reads, in place; returns who has which modality."""
        reads = self.fusion or self.tower.content
        for name, width in ({} if reads is None else reads.widths).items():
            values[f"content.{name}"] = values[f"content.{name}"][:, :width].float()
        if self.fusion is None:
            return batch.present
        genre = self.fusion.genre
        codes = None if genre is None else batch.features[f"item.{genre}"].values()
        counts = None if genre is None else batch.category_lengths.get(genre)
        values[f"content.{FUSED}"], has = self.fusion(values, batch.present, codes, counts)
        return {**batch.present, FUSED: has}

    def _history(self, items: Items, values: dict[str, Tensor], batch: Batch) -> History:
        embedded = items.embedded.index_select(0, batch.event_item)
        for name in self.event_categoricals:
            embedded = embedded + values[f"event.{name}"]
        content = {}
        present = {}
        if self.tower.content is not None:
            content[FUSED] = items.content.index_select(0, batch.event_item)
            present[FUSED] = items.has_content.index_select(0, batch.event_item)
        for name in self.raw_content:
            content[name] = values[f"content.{name}"].index_select(0, batch.event_item)
            present[name] = batch.present[name].index_select(0, batch.event_item)
        return History(
            embedded=embedded,
            offsets=batch.offsets,
            start_position=batch.start_position,
            timestamps_ms=batch.timestamps_ms,
            actions=batch.actions,
            content=content,
            present=present,
            max_length=self.max_history,
        )


def _questions(states: Tensor, items: Items, batch: Batch) -> Questions:
    """The events that have a target, and the candidates."""
    asked = torch.nonzero_static(batch.target_weight > 0, size=batch.num_targets).squeeze(1)
    target = batch.next_item.index_select(0, asked)
    return Questions(
        states=states.index_select(0, asked),
        positive=items.vectors.index_select(0, target),
        target_row=batch.item_row.index_select(0, target),
        weight=batch.target_weight.index_select(0, asked),
        candidates=items.vectors.index_select(0, batch.candidate_item),
        candidate_row=batch.item_row.index_select(0, batch.candidate_item),
        candidate_bias=batch.candidate_bias,
    )


class Retriever(nn.Module):
    """Sharded lookups, then everything else.

    Args:
        sparse: The lookups.
        dense: The data-parallel part.
    """

    def __init__(self, sparse: SparseArch, dense: RetrieverArch) -> None:
        super().__init__()
        self.sparse, self.merge, self.dense = sparse, Merge(sparse.packed), dense

    def forward(self, batch: Batch) -> tuple[Tensor, RetrieverOutput]:
        """Return the loss and the output of a batch."""
        return self.dense(self.merge(self.sparse(batch.features), batch.content), batch)
