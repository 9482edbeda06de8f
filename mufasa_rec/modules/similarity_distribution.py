"""MIDU, the third unit of DMAE: the fused interest must be able to restore the real distribution of similarities.

    p_m = histogram of the raw r_mj over the user's events, without gradient;   q_m = softmax(decoder_m(u))
    L = mean over (candidate, modality) of KL(p_m | q_m)

The target is never made of the rescaled similarities, whose scale could shrink until there is nothing to restore. The
decoder is used in training only. That the interest is decoded to the real distribution is DMAE's (arXiv 2508.14485);
histograms as that distribution and the divergence are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.candidate_pairs import Similarities


def histograms(r: Tensor, has: Tensor, num_bins: int) -> Tensor:
    """Normalised histograms over the last dimension.

    Args:
        r: Values, `[..., n]`.
        has: Which values count, `[..., n]` bool.
        num_bins: Equal bins over [0, 1]; the last one is closed, and values outside count in the nearest.

    Returns:
        Shares, `[..., num_bins]`, without gradient; zero where no value counts.

    Example:
        >>> histograms(torch.tensor([0.0, 0.5, 1.0, 0.9]), torch.tensor([True, True, True, False]), 2)
        tensor([0.3333, 0.6667])
    """
    counts = counted(bin_of(r, num_bins), has, num_bins).to(_at_least_fp32(r.dtype))
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def joint_histograms(first: Tensor, second: Tensor, has: Tensor, num_bins: int) -> Tensor:
    """Normalised histograms of pairs of values, `[..., num_bins * num_bins]`, the second one's bins fastest."""
    both = bin_of(first, num_bins) * num_bins + bin_of(second, num_bins)
    counts = counted(both, has, num_bins**2).to(_at_least_fp32(first.dtype))
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def bin_of(r: Tensor, num_bins: int) -> Tensor:
    """Bin of each value, int64."""
    return (r.detach() * num_bins).floor().clamp(0, num_bins - 1).to(torch.int64)


def counted(index: Tensor, has: Tensor, size: int) -> Tensor:
    """How often each of `size` indices occurs over the last dimension, `[..., size]` int64.

    Example:
        >>> counted(torch.tensor([0, 2, 2, 2]), torch.tensor([True, True, True, False]), 3).tolist()
        [1, 0, 2]
    """
    ones = has.to(torch.int64)
    return ones.new_zeros(*index.shape[:-1], size).scatter_add(-1, index, ones)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """`KL(target | softmax(logits))` over the last dimension, in fp32 at least; 0 for a target of zeros.

    Example:
        >>> p = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
        >>> bool((divergence(p, p.clamp(min=1e-30).log()).abs() < 1e-6).all())
        True
    """
    logits = logits.to(_at_least_fp32(logits.dtype))
    return F.kl_div(logits.log_softmax(-1), target.to(logits.dtype), reduction="none").sum(-1)


class InterestDecoder(nn.Module):
    """The unit.

    Args:
        num_modalities: Modalities `M`.
        width: Width `D` of the fused interest.
        num_bins: Bins of a modality's histogram.
        joint: Two modalities whose joint histogram is restored too, by place; or None.

    Example:
        >>> decoder = InterestDecoder(1, 8, num_bins=4)
        >>> similar = Similarities(torch.rand(3, 1, 5), torch.ones(3, 1, 5).bool(), torch.ones(3, 5).bool())
        >>> loss, pairs = decoder(torch.randn(3, 8), similar)
        >>> bool(loss > 0), int(pairs)
        (True, 3)
    """

    def __init__(self, num_modalities: int, width: int, *, num_bins: int, joint: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.num_modalities, self.num_bins, self.joint = num_modalities, num_bins, joint
        self.into = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, num_modalities * num_bins)
        self.out_joint = nn.Linear(2 * width, num_bins**2) if joint is not None else None

    def forward(self, u: Tensor, similar: Similarities) -> tuple[Tensor, Tensor]:
        """Compare what can be restored with what was.

        Args:
            u: Fused interest, `[c, D]`.
            similar: Similarities of the pairs.

        Returns:
            Sum of the divergences, and the number of histograms that are not empty (of joint ones too).
        """
        hidden = F.gelu(self.into(u))
        target = histograms(similar.r, similar.has, self.num_bins)
        logits = self.out(hidden).unflatten(-1, (self.num_modalities, self.num_bins))
        total, pairs = _masked_sum(divergence(target, logits), similar.has.any(-1))
        if self.joint is not None and self.out_joint is not None:
            first, second = self.joint
            has = similar.has[:, first] & similar.has[:, second]
            target = joint_histograms(similar.r[:, first], similar.r[:, second], has, self.num_bins)
            more, more_pairs = _masked_sum(divergence(target, self.out_joint(hidden)), has.any(-1))
            total, pairs = total + more, pairs + more_pairs
        return total, pairs


def _masked_sum(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return (values * counts).sum(), counts.sum()
