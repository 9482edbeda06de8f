"""MIEU, the first unit of DMAE: how similar the candidate is to each event, per modality, as an interest vector.

    r_mj = (cos(v_m,candidate , v_m,j) + 1) / 2         per modality m and event j
    r^_mj = w_m r_mj + b_m                              learned, w = 1 and b = 0 at first
    k_mj = bucket of r^_mj;   r^d_mj = r^_mj * E_m[k_mj]
    s_mj = W_m [r^d_mj ; e_j]                           e_j: vector of the time from the event to the request

DMAE (arXiv 2508.14485) encodes similarities per modality and behaviour; the first three lines follow a secondary
summary of it. Equal buckets over [0, 1] with clamped ends, the time encoding and `W_m` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.candidate_pairs import ContentReader, Similarities


class TimeEncoding(nn.Module):
    """Vectors of the time from an event to the request, in buckets `floor(log2(1 + seconds))`, one set per modality.

    Args:
        num_buckets: Buckets, the last one open; 0 says nothing about time.
        num_modalities: Modalities `M`.
        width: Width `D`.
    """

    def __init__(self, num_buckets: int, num_modalities: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_buckets, width) if num_buckets else None
        self.project = nn.Parameter(torch.randn(num_modalities, width, width) * width**-0.5) if num_buckets else None
        self.bias = nn.Parameter(torch.zeros(num_modalities, width))
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, bucket: Tensor | None) -> Tensor:
        """Look buckets `[c, n]` up, `[c, M, n, D]` (None: `[1, M, 1, D]`): the time's share of `W_m [r^d ; e]`."""
        if self.table is None or self.project is None or bucket is None:
            return self.bias[None, :, None]
        rows = self.table.weight @ self.project + self.bias[:, None]  # [M, buckets, D]: projected before, not per pair
        return _look_up(rows, bucket[:, None])


class SimilarityEncoding(nn.Module):
    """The unit.

    Args:
        num_modalities: Modalities `M`.
        width: Width `D`.
        num_buckets: Buckets of a similarity; with one bucket it enters linearly.
        num_time_buckets: Buckets of the time to the request; 0 for none.

    Example:
        >>> encoding = SimilarityEncoding(2, 8, num_buckets=21, num_time_buckets=0)
        >>> encoding.bucket(torch.tensor([-0.3, 0.0, 0.5, 1.0, 1.7])).tolist()
        [0, 0, 10, 20, 20]
    """

    def __init__(self, num_modalities: int, width: int, *, num_buckets: int, num_time_buckets: int) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.scale = nn.Parameter(torch.ones(num_modalities))
        self.shift = nn.Parameter(torch.zeros(num_modalities))
        self.buckets = nn.Parameter(torch.randn(num_modalities, num_buckets, width) * width**-0.5)
        self.null = nn.Parameter(torch.randn(num_modalities, width) * width**-0.5)
        self.project = nn.Parameter(torch.randn(num_modalities, width, width) * width**-0.5)
        self.time = TimeEncoding(num_time_buckets, num_modalities, width)

    def bucket(self, r_hat: Tensor) -> Tensor:
        """Bucket of each value: `num_buckets` equal ones over [0, 1], values outside in the first and the last."""
        return (r_hat.detach() * self.num_buckets).floor().clamp(0, self.num_buckets - 1).to(torch.int64)

    def forward(self, similar: Similarities, time_bucket: Tensor | None) -> Tensor:
        """Encode the pairs of a group.

        Args:
            similar: Similarities of the pairs.
            time_bucket: Bucket of the time to the request, `[c, n]`, or None.

        Returns:
            `[c, M, n, D]`; a pair without the modality has the projected null vector and its time.
        """
        r_hat = self.scale[:, None] * similar.r + self.shift[:, None]
        row = self.bucket(r_hat).masked_fill(~similar.has, self.num_buckets)  # the last row is the null vector's
        factor = r_hat.masked_fill(~similar.has, 1.0)
        rows = torch.cat([self.buckets, self.null[:, None]], dim=1) @ self.project  # [M, buckets + 1, D]
        return factor[..., None] * _look_up(rows, row) + self.time(time_bucket)


class ContentEncoding(nn.Module):
    """What stands in the unit's place when it is switched off: the content itself, never compared.

    `s_mj = V_m v_mj + U_m v_m,candidate + time`. What is similar the layers behind must find out by themselves.

    Args:
        modalities: Width of each modality's vectors.
        width: Width `D`.
        num_time_buckets: Buckets of the time to the request; 0 for none.
    """

    def __init__(self, modalities: Mapping[str, int], width: int, *, num_time_buckets: int) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.of_event = nn.ModuleList(nn.Linear(size, width, bias=False) for size in modalities.values())
        self.of_target = nn.ModuleList(nn.Linear(size, width, bias=False) for size in modalities.values())
        self.null = nn.Parameter(torch.randn(len(modalities), width) * width**-0.5)
        self.time = TimeEncoding(num_time_buckets, len(modalities), width)

    def forward(self, content: ContentReader, events: Tensor, candidates: Tensor, time_bucket: Tensor | None) -> Tensor:
        """Encode pairs of events `[c, n]` and candidates `[c]`, `[c, M, n, D]`."""
        parts = []
        for m, name in enumerate(self.modalities):
            event = torch.where(content.event_has[:, m, None], self.of_event[m](content.events[name]), self.null[m])
            target = self.of_target[m](content.targets[name])[candidates]  # zero without the modality
            parts.append(event[events] + target[:, None])
        return torch.stack(parts, dim=1) + self.time(time_bucket)


def _look_up(rows: Tensor, index: Tensor) -> Tensor:
    """Rows `[M, k, D]` by index `[c, M or 1, n]`, `[c, M, n, D]`."""
    modalities, size, _ = rows.shape
    first = torch.arange(modalities, device=index.device)[:, None] * size
    return F.embedding(index + first, rows.flatten(0, 1))
