"""The fusion layer's loss (iv): the fused vectors fill their space like a standard normal.

That MUFASA (arXiv 2508.09664) regularises the distribution of its fusion space is the paper's; which distance it takes
is not known, so four published ones can be chosen. They are batch statistics and want the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.fusion_losses import cosines, off_diagonal

Kind = Literal["mmd", "kl", "uniformity", "sliced"]

_MIN_VARIANCE = 1e-4
# Double-exponential rule for the integral of e^-u f(u) over u > 0 (u = exp(y - e^-y)). It stays within 1e-6 for vectors
# of any length, where Gauss-Laguerre with as many nodes misses the sharp peaks that long vectors make.
_Y = np.linspace(-2.8, 3.5, 32)
_NODES = np.exp(_Y - np.exp(-_Y))
_WEIGHTS = (_Y[1] - _Y[0]) * _NODES * (1 + np.exp(-_Y)) * np.exp(-_NODES)


@dataclass(frozen=True, kw_only=True)
class DistributionConfig:
    """Loss (iv).

    Attributes:
        kind: The distance: `mmd`, `kl`, `uniformity` or `sliced`; see the functions of those names.
        per_genre: Whether each genre's items are to fill the space, instead of all items together; then genres cannot
            lie apart.
        min_genre_items: Genres with fewer items in the batch are left out.
        scales: Scales of the kernels of `mmd`.
        num_directions: Random directions of `sliced`.
    """

    kind: Kind = "mmd"
    per_genre: bool = False
    min_genre_items: int = 8
    scales: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    num_directions: int = 256

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"distribution.kind={self.kind!r}: choose one of {', '.join(get_args(Kind))}.")
        for name, least in (("min_genre_items", 2), ("num_directions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"distribution.{name}={getattr(self, name)}: choose {least} or more.")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"distribution.scales={self.scales}: choose at least one, all above 0.")


def distribution_loss(
    z: Tensor, members: Tensor, config: DistributionConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Distance of the fused vectors from a standard normal; with `per_genre` the mean over the genres.

    Args:
        z: Fused vectors, not of unit length, `[N, E]`.
        members: Which items have each genre, `[N, G]` bool; read with `per_genre` only, where an item without genres
            has no part.
        config: The loss.
        generator: Draws the directions of `sliced`, on the CPU; all ranks must draw the same.

    Returns:
        The distance; 0 for fewer than two items, or where no genre has enough.
    """
    distances: dict[Kind, Callable[[Tensor], Tensor]] = {
        "mmd": lambda x: mmd(x, config.scales),
        "kl": kl,
        "uniformity": uniformity,
        "sliced": lambda x: sliced(x, directions),
    }
    directions = z.new_zeros(0)
    if config.kind == "sliced":
        directions = torch.randn(z.shape[1], config.num_directions, generator=generator).to(z)
    distance = distances[config.kind]
    if not config.per_genre:
        return distance(z) if len(z) > 1 else z[:0].sum()
    genres = [has for has in members.T if int(has.sum()) >= config.min_genre_items]
    return sum((distance(z[has]) for has in genres), z[:0].sum()) / max(len(genres), 1)


def mmd(z: Tensor, scales: Sequence[float]) -> Tensor:
    """Squared maximum mean discrepancy to N(0, I) with inverse-multiquadratic kernels.

    `L = sum_s E k_s(z, z') - 2 E k_s(z, y) + E k_s(y, y')`, `k_s(x, y) = C / (C + |x - y|^2)`, `C = 2 E s`, the kernels
    of Wasserstein auto-encoders (arXiv 1711.01558). The pairs `z, z'` are of different items, so the mean is free of
    bias and may be slightly negative. No normal vector is drawn: since `k = integral of e^-u exp(-u |x - y|^2 / C) du`,
    the expectations over `y` are one-dimensional integrals, without noise and equal on all ranks.

    Args:
        z: Vectors, `[N, E]`, N at least 2.
        scales: Scales `s`.

    Returns:
        The discrepancy.
    """
    width = z.shape[1]
    length = z.square().sum(1)
    apart = off_diagonal((length[:, None] + length - 2 * z @ z.T).clamp(min=0))
    nodes, weights = (torch.as_tensor(x, dtype=z.dtype, device=z.device) for x in (_NODES, _WEIGHTS))
    total = z.new_zeros(())
    for scale in scales:
        c = 2 * width * scale
        t = nodes / c
        normal = weights * (1 + 2 * t) ** (-width / 2) * torch.exp(-t * length[:, None] / (1 + 2 * t))
        both_normal = (weights * (1 + 4 * t) ** (-width / 2)).sum()
        total = total + (c / (c + apart)).mean() - 2 * normal.sum(1).mean() + both_normal
    return total


def kl(z: Tensor) -> Tensor:
    """Divergence of a normal with the batch's moments from N(0, I), per channel.

    `L = 1/2 mean_d (mu_d^2 + var_d - 1 - log var_d)`; channels are taken as independent.

    Args:
        z: Vectors, `[N, E]`, N at least 2.

    Returns:
        The divergence in nats.
    """
    mean, variance = z.mean(0), z.var(0) + _MIN_VARIANCE
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()


def uniformity(z: Tensor) -> Tensor:
    """Crowding on the sphere: `L = log mean_{i != j} exp(-2 |z_i - z_j|^2)`, z of unit length (arXiv 2005.10242).

    Args:
        z: Vectors of any length, `[N, E]`, N at least 2.

    Returns:
        From -8 to 0, 0 where all directions are one.
    """
    apart = 2 - 2 * off_diagonal(cosines(z, z))
    return (-2 * apart).flatten().logsumexp(0) - math.log(apart.numel())


def sliced(z: Tensor, directions: Tensor) -> Tensor:
    """Epps-Pulley distance from N(0, 1) along random directions.

    `L = mean_a integral of |mean_i exp(i t a . z_i) - exp(-t^2 / 2)|^2 p(t) dt`, `p` the standard normal density: the
    sliced test of LeJEPA (arXiv 2511.08544) up to its factor N. Linear in the items.

    Args:
        z: Vectors, `[N, E]`, N at least 2.
        directions: Directions of any length, `[E, A]`.

    Returns:
        The distance.
    """
    t = torch.linspace(0, 5, 17, dtype=z.dtype, device=z.device)  # both characteristic functions are even in t
    angles = (z @ F.normalize(directions, dim=0))[..., None] * t  # [N, A, 17]
    normal = torch.exp(-0.5 * t.square())
    apart = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    density = normal / math.sqrt(2 * math.pi)
    return 2 * torch.trapezoid(apart * density, t, dim=-1).mean()
