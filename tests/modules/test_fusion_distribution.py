"""Loss (iv) of the fusion layer: each distance against its definition, and what makes it rise."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.fusion_distribution import (
    DistributionConfig,
    Kind,
    distribution_loss,
    kl,
    mmd,
    sliced,
    uniformity,
)
from tests.tensors import gradients, leaf

KINDS = get_args(Kind)


def normal(num_items: int = 400, width: int = 8) -> Tensor:
    return torch.randn(num_items, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def distance(z: Tensor, kind: Kind, members: Tensor | None = None, *, min_genre_items: int = 8) -> float:
    config = DistributionConfig(kind=kind, per_genre=members is not None, min_genre_items=min_genre_items)
    members = torch.ones(len(z), 0, dtype=torch.bool) if members is None else members
    return distribution_loss(z, members, config, torch.Generator().manual_seed(1)).item()


@pytest.mark.parametrize("kind", KINDS)
def test_distance_rises_for_a_shifted_and_for_a_collapsed_space(kind: Kind) -> None:
    z = normal()
    for worse in (lambda share: z + share, lambda share: z * (1 - share) + share * z[:1]):
        shares = (0.0, 0.5, 0.95)
        near, far, farthest = (distance(worse(share), kind) for share in shares)
        assert near < far < farthest


@pytest.mark.parametrize("kind", KINDS)
def test_distance_rises_when_few_directions_are_left(kind: Kind) -> None:
    z = normal()
    few = z.clone()
    few[:, 2:] *= 0.1
    assert distance(few, kind) > distance(z, kind) + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_distance_rises_for_a_scaled_space_in_all_but_uniformity(kind: Kind) -> None:
    z = normal()
    for far, farthest in ((2.0, 4.0), (0.5, 0.25)):
        distances = [distance(z * scale, kind) for scale in (1.0, far, farthest)]
        if kind == "uniformity":
            assert distances[1:] == pytest.approx([distances[0]] * 2)
        else:
            assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("kind", ["mmd", "kl", "sliced"])
def test_standard_normal_is_at_distance_zero(kind: Kind) -> None:
    assert abs(distance(normal(2000), kind)) < 0.01


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("length", [0.0, 1.0, 10.0])
def test_mmd_of_two_items_is_its_definition(width: int, length: float) -> None:
    """Expectations over the distance to a normal vector by integrating the density of the distance's square."""
    z = torch.zeros(2, width, dtype=torch.float64)
    z[0, 0], z[1, 0] = length, -length
    scales = (0.1, 2.0)
    y = np.linspace(-12, 12, 24_001)
    step, density = y[1] - y[0], np.exp(-(y**2) / 2) / math.sqrt(2 * math.pi)
    rest = torch.randn(20_000, max(width - 1, 0), generator=torch.Generator().manual_seed(2)).square().sum(1).numpy()
    levels = np.quantile(rest, (np.arange(200) + 0.5) / 200) if width > 1 else np.zeros(1)
    expected = 0.0
    for scale in scales:
        c = 2 * width * scale

        def mean_kernel(at: float, spread: float, c: float = c) -> float:
            apart = (spread * y - at) ** 2 + spread**2 * levels[:, None]
            return float((c / (c + apart) @ density).mean() * step)

        expected += c / (c + 4 * length**2) - 2 * mean_kernel(length, 1.0) + mean_kernel(0.0, math.sqrt(2))
    assert mmd(z, scales).item() == pytest.approx(expected, abs=1e-6 if width == 1 else 5e-3)


def test_kl_uniformity_and_sliced_by_hand() -> None:
    z = torch.tensor([[2.0, 1.0], [0.0, 1.0 + 1e-9]], dtype=torch.float64)  # means 1 and 1, variances 2 and 0
    first = 1 + 2.0001 - 1 - math.log(2.0001)
    second = 1 + 0.0001 - 1 - math.log(0.0001)
    assert kl(z).item() == pytest.approx((first + second) / 4)
    assert uniformity(torch.tensor([[3.0, 0.0], [-5.0, 0.0]])).item() == pytest.approx(-8.0)
    assert uniformity(torch.tensor([[3.0, 0.0], [0.0, 0.1]])).item() == pytest.approx(-4.0)
    assert uniformity(torch.ones(3, 2)).item() == pytest.approx(0.0, abs=1e-5)
    x = normal(6, 1)  # along one direction the integral has a closed form
    closed = (-0.5 * (x - x.T) ** 2).exp().mean() - math.sqrt(2) * (-0.25 * x**2).exp().mean() + 1 / math.sqrt(3)
    assert sliced(x, torch.tensor([[-3.0]], dtype=torch.float64)).item() == pytest.approx(closed.item(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_genres_that_lie_apart_are_seen_per_genre_only(kind: Kind) -> None:
    """Each genre in a half space of its own: together a normal, alone far from one."""
    z = normal()
    members = F.one_hot((z[:, 0] > 0).long()).bool()
    mixed = members[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    assert distance(z, kind, members) > distance(z, kind, mixed) + 0.005
    whole = torch.ones(len(z), 1, dtype=torch.bool)
    assert distance(z, kind, whole) == pytest.approx(distance(z, kind))


def test_small_genres_are_left_out_and_without_any_there_is_a_zero() -> None:
    z, members = leaf(normal()), torch.zeros(400, 3, dtype=torch.bool)
    members[:50, 0] = members[40:47, 1] = True
    assert distance(z, "kl", members) == pytest.approx(distance(z[:50], "kl"))
    both = distance(z, "kl", members, min_genre_items=7)
    assert both == pytest.approx((kl(z[:50]).item() + kl(z[40:47]).item()) / 2)
    config = DistributionConfig(per_genre=True, min_genre_items=99)
    loss = distribution_loss(z, members, config)
    loss.backward()
    assert loss.item() == 0.0
    assert (gradients([z])[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_items", [0, 1])
def test_too_few_items_are_a_zero_that_keeps_the_graph(kind: Kind, num_items: int) -> None:
    z = leaf(normal(num_items))
    loss = distribution_loss(z, torch.ones(num_items, 1, dtype=torch.bool), DistributionConfig(kind=kind))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_function_and_finite_in_a_collapsed_space(kind: Kind) -> None:
    config = DistributionConfig(kind=kind, num_directions=3)

    def loss(z: Tensor) -> Tensor:
        members = torch.ones(len(z), 0, dtype=torch.bool)
        return distribution_loss(z, members, config, torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(loss, (leaf(normal(5, 3)),))
    point = leaf(torch.ones(5, 3))
    loss(point).backward()
    assert gradients([point])[0].isfinite().all()


def test_wrong_configurations_are_refused_by_name() -> None:
    wrong: dict[str, Any] = {"kind": "wasserstein", "min_genre_items": 1, "num_directions": 0, "scales": ()}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=re.escape(f"distribution.{field}={value!r}: choose")):
            DistributionConfig(**{field: value})
