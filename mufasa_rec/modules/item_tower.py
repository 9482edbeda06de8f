"""From looked-up ids, categoricals and content to an item's embedding (histories) and its vector (retrieval)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.mlp import GatedBlock
from mufasa_rec.modules.modalities import ModalityProjections

# Row 0 of a table, which rare items share, starts at zero. There the gradient of `x / max(|x|, eps)` is 1 / eps: 1e12
# with PyTorch's default, after which a row-wise Adagrad never moves the row again.
_MIN_NORM = 0.01


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
        self.projections = ModalityProjections(modalities, width)
        self.norm = nn.LayerNorm(width)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's vectors."""
        return self.projections.widths

    def forward(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Fuse the modalities of each item.

        Args:
            content: Vectors by modality, each `[U, P]`.
            present: Which items have the modality, `[U]` bool.

        Returns:
            Fused content `[U, E]`, zero where an item has none, and which items have any, `[U]` bool.

        Raises:
            ValueError: When a modality is missing or of another width.
        """
        total, count = self.projections(content, present)
        has = count > 0
        fused = self.norm(total / count.clamp(min=1)[:, None])
        return fused * has[:, None], has


class ItemTower(nn.Module):
    """Item vector = normalise(MLP(z) + e_id), `z` the fused content (MUFASA's retrieval head, our design).

    In training an item's id embedding is dropped with a small probability, so that the content alone must find it: that
    is what carries an item nobody has chosen yet.

    Args:
        modalities: Width of each content modality; empty for ids alone.
        categoricals: Item categoricals, and whether they are multi-valued.
        width: Model width `E`.
        use_id: Whether item ids are used; False is the pure-content variant.
        id_dropout: Probability of dropping an item's id embedding in training.

    Raises:
        ValueError: Without ids and content both.

    Example:
        >>> tower = ItemTower({"title": 3}, {"genre": True}, 4).eval()
        >>> looked_up = {"item.genre": torch.randn(3, 4), "content.title": torch.randn(2, 3)}
        >>> present, counts = {"title": torch.tensor([True, False])}, {"genre": torch.tensor([2, 1])}
        >>> items = tower(torch.randn(2, 4), looked_up, present, counts)
        >>> items.has_content.tolist(), torch.allclose(items.vectors.norm(dim=1), torch.ones(2))
        ([True, False], True)
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
            looked_up: Values of the categoricals (`item.<name>`, `[sum of counts, E]`, or `[U, E]` where single-valued)
                and modalities (`content.<name>`, `[U, P]`).
            present: Which items have each modality, `[U]` bool.
            counts: Values of each multi-valued categorical, `[U]`.

        Returns:
            The items; a vector is zero, not unit, only for an item of which nothing is known.

        Raises:
            ValueError: When a categorical or modality that the model was built with is missing.
        """
        embedded = ids if self.use_id else torch.zeros_like(ids) + ids[:0].sum()  # the table stays in the graph
        alone = torch.zeros_like(ids)
        for name, multi_valued in self.categoricals.items():
            values = _looked_up(looked_up, f"item.{name}")
            alone = alone + (mean_of_lists(values, counts[name]) if multi_valued else values)
        if self.content is None or self.head is None:
            nothing = torch.zeros_like(ids)
            has = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            return Items(embedded + alone, nothing, has, _unit(embedded + alone))
        content = {name: _looked_up(looked_up, f"content.{name}") for name in self.content.widths}
        z, has = self.content(content, present)
        keep = self._keep(embedded, has)
        return Items(embedded + alone, z, has, _unit(self.head(z) + embedded * keep + alone))

    def _keep(self, embedded: Tensor, has_content: Tensor) -> Tensor:
        """Which items keep their id in the item vector, `[U, 1]`: those without content always do."""
        if not self.training or self.id_dropout == 0.0:
            return embedded.new_ones(len(embedded), 1)
        drop = torch.rand(len(embedded), 1, device=embedded.device) < self.id_dropout
        return (~(drop & has_content[:, None])).to(embedded.dtype)


def mean_of_lists(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of each item's values, `[sum of counts, E]` to `[U, E]`; zero for an item without values."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(values))
    total = values.new_zeros(len(counts), values.shape[1]).index_add(0, owner, values)
    return total / counts.clamp(min=1).to(values.dtype)[:, None]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=_MIN_NORM)


def _looked_up(values: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise ValueError(f"{name}: not among the looked-up features {sorted(values)}; the batch must hold its ids.")
    return values[name]
