"""A trained fusion layer inside a model that recommends: a batch's items are fused where they are read.

So the layer can be tuned for what it is used for. A frozen one gives what the content store of its run holds, to the
rounding of the store.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mufasa_rec.modules.fusion import FusionLayer, ItemContent
from mufasa_rec.ops import host_reads


class ItemFusion(nn.Module):
    """See the module docstring.

    Args:
        layer: The layer, trained.
        genre: The item categorical that is its genre; None for a layer without genres.
        tune: Whether its weights are trained on. A frozen one drops nothing out either.

    Example:
        >>> from mufasa_rec.modules.fusion import FusionConfig
        >>> fusion = ItemFusion(FusionLayer(FusionConfig(width=8), {"title": 3}, 0), None, tune=False)
        >>> looked_up = {"content.title": torch.randn(2, 3)}
        >>> z, has = fusion(looked_up, {"title": torch.tensor([True, False])}, None, None)
        >>> z.shape, has.tolist(), z.requires_grad
        (torch.Size([2, 8]), [True, False], False)
    """

    def __init__(self, layer: FusionLayer, genre: str | None, *, tune: bool) -> None:
        super().__init__()
        self.layer, self.genre, self.tune = layer, genre, tune
        layer.requires_grad_(tune)
        self.train(self.training)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's vectors."""
        return self.layer.widths

    def train(self, mode: bool = True) -> ItemFusion:
        """Enter training or evaluation mode, a frozen layer always the latter."""
        super().train(mode)
        self.layer.train(mode and self.tune)
        return self

    def forward(
        self,
        looked_up: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        genres: Tensor | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the modalities of a batch's items.

        Args:
            looked_up: Content vectors by feature `content.<modality>`, each `[U, P]`.
            present: Which items have each modality, `[U]` bool.
            genres: Genre codes of all items end to end, 0 for a missing one; None for a layer without genres.
            counts: Codes of each item, `[U]`; None for one code each.

        Returns:
            Fused vectors `[U, E]`, and which items have any content, `[U]` bool.
        """
        names = list(self.widths)
        rows = len(present[names[0]])
        codes, lengths = _without_missing(genres, counts, rows, present[names[0]].device)
        items = ItemContent(
            content={name: looked_up[f"content.{name}"] for name in names},
            present={name: present[name] for name in names},
            genres=codes,
            genre_lengths=lengths,
        )
        return self.layer(items).z, torch.stack([present[name] for name in names]).any(0)


def _without_missing(
    genres: Tensor | None, counts: Tensor | None, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Codes end to end without the code 0 of a missing one, and their number, `[rows]`; both int64."""
    none = torch.zeros(rows, dtype=torch.int64, device=device)
    if genres is None:
        return none[:0], none
    owner = torch.arange(rows, device=device)
    if counts is not None:
        owner = torch.repeat_interleave(owner, counts, output_size=len(genres))
    known = genres > 0
    with host_reads.argued("the fusion layer reads lists of known genres only, as it was trained; once a batch"):
        return genres[known].long(), none.index_add(0, owner, known.long())
