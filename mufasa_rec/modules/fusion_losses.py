"""The contrastive losses of the fusion layer: (i) across genres by titles, (ii) with behaviour.

Both are batch statistics: they want the *global* batch, each item once; `fusion_objective` gathers it. That MUFASA
(arXiv 2508.09664) trains with a cross-genre semantic alignment anchored at titles and with an alignment to the
collaborative space is the paper's; the equations are ours and name the published technique that they follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_NORM = 1e-6
# Equal titles are near duplicates whatever the quantile: their cosine lies about 1, rounded to either side.
_EQUAL = 1 - 1e-4


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """Loss (i).

    Attributes:
        temperature: Temperature of the cosines.
        quantile: Titles count as near duplicates from this quantile of the cosines of pairs on.
        threshold: The quantile's value, from `title_threshold` over the catalog. None takes that of each batch's own
            pairs, which stands too high where a sampler fills batches with near duplicates.
    """

    temperature: float = 0.07
    quantile: float = 0.999
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_temperature("semantic", self.temperature)
        if not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"semantic.quantile={self.quantile}: choose 0 to 1; 0.999 is the closest 0.1 % of pairs.")


@dataclass(frozen=True, kw_only=True)
class CollaborativeConfig:
    """Loss (ii).

    Attributes:
        kind: `vectors`: an item's frozen collaborative vector is its positive. `pairs`: the items that were chosen
            together with it are.
        min_events: Training events from which on an item's behaviour is trusted.
        temperature: Temperature of the cosines.
    """

    kind: Literal["vectors", "pairs"] = "vectors"
    min_events: int = 5
    temperature: float = 0.07

    def __post_init__(self) -> None:
        _check_temperature("collaborative", self.temperature)
        if self.kind not in ("vectors", "pairs"):
            raise ValueError(f"collaborative.kind={self.kind!r}: choose 'vectors' or 'pairs'.")
        if self.min_events < 1:
            raise ValueError(f"collaborative.min_events={self.min_events}: choose 1 or more.")


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each row of `x [N, P]` with each of `y [C, P]`, `[N, C]`; 0 with a zero vector."""
    return F.normalize(x, dim=1, eps=_MIN_NORM) @ F.normalize(y, dim=1, eps=_MIN_NORM).T


def off_diagonal(x: Tensor) -> Tensor:
    """The entries of `x [N, N]` without its diagonal, `[N, N - 1]`, `N >= 1`.

    Example:
        >>> off_diagonal(torch.arange(9).view(3, 3)).tolist()
        [[1, 2], [3, 5], [6, 7]]
    """
    n = len(x)
    return x.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def genre_members(genres: Tensor, lengths: Tensor) -> Tensor:
    """Which items have each genre that occurs, `[N, distinct genres]` bool.

    Args:
        genres: Genre ids of all items end to end, `[sum of lengths]`.
        lengths: Genres of each item, `[N]`.

    Returns:
        One column per genre, by ascending id.

    Example:
        >>> genre_members(torch.tensor([7, 2, 7]), torch.tensor([2, 0, 1])).tolist()
        [[True, True], [False, False], [False, True]]
    """
    distinct, column = genres.unique(return_inverse=True)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=len(genres))
    members = torch.zeros(len(lengths), len(distinct), dtype=torch.bool, device=genres.device)
    members[owner, column] = True
    return members


def in_other_genres(members: Tensor) -> Tensor:
    """Pairs of items whose sets of genres are both known and disjoint, `[N, N]` bool, from `members [N, G]`."""
    has = members.float()
    known = members.any(1)
    return (has @ has.T == 0) & known[:, None] & known


def title_threshold(titles: Tensor, quantile: float, max_items: int = 4096) -> float:
    """Cosine above which the closest `1 - quantile` of the pairs of items lie.

    Args:
        titles: Title vectors of the items that have one, `[N, P]`; of the catalog, not of a batch.
        quantile: From 0 to 1, interpolated as by `torch.quantile` (which stops at 16 million values).
        max_items: More items than this are thinned evenly; pairs grow with the square.

    Returns:
        The cosine; infinity for fewer than two items.

    Example:
        >>> title_threshold(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 0.25)
        0.3535...
    """
    if len(titles) > max_items:
        rows = torch.linspace(0, len(titles) - 1, max_items, dtype=torch.float64, device=titles.device)
        titles = titles[rows.round().long()]
    n = len(titles)
    if n < 2:
        return math.inf
    pairs = cosines(titles, titles).detach()[torch.ones(n, n, dtype=torch.bool, device=titles.device).triu(1)]
    place = quantile * (len(pairs) - 1)
    low, high = (pairs.kthvalue(int(k) + 1).values.item() for k in (math.floor(place), math.ceil(place)))
    return low + (high - low) * (place - math.floor(place))


def semantic_loss(
    z: Tensor, anchors: Tensor, titles: Tensor, members: Tensor, config: SemanticConfig
) -> tuple[Tensor, Tensor]:
    """Loss (i): fused vectors find their own title and, across genres, titles that say nearly the same.

    ```
    L = mean_i  -1/|P_i| sum_{p in P_i} log( exp(z_i . a_p / tau) / sum_{j in D_i} exp(z_i . a_j / tau) )
    P_i = i and the near duplicates of i in another genre;   D_i = all items but i's near duplicates of the same genre
    ```
    with `z`, `a` on the sphere, and near duplicates those whose title cosine exceeds the threshold or is 1. An item
    whose genres are not known is of no *other* genre: its near duplicates count neither as positive nor as negative. In
    a batch of one genre each item has its own title for a positive, and no other.

    Ours, after SupCon (arXiv 2004.11362, the sum outside the logarithm) and CLIP (arXiv 2103.00020).

    Args:
        z: Fused vectors of the items that have a title, `[N, E]`; N may be 0.
        anchors: Projections of their titles, `[N, E]`.
        titles: Their title vectors as given, `[N, P]`.
        members: Which of them have each genre, `[N, G]` bool.
        config: The loss.

    Returns:
        The loss, 0 without items, and the number of positives of each item beside its own title, `[N]`.
    """
    threshold = config.threshold
    if threshold is None:
        threshold = title_threshold(titles, config.quantile, max_items=max(len(titles), 1))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    near = (cosines(titles, titles) > min(threshold, _EQUAL)) & ~own
    across = near & in_other_genres(members)
    logits = cosines(z, anchors) / config.temperature
    losses = contrast(logits, own | across, ~near | across)
    return losses.sum() / max(len(z), 1), across.sum(1)


def collaborative_loss(projected: Tensor, vectors: Tensor, config: CollaborativeConfig) -> Tensor:
    """Loss (ii) with vectors: an item's projection and its frozen collaborative vector find each other.

    `L = 1/2 mean_i (-log softmax_j(p_i . e_j / tau)_i  -  log softmax_j(e_i . p_j / tau)_i)`, all on the sphere.
    Ours, the symmetric InfoNCE of CLIP (arXiv 2103.00020), used for items by QARM (arXiv 2411.11739).

    Args:
        projected: Projections of the fused vectors of the items with behaviour enough, `[N, Q]`; N may be 0.
        vectors: Their collaborative vectors, `[N, Q]`.
        config: The loss.

    Returns:
        The loss; 0 without items, and for one alone.
    """
    logits = cosines(projected, vectors) / config.temperature
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    everyone = torch.ones_like(own)
    both = contrast(logits, own, everyone) + contrast(logits.T, own, everyone)
    return both.sum() / (2 * max(len(logits), 1))


def pair_loss(projected: Tensor, together: Tensor, config: CollaborativeConfig) -> Tensor:
    """Loss (ii) with pairs: items that were chosen together find each other.

    As `semantic_loss`, from item to item: `P_i` are the items chosen together with i, `D_i` all items but i. Mean over
    the items that have a positive. Ours, after the contrastive item embeddings of Taobao (arXiv 2407.19467).

    Args:
        projected: Projections of the fused vectors of the items with behaviour enough, `[N, Q]`; N may be 0.
        together: Which pairs were chosen together, `[N, N]` bool, symmetric; the diagonal is not read.
        config: The loss.

    Returns:
        The loss; 0 where no pair is in the batch.
    """
    others = ~torch.eye(len(projected), dtype=torch.bool, device=projected.device)
    positive = together & others
    losses = contrast(cosines(projected, projected) / config.temperature, positive, others)
    return losses.sum() / positive.any(1).sum().clamp(min=1)


def contrast(logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """InfoNCE with several positives per row, averaged outside the logarithm.

    Args:
        logits: Similarities over the temperature, `[N, C]`.
        positive: Which columns are positives of a row, `[N, C]` bool, all of them candidates.
        candidate: Which columns stand in the row's denominator, `[N, C]` bool.

    Returns:
        The loss of each row, `[N]`; 0, with gradient 0, for a row without positives.
    """
    log_share = logits.masked_fill(~candidate, float("-inf")).log_softmax(dim=1)
    return -log_share.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)


def _check_temperature(owner: str, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"{owner}.temperature={temperature}: choose more than 0, such as 0.07.")
