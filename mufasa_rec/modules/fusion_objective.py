"""The fusion layer's objective: `L = L_sem + w_c L_col + w_s L_str + w_d L_dist` over the items of all ranks.

Each of the four is a statistic of the whole batch: what they read is gathered from all ranks, with gradient, and each
rank computes the loss of the global batch. So the average over ranks that DDP takes, of losses and of gradients, is
that of the global batch: 1 rank with 2B items equals 2 ranks with B. It costs each rank `N^2` cosines of the global N.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.fusion import Fused, FusionLayer, ItemContent
from mufasa_rec.modules.fusion_batch import Behaviour, GlobalBatch, Reads, gather_batch
from mufasa_rec.modules.fusion_distribution import DistributionConfig, distribution_loss
from mufasa_rec.modules.fusion_losses import (
    CollaborativeConfig,
    SemanticConfig,
    collaborative_loss,
    pair_loss,
    semantic_loss,
)
from mufasa_rec.modules.fusion_structure import StructureConfig, guard_loss, reconstruction_loss, structure_loss
from mufasa_rec.modules.next_item import Exchange, LocalExchange


@dataclass(frozen=True, kw_only=True)
class FusionObjectiveConfig:
    """The four losses; a weight of 0 switches one off.

    Attributes:
        semantic: Loss (i), alignment across genres.
        collaborative: Loss (ii), alignment with behaviour.
        structure: Loss (iii), the similarities of titles, and what each modality says.
        distribution: Loss (iv), the distribution of the fused vectors.
        semantic_weight: Weight of (i).
        collaborative_weight: Weight of (ii).
        structure_weight: Weight of (iii).
        distribution_weight: Weight of (iv).
        seed: Seeds the random directions of `distribution.kind='sliced'`, equally on all ranks.
    """

    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    collaborative: CollaborativeConfig = field(default_factory=CollaborativeConfig)
    structure: StructureConfig = field(default_factory=StructureConfig)
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    semantic_weight: float = 1.0
    collaborative_weight: float = 1.0
    structure_weight: float = 0.5
    distribution_weight: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("semantic", "collaborative", "structure", "distribution"):
            weight = getattr(self, f"{name}_weight")
            if not weight >= 0:
                raise ValueError(f"fusion.objective.{name}_weight={weight}: choose 0 (off) or more.")


@dataclass(frozen=True)
class FusionLoss:
    """The objective's value.

    Attributes:
        total: What to minimise, a scalar.
        terms: For the log, detached: each loss that is on, before its weight (`semantic`, `collaborative`, `structure`,
            `distribution`), the parts of (iii) (`structure/` and `guard/` of `fused` and of each modality, and
            `reconstruction`), and `positives`: near duplicates in another genre per item with a title.
    """

    total: Tensor
    terms: dict[str, Tensor]


class FusionObjective(nn.Module):
    """See the module docstring. Holds the projection to the collaborative space and the decoder of the modalities.

    Args:
        config: The losses.
        layer: The layer to be trained; read for its sizes only.
        collaborative_width: Width `Q` of the collaborative vectors, for `collaborative.kind='vectors'`.
        exchange: Reaches the other ranks.

    Raises:
        ValueError: When (ii) is on with `vectors` but their width is not given.

    Example:
        >>> from mufasa_rec.modules.fusion import FusionConfig
        >>> layer = FusionLayer(FusionConfig(width=8), {"title": 3}, num_genres=2)
        >>> objective = FusionObjective(FusionObjectiveConfig(collaborative_weight=0), layer)
        >>> items = ItemContent(
        ...     content={"title": torch.randn(4, 3)},
        ...     present={"title": torch.tensor([True, True, True, False])},
        ...     genres=torch.tensor([0, 0, 1, 1]),
        ...     genre_lengths=torch.ones(4, dtype=torch.int64),
        ... )
        >>> sorted(objective(layer(items), items).terms)
        ['distribution', 'positives', 'semantic', 'structure', 'structure/fused']
    """

    def __init__(
        self,
        config: FusionObjectiveConfig,
        layer: FusionLayer,
        *,
        collaborative_width: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self.config, self.exchange = config, exchange or LocalExchange()
        self.anchor, self.widths = layer.config.anchor, {name: layer.widths[name] for name in layer.others}
        width, self.projection, self.decoder = layer.config.width, None, None
        if config.collaborative_weight:
            if config.collaborative.kind == "pairs":
                collaborative_width = width
            if collaborative_width is None:
                raise ValueError(
                    "collaborative_width=None: give the width of the collaborative vectors, or choose "
                    "collaborative.kind='pairs' or collaborative_weight=0."
                )
            self.projection = nn.Linear(width, collaborative_width, bias=False)
        if config.structure_weight and config.structure.reconstruction and self.widths:
            self.decoder = nn.Linear(width, sum(self.widths.values()))  # by name, as `FusionLayer.others` is sorted
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def forward(self, fused: Fused, items: ItemContent, behaviour: Behaviour | None = None) -> FusionLoss:
        """Compute the losses of the global batch; collective.

        Args:
            fused: This rank's fused items.
            items: What they were fused from. The global batch should hold an item once.
            behaviour: What the training split says of them; read by (ii) only.

        Returns:
            The loss. Finite, and with every parameter in its graph, also where a loss finds nothing to compare.

        Raises:
            ValueError: When (ii) is on but the behaviour it needs is missing.
        """
        with torch.autocast(fused.z.device.type, enabled=False):
            batch = gather_batch(fused, items, behaviour, self._reads(), self.exchange)
            terms: dict[str, Tensor] = {}
            losses = {
                "semantic": self._semantic,
                "collaborative": self._collaborative,
                "structure": self._structure,
                "distribution": self._distribution,
            }
            total = batch.z[:0].sum()
            for name, loss in losses.items():
                weight = getattr(self.config, f"{name}_weight")
                if weight:
                    terms[name] = loss(batch, terms)
                    total = total + weight * terms[name]
        return FusionLoss(total, {name: term.detach() for name, term in terms.items()})

    def _semantic(self, batch: GlobalBatch, terms: dict[str, Tensor]) -> Tensor:
        has = batch.present[self.anchor]
        loss, positives = semantic_loss(
            batch.z[has],
            batch.projected[self.anchor][has],
            batch.content[self.anchor][has],
            batch.members[has],
            self.config.semantic,
        )
        terms["positives"] = positives.sum() / has.sum().clamp(min=1)
        return loss

    def _collaborative(self, batch: GlobalBatch, terms: dict[str, Tensor]) -> Tensor:
        assert self.projection is not None
        config, trusted = self.config.collaborative, batch.num_events >= self.config.collaborative.min_events
        projected = self.projection(F.normalize(batch.z[trusted], dim=1))
        if config.kind == "vectors":
            return collaborative_loss(projected, batch.behaviour[trusted], config)
        together = torch.zeros(len(batch.z), len(batch.z), dtype=torch.bool, device=batch.z.device)
        left, right = batch.behaviour.unbind(1)
        together[left, right] = together[right, left] = True
        return pair_loss(projected, together[trusted][:, trusted], config)

    def _structure(self, batch: GlobalBatch, terms: dict[str, Tensor]) -> Tensor:
        config, titled = self.config.structure, batch.present[self.anchor]
        seen = [("fused", batch.z, titled, 1.0)]
        for name in self.widths if config.modality_weight else ():
            seen.append((name, batch.projected[name], titled & batch.present[name], config.modality_weight))
        total = batch.z[:0].sum()
        for name, x, has, weight in seen:
            terms[f"structure/{name}"] = structure_loss(batch.content[self.anchor][has], x[has], config)
            total = total + weight * terms[f"structure/{name}"]
            if config.guard:
                terms[f"guard/{name}"] = guard_loss(x[has], config)
                total = total + weight * config.guard * terms[f"guard/{name}"]
        if self.decoder is not None:
            parts = self.decoder(batch.z).split(list(self.widths.values()), dim=1)
            present = {name: titled & batch.present[name] for name in self.widths}
            decoded = dict(zip(self.widths, parts, strict=True))
            terms["reconstruction"] = reconstruction_loss(decoded, batch.content, present)
            total = total + config.reconstruction * terms["reconstruction"]
        return total

    def _distribution(self, batch: GlobalBatch, terms: dict[str, Tensor]) -> Tensor:
        generator = None
        if self.config.distribution.kind == "sliced":
            draw = int(self.draws) if self.training else 0  # evaluation is comparable over time
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + draw)
            if self.training:
                self.draws += 1
        return distribution_loss(batch.z, batch.members, self.config.distribution, generator)

    def _reads(self) -> Reads:
        """What the losses that are on read of a batch."""
        config, content, projected = self.config, [], []
        if config.semantic_weight or config.structure_weight:
            content.append(self.anchor)
        if self.decoder is not None:
            content.extend(self.widths)
        if config.semantic_weight:
            projected.append(self.anchor)
        if config.structure_weight and config.structure.modality_weight:
            projected.extend(self.widths)
        behaviour = config.collaborative.kind if config.collaborative_weight else None
        width = 0 if self.projection is None else self.projection.out_features
        return Reads(tuple(content), tuple(projected), behaviour, width)
