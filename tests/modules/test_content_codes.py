"""Two codes in one float16: every pair survives every conversion, and no value is off by more than half a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mufasa_rec.modules.content_codes import pack, packed_width, unpack


def steps_of(rows: Tensor, width: int) -> Tensor:
    """The quantisation step of each packed row, `[n, 1]`."""
    return rows[:, -(-width // 2), None].float()


def test_every_pair_of_codes_is_a_normal_float16_and_comes_back() -> None:
    """A row of all 61,009 pairs; 127 / 123 would be another step, so the largest code is 123."""
    codes = torch.cartesian_prod(*[torch.arange(-123, 124)] * 2).T.flatten().float()
    rows = pack(codes[None])
    stored = rows[0, : len(codes) // 2]
    bits = stored.view(torch.int16).to(torch.int32) & 0x7FFF
    assert ((bits >= 0x0400) & (bits < 0x7C00)).all()
    assert len(torch.unique(stored.view(torch.int16))) == 247 * 247
    assert steps_of(rows, codes.numel()).item() == 1.0
    for looked_up in (rows, rows.float(), rows.float().half()):
        assert torch.equal(unpack(looked_up, codes.numel())[0], codes)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 128])
@pytest.mark.parametrize("size", [1.0, 60_000.0, 1e-3, 3e-6, 2e-7])
def test_values_are_off_by_at_most_half_a_step(width: int, size: float) -> None:
    vectors = (torch.randn(200, width, generator=torch.Generator().manual_seed(width)).clamp(-1, 1) * size).half()
    rows = pack(vectors)
    assert rows.shape == (200, packed_width(width)) and rows.shape[1] % 4 == 0
    found, step = unpack(rows, width), steps_of(rows, width)
    assert ((found - vectors.float()).abs() <= 0.5 * step * (1 + 1e-6)).all()
    largest = vectors.float().abs().amax(1, keepdim=True)
    assert (step >= largest / 123).all()
    assert (step <= largest / 123 * (1 + 2**-10) + 2**-24).all()


def test_eight_bits_are_really_used() -> None:
    """A bound that a coarser code would break: the mean error of a uniform value is a quarter of a step."""
    vectors = torch.rand(500, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = (unpack(pack(vectors), 64) - vectors).abs().mean()
    assert 0.2 / 123 < error < 0.3 / 123


def test_zero_rows_and_rows_that_were_never_filled_are_zero() -> None:
    assert not unpack(pack(torch.zeros(2, 5)), 5).any()
    assert not unpack(torch.zeros(2, packed_width(5)), 5).any()


def test_no_rows_are_no_rows() -> None:
    assert unpack(pack(torch.zeros(0, 5)), 5).shape == (0, 5)
