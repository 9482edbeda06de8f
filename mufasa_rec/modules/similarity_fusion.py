"""MIFU, the second unit of DMAE: interest vectors of each event, fused over modalities and pooled for the candidate.

    A_m = S_m + attention(query S_m, keys and values = the other modalities' S)        not with one modality
    X_m = transformer block over the sequence
    c_j = sum_m g_mj X_mj,   g_j = softmax over modalities of W[X_1j ; ... ; candidate]     a sigmoid for two
    u   = target-attention pooling of c,   u_m = the same of X_m

DMAE (arXiv 2508.14485) fuses at the level of each behaviour; these equations are ours. Attention, block and pooling
are shared by the modalities, whose vectors have weights of their own from the first unit on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.candidate_pairs import Similarities
from mufasa_rec.modules.mlp import GatedBlock


class InterestFusion(nn.Module):
    """The unit.

    Args:
        num_modalities: Modalities `M`.
        width: Width `D`.
        target_width: Width `E` of a candidate's embedding.
        num_heads: Attention heads; must divide the width.
        dropout: Probability of dropping a channel of a block's output.

    Raises:
        ValueError: When the heads do not divide the width.
    """

    def __init__(
        self, num_modalities: int, width: int, target_width: int, *, num_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.cross = _Attention(width, num_heads, dropout) if num_modalities > 1 else None
        self.self_attention = _Attention(width, num_heads, dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = GatedBlock(width, 2 * width, dropout)
        self.norm = nn.LayerNorm(width)
        self.gate = _Gate(num_modalities, width, target_width) if num_modalities > 1 else None
        self.query = nn.Linear(target_width, width)
        others = [[k for k in range(num_modalities) if k != m] for m in range(num_modalities)]
        self.register_buffer("others", torch.tensor(others, dtype=torch.int64), persistent=False)

    def forward(self, s: Tensor, similar: Similarities, target: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse and pool.

        Args:
            s: Interest vectors of the pairs, `[c, M, n, D]`.
            similar: Which places hold events, and which pairs have a modality.
            target: Embeddings of the candidates, `[c, E]`.

        Returns:
            Fused interest `[c, D]`, and that of each modality `[c, M, D]`.
        """
        x = s
        if self.cross is not None:
            x = x + self.cross(x, similar.valid, self.get_buffer("others"))
        x = x + self.self_attention(x, similar.valid)
        x = self.norm(x + self.ffn(self.ffn_norm(x)))
        query = self.query(target)[:, None]
        fused = x[:, 0] if self.gate is None else (self.gate(x, similar.has, target)[..., None] * x).sum(1)
        pooled = _pool(torch.cat([fused[:, None], x], dim=1), query, similar.valid)  # [c, 1 + M, D]
        return pooled[:, 0], pooled[:, 1:]


class MeanFusion(nn.Module):
    """What stands in the unit's place when it is switched off: means over events, and over modalities."""

    def forward(self, s: Tensor, similar: Similarities, target: Tensor) -> tuple[Tensor, Tensor]:
        """As `InterestFusion.forward`; `target` is not read."""
        valid = similar.valid[:, None, :, None]
        per_modality = (s * valid).sum(2) / valid.sum(2)
        return per_modality.mean(1), per_modality


class _Attention(nn.Module):
    """Pre-norm attention over the events of a pair's user, of the modality itself or of the others."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide the width {width} of the similarity interest.")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor, others: Tensor | None = None) -> Tensor:
        """Attend `[c, M, n, D]`; with `others [M, M - 1]` each modality reads the events of those."""
        pairs, modalities, places, width = x.shape
        rows = self.qkv(self.norm(x)).view(pairs, modalities, places, 3, self.num_heads, -1)
        q, k, v = rows.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each [c, M, H, n, d]
        mask = valid
        if others is not None:
            k, v = (y[:, others].transpose(2, 3).flatten(3, 4) for y in (k, v))  # [c, M, H, (M - 1) n, d]
            mask = valid.repeat(1, others.shape[1])
        mask = mask[:, None, None, None].expand(-1, modalities, -1, -1, -1).flatten(0, 1)
        read = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
        read = read.transpose(1, 2).reshape(pairs, modalities, places, width)
        return self.dropout(self.out(read))


class _Gate(nn.Module):
    """Weights of the modalities at each event, `[c, M, n]`; those that a pair lacks have none, if it has any."""

    def __init__(self, num_modalities: int, width: int, target_width: int) -> None:
        super().__init__()
        self.two = num_modalities == 2
        inputs, outputs = (3, 1) if self.two else (num_modalities, num_modalities)
        self.events = nn.Linear(inputs * width, outputs)
        self.target = nn.Linear(target_width, outputs, bias=False)

    def forward(self, x: Tensor, has: Tensor, target: Tensor) -> Tensor:
        parts = [*x.unbind(1), x[:, 0] * x[:, 1]] if self.two else [*x.unbind(1)]
        logit = (self.events(torch.cat(parts, dim=-1)) + self.target(target)[:, None]).transpose(1, 2)
        if self.two:
            logit = torch.cat([logit, torch.zeros_like(logit)], dim=1)  # softmax of (z, 0) is sigmoid of z
        absent = ~has & has.any(1, keepdim=True)
        return logit.masked_fill(absent, float("-inf")).softmax(1)


def _pool(x: Tensor, query: Tensor, valid: Tensor) -> Tensor:
    """Softmax pooling of `x [c, m, n, D]` by `query [c, 1, D]` over valid places, `[c, m, D]`."""
    logit = (x @ query[..., None]).squeeze(-1) * x.shape[-1] ** -0.5
    weight = logit.masked_fill(~valid[:, None], float("-inf")).softmax(-1)
    return (weight[:, :, None] @ x).squeeze(2)
