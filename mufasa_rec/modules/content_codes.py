"""Content vectors in 8 bits a value that TorchRec's tables can hold, shard and look up: two codes to a half number.

TorchRec 1.8 cannot shard an EmbeddingCollection of 8-bit integers: with scale and bias FBGEMM's rows are 8 bytes longer
than the sharding metadata that they are checked against. So two codes of 247 levels are written as the bits of one
float16. There are 247^2 = 61,009 pairs and 61,440 normal float16 numbers, so every pair has a number of its own that no
conversion changes: neither zero, nor subnormal, nor infinite, nor NaN. The lookup, its exchange and every compute
kernel treat them as any other float16.

    row = [codes j and ceil(P / 2) + j, for each j] [scale] [zeros up to a multiple of 4]        value = code x scale
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 123  # codes are -123 to 123
_LEVELS = 2 * _LARGEST + 1
_FIRST_NORMAL = 0x0400  # bits of the smallest normal float16; of the same sign there are 30,720 with exponents 1 to 30
_NORMALS = 30 << 10
_MOST = 65504.0  # largest float16


def packed_width(width: int) -> int:
    """Columns of float16 of a vector of `width` values, a multiple of 4 as FBGEMM wants.

    Example:
        >>> packed_width(128), packed_width(3)
        (68, 4)
    """
    return -(-(-(-width // 2) + 1) // 4) * 4


def pack(vectors: Tensor) -> Tensor:
    """Round vectors to codes.

    Args:
        vectors: Vectors, `[n, P]`, finite and within float16's range.

    Returns:
        Their rows, float16 `[n, packed_width(P)]`. `unpack` gives vectors that are off by at most half a step, which is
        the row's largest value / 123, rounded up to float16.

    Example:
        >>> vectors = torch.tensor([[1.0, -0.5, 0.25]])
        >>> (unpack(pack(vectors), 3) - vectors).abs().max().item() <= 0.5 * (1 / 123) * (1 + 2**-10)
        True
    """
    vectors = vectors.float()
    count, width = vectors.shape
    scale = _rounded_up(vectors.abs().amax(1, keepdim=True) / _LARGEST)
    codes = torch.round(vectors / torch.where(scale > 0, scale.float(), 1.0)).to(torch.int32) + _LARGEST
    pairs = -(-width // 2)
    second = torch.nn.functional.pad(codes[:, pairs:], (0, width % 2), value=_LARGEST)
    pair = codes[:, :pairs] * _LEVELS + second
    bits = torch.where(pair < _NORMALS, pair + _FIRST_NORMAL, pair - _NORMALS + _FIRST_NORMAL - (1 << 15))
    rows = torch.zeros(count, packed_width(width), dtype=torch.float16)
    rows[:, :pairs] = bits.to(torch.int16).view(torch.float16)
    rows[:, pairs] = scale[:, 0]
    return rows


def _rounded_up(scale: Tensor) -> Tensor:
    """Scales as float16 that are not smaller, so that no code lies beyond the last."""
    half = scale.clamp(max=_MOST).half()
    low = half.float() < scale
    return torch.where(low, (half.view(torch.int16) + 1).view(torch.float16), half)


def unpack(rows: Tensor, width: int) -> Tensor:
    """Vectors of rows that `pack` made.

    Args:
        rows: Rows as they were looked up, float16 or float32, `[n, packed_width(P)]`.
        width: Values `P` of a vector.

    Returns:
        Vectors, float32 `[n, P]`.
    """
    pairs = -(-width // 2)
    pair = rows[:, :pairs].half().view(torch.int16).float()  # whole numbers that float32 and its sums hold exactly
    pair.add_((pair < 0) * float((1 << 15) + _NORMALS)).sub_(_FIRST_NORMAL)
    first = (pair + 0.5).div_(_LEVELS).floor_()  # at least half a code away from another whole number
    codes = torch.cat([first, pair.sub_(first, alpha=_LEVELS)], dim=1)[:, :width]
    return codes.sub_(_LARGEST).mul_(rows[:, pairs, None])
