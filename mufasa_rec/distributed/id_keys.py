"""Raw 64-bit ids as keys of a managed table: mixed so that any ids spread evenly, and ordered by bucket.

    raw id -> mixed (splitmix64, a bijection) -> its top bits are the bucket
    sent between ranks as `mixed` rotated left, so that the bucket is what TorchRec's input distribution reads: the
    remainder by the number of buckets. Kept in tables with the sign bit flipped: signed order is bucket order.

Nothing is lost on the way: `raw_of` gives the ids back.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGN = -(1 << 63)


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed number that torch takes."""
    return value - (1 << 64) if value >= 1 << 63 else value


_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_FIRST_BACK, _SECOND_BACK = _signed(0x96DE1B173F119089), _signed(0x319642B2D24D8EC3)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(ids: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 `[n]`; bit for bit that of `mufasa_rec.data.id_keys`."""
    z = (ids ^ _shifted(ids, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def unmix(mixed: Tensor) -> Tensor:
    """The inverse of `mix`.

    Example:
        >>> unmix(mix(torch.tensor([-5, 0, 7]))).tolist()
        [-5, 0, 7]
    """
    z = (mixed ^ _shifted(mixed, 31) ^ _shifted(mixed, 62)) * _SECOND_BACK
    z = (z ^ _shifted(z, 27) ^ _shifted(z, 54)) * _FIRST_BACK
    return z ^ _shifted(z, 30) ^ _shifted(z, 60)


def to_send(ids: Tensor, buckets: int) -> Tensor:
    """Raw ids `[n]` in the form that is sent: unsigned, their remainder by `buckets` (a power of two) is the bucket."""
    bits, mixed = buckets.bit_length() - 1, mix(ids)
    return (mixed << bits) | _shifted(mixed, 64 - bits) if bits else mixed


def received(sent: Tensor, buckets: int) -> Tensor:
    """Keys `[n]` of ids that were sent: ascending keys are ascending buckets."""
    bits = buckets.bit_length() - 1
    mixed = _shifted(sent, bits) | (sent << (64 - bits)) if bits else sent
    return mixed ^ _SIGN


def keys_of(ids: Tensor) -> Tensor:
    """Keys `[n]` of raw ids, without a way between ranks."""
    return mix(ids) ^ _SIGN


def raw_of(keys: Tensor) -> Tensor:
    """Raw ids `[n]` of keys.

    Example:
        >>> raw_of(received(to_send(torch.tensor([-5, 0, 7]), 64), 64)).tolist()
        [-5, 0, 7]
    """
    return unmix(keys ^ _SIGN)


def bucket_of(keys: Tensor, buckets: int) -> Tensor:
    """Bucket of each key, `[n]`."""
    bits = buckets.bit_length() - 1
    return _shifted(keys ^ _SIGN, 64 - bits) if bits else torch.zeros_like(keys)


def last_keys(first: int, count: int, buckets: int, device: torch.device) -> Tensor:
    """The last key that each of `count` buckets from `first` on can hold, `[count]`: it stands for an empty row."""
    width = (1 << 64) // buckets
    ends = [_signed((first + index + 1) * width - 1) ^ _SIGN for index in range(count)]
    return torch.tensor(ends, dtype=torch.int64, device=device)
