"""What tests of tensor code share: offsets from lengths, gradients that must be there, errors relative to the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Offsets `[B + 1]` of sequences of these lengths."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0)])


def gradient(x: Tensor) -> Tensor:
    """The gradient that a backward must have left."""
    assert x.grad is not None, "no gradient"
    return x.grad


def gradients(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [gradient(x) for x in tensors]


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that collects a gradient."""
    return x.detach().clone().to(dtype or x.dtype).requires_grad_()


def assert_close(got: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Finite, of equal shapes, and close by the norm of the difference over the norm of the truth."""
    for mine, truth in zip(got, expected, strict=True):
        assert mine.shape == truth.shape
        assert torch.isfinite(mine).all()
        assert (mine.double() - truth.double()).norm() <= tolerance * truth.double().norm() + 1e-6
