"""The Multimodal Fusion Layer (MFL): one vector per item from its title, its other modalities and its genres.

```
a   = projection of the title                        (learned `no_title` where it is missing)
h^k = projection of modality k
U   = {a + type_title} + {h^k + type_k + genre, for each modality k that the item has}
f   = LN(a + CrossAttention(query = a, keys = values = U))
z   = LN(f + FFN(f))
```

That the title anchors the fusion is the paper's (MUFASA, arXiv 2508.09664, read as abstract and secondary summaries;
it has no public code). The equations above, the type and genre embeddings and the dropout of modalities are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mufasa_rec.modules.mlp import GatedBlock
from mufasa_rec.modules.modalities import ModalityProjections
from mufasa_rec.ops import host_reads

# Below the content: layer normalisation would otherwise make all items look alike at the start.
_INIT_STD = 0.02
_MIN_NORM = 1e-6


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """The layer.

    Attributes:
        width: Width `E` of the fused vectors.
        num_heads: Attention heads.
        hidden: Width inside the feed-forward block; None for twice `width`.
        dropout: Probability of dropping a channel of the attention's and the feed-forward block's result.
        anchor: The modality that all others are read from.
        modality_dropout: Probability of hiding one of an item's other modalities in training.
        anchor_dropout: Probability of hiding its title in training. Only this teaches `no_title` where every item of
            the training set has a title.
        unit_inputs: Whether content vectors are brought to the length `sqrt(P)` first, so that encoders of different
            scale start equal. The length then says nothing.
    """

    width: int = 64
    num_heads: int = 4
    hidden: int | None = None
    dropout: float = 0.0
    anchor: str = "title"
    modality_dropout: float = 0.1
    anchor_dropout: float = 0.0
    unit_inputs: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"fusion.{name}={value}: choose 1 or more.")
        if self.width % self.num_heads:
            raise ValueError(f"fusion.num_heads={self.num_heads}: must divide fusion.width={self.width}.")
        for name in ("dropout", "modality_dropout", "anchor_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"fusion.{name}={getattr(self, name)}: choose at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class ItemContent:
    """What is known of a batch of items before anybody clicked them.

    Attributes:
        content: Content vectors by modality, each `[N, P]`; where an item lacks one the numbers are never read.
        present: Which items have the modality, `[N]` bool; the only way to say "missing".
        genres: Genre ids of all items end to end, `[sum of genre_lengths]` int64.
        genre_lengths: Genres of each item, `[N]` int64; an item may have none.

    Raises:
        ValueError: For a field whose shape or dtype does not fit the others.
    """

    content: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    genres: Tensor
    genre_lengths: Tensor

    def __post_init__(self) -> None:
        rows = len(self.genre_lengths)
        for name, vectors in self.content.items():
            if vectors.dim() != 2 or len(vectors) != rows:
                raise ValueError(f"content[{name!r}]: shape {tuple(vectors.shape)}, expected ({rows}, width).")
            if name not in self.present:
                raise ValueError(f"present[{name!r}]: missing; it alone says who has the modality. Pass ones for all.")
            has = self.present[name]
            if has.dtype != torch.bool or has.shape != (rows,):
                raise ValueError(f"present[{name!r}]: {has.dtype} of {tuple(has.shape)}, expected bool of ({rows},).")
        for name in ("genres", "genre_lengths"):
            ids = getattr(self, name)
            if ids.dtype != torch.int64 or ids.dim() != 1:
                raise ValueError(f"{name}: {ids.dtype} of shape {tuple(ids.shape)}, expected int64 of one dimension.")


@dataclass(frozen=True)
class Fused:
    """Fused items.

    Attributes:
        z: Fused vectors, not of unit length, `[N, E]`.
        projected: Projections `a` and `h^k` by modality, each `[N, E]`, zero where it is missing. Dropout does not
            reach them: the losses compare with what an item has, not with what the layer was shown.
    """

    z: Tensor
    projected: dict[str, Tensor]


class FusionLayer(nn.Module):
    """See the module docstring.

    Args:
        config: The layer.
        modalities: Width `P` of each modality's vectors, the anchor among them.
        num_genres: Genre ids; 0 for items without genres.

    Raises:
        ValueError: Without the anchor.

    Example:
        >>> layer = FusionLayer(FusionConfig(width=8), {"title": 3, "image": 2}, num_genres=5).eval()
        >>> items = ItemContent(
        ...     content={"title": torch.randn(2, 3), "image": torch.full((2, 2), float("nan"))},
        ...     present={"title": torch.tensor([True, True]), "image": torch.tensor([False, False])},
        ...     genres=torch.tensor([4, 1, 0]),
        ...     genre_lengths=torch.tensor([2, 1]),
        ... )
        >>> fused = layer(items)
        >>> fused.z.shape, bool(fused.z.isfinite().all())
        (torch.Size([2, 8]), True)
    """

    def __init__(self, config: FusionConfig, modalities: Mapping[str, int], num_genres: int) -> None:
        super().__init__()
        if config.anchor not in modalities:
            raise ValueError(
                f"fusion.anchor={config.anchor!r}: not among the modalities {sorted(modalities)}; choose one of them."
            )
        width = config.width
        self.config, self.num_genres = config, num_genres
        # Sorted, so that the rows of `types` mean the same in whatever order a data set lists its modalities.
        self.others = sorted(set(modalities) - {config.anchor})
        self.projections = _Projections({name: modalities[name] for name in (config.anchor, *self.others)}, width)
        self.types = nn.Parameter(torch.randn(1 + len(self.others), width) * _INIT_STD)
        self.no_title = nn.Parameter(torch.randn(width) * _INIT_STD)
        self.genres = nn.Parameter(torch.randn(num_genres, width) * _INIT_STD) if num_genres else None
        self.attention = _AnchorAttention(config)
        self.feed_forward = GatedBlock(width, config.hidden or 2 * width, config.dropout)
        self.attention_norm, self.output_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's vectors, the anchor first."""
        return self.projections.widths

    def forward(self, items: ItemContent) -> Fused:
        """Fuse the modalities of each item.

        Args:
            items: The items.

        Returns:
            Their fused vectors and projections. An item with nothing at all has the vector of `no_title`.

        Raises:
            ValueError: When a modality that the layer was built with is missing or of another width, or (on a CPU) a
                genre id is unknown to it.
        """
        projected = self.projections.each(items, unit=self.config.unit_inputs)
        seen = self._seen(torch.stack([items.present[name] for name in self.widths], dim=1))
        anchor = torch.where(seen[:, :1], projected[self.config.anchor], self.no_title)
        tokens = torch.stack([anchor, *(projected[name] for name in self.others)], dim=1)  # [N, M, E]
        tokens += self.types  # in place, as a pass over the tokens costs as much as a third of their product
        if self.genres is not None and self.others:
            tokens[:, 1:] += self._genre(items, self.genres)[:, None]
        readable = torch.cat([torch.ones_like(seen[:, :1]), seen[:, 1:]], dim=1)
        f = self.attention_norm(anchor + self.attention(anchor, tokens, readable))
        z = self.output_norm(f + self.feed_forward(f))
        if self.genres is not None:
            z = z + self.genres[:0].sum()  # in the graph also where the title is the only modality
        return Fused(z, projected)

    def _seen(self, present: Tensor) -> Tensor:
        """Which modalities the layer is shown, `[N, M]`, the anchor first: in training some are hidden."""
        chance = present.new_full((present.shape[1],), self.config.modality_dropout, dtype=torch.float32)
        chance[0] = self.config.anchor_dropout
        if not self.training or not bool(self.config.modality_dropout or self.config.anchor_dropout):
            return present
        return present & (torch.rand(present.shape, device=present.device) >= chance)

    def _genre(self, items: ItemContent, table: Tensor) -> Tensor:
        """Mean of the embeddings of each item's genres, `[N, E]`; zero without any."""
        ids, lengths = items.genres, items.genre_lengths
        if host_reads.free(ids) and not torch.compiler.is_compiling():
            if len(ids) and int(ids.max()) >= self.num_genres:
                raise ValueError(f"genres: id {int(ids.max())}, but the layer has num_genres={self.num_genres}.")
            if int(lengths.sum()) != len(ids):
                raise ValueError(f"genre_lengths: {int(lengths.sum())} in sum, but genres holds {len(ids)} ids.")
        return F.embedding_bag(ids, table, lengths.cumsum(0) - lengths, mode="mean")


class _Projections(ModalityProjections):
    """The projections one by one instead of their sum."""

    def each(self, items: ItemContent, *, unit: bool) -> dict[str, Tensor]:
        """Project each modality, `[N, E]`; zero where it is missing."""
        projected = {}
        for name, key in self._keys.items():
            self._check(name, items.content, items.present)
            layer, missing = self[key], ~items.present[name][:, None]
            assert isinstance(layer, nn.Linear)
            vectors = items.content[name].to(layer.weight.dtype)
            if torch.is_grad_enabled():  # the weight's gradient reads them; without one the mask below is enough
                vectors = vectors.masked_fill(missing, 0.0)
            if unit:  # after the product, where it costs E channels instead of P
                norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
                scale = self.widths[name] ** 0.5 / norm.clamp(min=_MIN_NORM)
                h = torch.addcmul(layer.bias, F.linear(vectors, layer.weight), scale)
            else:
                h = F.linear(vectors, layer.weight, layer.bias)
            projected[name] = h.masked_fill_(missing, 0.0)
        return projected


class _AnchorAttention(nn.Module):
    """Multi-head attention with one query per item.

    Written out, because a kernel that is made for long sequences spends its time on calling one tiny product per item.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query: Tensor, tokens: Tensor, readable: Tensor) -> Tensor:
        """Read `tokens [N, M, E]` where `readable [N, M]`, for `query [N, E]`."""
        heads = (self.num_heads, query.shape[1] // self.num_heads)
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        scores = (self.query(query)[:, None] * key).unflatten(-1, heads).sum(-1) * heads[1] ** -0.5  # [N, M, H]
        weights = scores.masked_fill(~readable[..., None], float("-inf")).softmax(dim=1)
        read = (weights[..., None] * value.unflatten(-1, heads)).sum(1).flatten(1)
        return self.dropout(self.out(read))
