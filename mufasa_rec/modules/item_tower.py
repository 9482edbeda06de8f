"""From looked-up ids, categoricals and content vectors to an item's embedding (for histories) and vector (for retrieval)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.mlp import GatedBlock


@dataclass(frozen=True)
class Items:
    """Items of a batch, embedded.

    Attributes:
        embedded: Ids and categoricals summed, `[U, E]`: what a history event starts from.
        content: Content of each item, all modalities fused, `[U, E]`; zero without any.
        has_content: Which items have at least one modality, `[U]` bool.
        vectors: Unit vectors for retrieval, `[U, E]`.
    """

    embedded: Tensor
    content: Tensor
    has_content: Tensor
    vectors: Tensor


class ContentProjection(nn.Module):
    """Projects each modality and averages those that an item has; a missing one has no influence, whatever its numbers.

    Args:
        modalities: Width of each modality's vectors.
        width: Model width `E`.
    """

    def __init__(self, modalities: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.widths = dict(modalities)
        self.projections = nn.ModuleDict({name: nn.Linear(p, width) for name, p in modalities.items()})
        self.norm = nn.LayerNorm(width)

    def forward(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Fuse `{modality: [U, P]}` with `{modality: [U] bool}` into `[U, E]`, and tell which items have any."""
        total: Tensor | None = None
        count: Tensor | None = None
        for name, projection in self.projections.items():
            has = present[name][:, None]
            part = projection(torch.where(has, content[name], 0.0)) * has
            total = part if total is None else total + part
            count = has.float() if count is None else count + has
        assert total is not None and count is not None
        fused = self.norm(total / count.clamp(min=1.0))
        return fused * (count > 0), count.squeeze(1) > 0


class ItemTower(nn.Module):
    """Item vector = normalise(MLP(z) + e_id), `z` the fused content (MUFASA's retrieval head, our design).

    In training an item's id embedding is dropped with a small probability, so that the content alone must find it: that is
    what carries an item nobody has chosen yet.

    Args:
        modalities: Width of each content modality; empty for ids alone.
        categoricals: Item categoricals, and whether they are multi-valued.
        width: Model width `E`.
        use_id: Whether item ids are used; False is the pure-content variant.
        id_dropout: Probability of dropping an item's id embedding in training.
    """

    def __init__(
        self,
        modalities: Mapping[str, int],
        categoricals: Mapping[str, bool],
        width: int,
        *,
        use_id: bool = True,
        id_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not use_id and not modalities:
            raise ValueError("model.use_id=False needs content vectors: set model.use_content=True or give modalities.")
        self.categoricals = dict(categoricals)
        self.use_id, self.id_dropout = use_id, id_dropout
        self.content = ContentProjection(modalities, width) if modalities else None
        self.head = GatedBlock(width, 2 * width) if modalities else None

    def forward(
        self, ids: Tensor, looked_up: Mapping[str, Tensor], present: Mapping[str, Tensor], counts: Mapping[str, Tensor]
    ) -> Items:
        """Embed the items of a batch.

        Args:
            ids: Looked-up id embeddings, `[U, E]`.
            looked_up: Values of the categoricals (`item.<name>`, `[sum of counts, E]`) and modalities (`content.<name>`).
            present: Which items have each modality, `[U]` bool.
            counts: Values of each multi-valued categorical, `[U]`.

        Returns:
            The items.
        """
        embedded = ids if self.use_id else 0.0 * ids
        alone = torch.zeros_like(ids)
        for name, multi_valued in self.categoricals.items():
            values = looked_up[f"item.{name}"]
            alone = alone + (_mean_of_lists(values, counts[name]) if multi_valued else values)
        if self.content is None or self.head is None:
            empty = torch.zeros_like(ids)
            vectors = F.normalize(embedded + alone, dim=-1)
            return Items(embedded + alone, empty, torch.zeros(len(ids), dtype=torch.bool, device=ids.device), vectors)
        content = {name: looked_up[f"content.{name}"] for name in self.content.projections}
        z, has = self.content(content, present)
        keep = self._keep(embedded, has)
        vectors = F.normalize(self.head(z) + embedded * keep + alone, dim=-1)
        return Items(embedded + alone, z, has, vectors)

    def _keep(self, embedded: Tensor, has_content: Tensor) -> Tensor:
        """Which items keep their id in the item vector, `[U, 1]`: those without content always do."""
        if not self.training or self.id_dropout == 0.0:
            return torch.ones(len(embedded), 1, device=embedded.device)
        drop = torch.rand(len(embedded), 1, device=embedded.device) < self.id_dropout
        return (~(drop & has_content[:, None])).to(embedded.dtype)


def _mean_of_lists(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of each item's values, `[sum of counts, E]` to `[U, E]`; zero for an item without values."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(values))
    total = values.new_zeros(len(counts), values.shape[1]).index_add(0, owner, values)
    return total / counts.clamp(min=1).to(values.dtype)[:, None]
