"""The fusion layer's loss (iii): keep the similarities that titles define, and what each modality says.

That MUFASA (arXiv 2508.09664) preserves the similarity structure defined by titles, which also prevents the collapse
of a modality, is the paper's. The three parts are ours: relational distillation, an optional guard of variance and
covariance, and reconstruction. They are batch statistics and want the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.fusion_losses import cosines, off_diagonal

# Below this a standard deviation has no useful slope (VICReg).
_MIN_VARIANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """Loss (iii).

    Attributes:
        title_temperature: Temperature of the title cosines.
        temperature: Temperature of the cosines of fused vectors and projections.
        modality_weight: Weight beta of each modality's projections beside the fused vectors.
        reconstruction: Weight gamma of reading each modality back out of the fused vectors; without it they come close
            to a function of the title.
        guard: Weight of the variance and covariance guard; 0 for none.
        guard_variance: Weight of the variance inside the guard.
        guard_covariance: Weight of the covariance inside the guard.
    """

    title_temperature: float = 0.1
    temperature: float = 0.1
    modality_weight: float = 1.0
    reconstruction: float = 1.0
    guard: float = 0.0
    guard_variance: float = 25.0
    guard_covariance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("title_temperature", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"structure.{name}={getattr(self, name)}: choose more than 0, such as 0.1.")
        for name in ("modality_weight", "reconstruction", "guard", "guard_variance", "guard_covariance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"structure.{name}={getattr(self, name)}: choose 0 (off) or more.")


def structure_loss(titles: Tensor, x: Tensor, config: StructureConfig) -> Tensor:
    """Relational distillation: each item is as close to the others as its title is to their titles.

    `L = mean_i KL( softmax_{j != i}(cos(t_i, t_j) / tau_t)  ||  softmax_{j != i}(cos(x_i, x_j) / tau_u) )`. A space in
    which everything is equally close is far from any structure, so a collapse costs. Ours, after relational knowledge
    distillation (arXiv 1904.05068) and its softmax form in SEED (arXiv 2101.04731).

    Args:
        titles: Title vectors as given, `[N, P]`; the teacher, whatever its gradient.
        x: Fused vectors or one modality's projections of the same items, `[N, E]`.
        config: The loss.

    Returns:
        The divergence in nats; 0 for fewer than three items, which have no structure.
    """
    if len(x) < 3:
        return x[:0].sum()
    teacher = (off_diagonal(cosines(titles, titles)) / config.title_temperature).log_softmax(dim=1).detach()
    learned = (off_diagonal(cosines(x, x)) / config.temperature).log_softmax(dim=1)
    return F.kl_div(learned, teacher, reduction="batchmean", log_target=True)


def guard_loss(x: Tensor, config: StructureConfig) -> Tensor:
    """Variance and covariance guard: every channel varies, and no two say the same.

    `L = w_v mean_d max(0, 1 - sqrt(var_d + eps)) + w_c / E sum_{d != e} cov_de^2`, VICReg (arXiv 2105.04906).

    Args:
        x: Vectors, not of unit length, `[N, E]`.
        config: The loss.

    Returns:
        The guard; 0 for fewer than two items.
    """
    if len(x) < 2:
        return x[:0].sum()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    spread = (covariance.diagonal() + _MIN_VARIANCE).sqrt()
    overlap = off_diagonal(covariance).square().sum() / x.shape[1]
    return config.guard_variance * (1 - spread).clamp(min=0).mean() + config.guard_covariance * overlap


def reconstruction_loss(
    decoded: Mapping[str, Tensor], content: Mapping[str, Tensor], present: Mapping[str, Tensor]
) -> Tensor:
    """Reconstruction: what each modality says can be read out of the fused vector.

    `L = mean_i mean_{k present} (1 - cos(D_k(z_i), m_i^k - mean_j m_j^k))`. Without the mean of the batch's vectors a
    constant would do well, since the vectors of one encoder share a large common part. Ours.

    Args:
        decoded: Read out of the fused vectors by modality, `D_k(z)`, each `[N, P]`.
        content: The modality's vectors as given, each `[N, P]`; a missing one is never read.
        present: Which items have the modality, `[N]` bool.

    Returns:
        The mean over the items that have any of these modalities; 0 where none has.
    """
    losses: Sequence[Tensor] = [
        _distance_from_content(decoded[name], content[name], present[name][:, None]) for name in decoded
    ]
    has = torch.stack([present[name] for name in decoded])
    per_item = torch.stack(tuple(losses)).sum(0) / has.sum(0).clamp(min=1)
    return per_item.sum() / has.any(0).sum().clamp(min=1)


def _distance_from_content(decoded: Tensor, vectors: Tensor, has: Tensor) -> Tensor:
    """One minus the cosine of decoded and centred vectors, `[N]`; 0 where missing."""
    vectors = vectors.masked_fill(~has, 0.0).to(decoded.dtype)
    centred = vectors - vectors.sum(0) / has.sum().clamp(min=1)
    distance = 1 - F.cosine_similarity(decoded, centred, dim=1, eps=1e-6)
    return distance.masked_fill(~has[:, 0], 0.0)
