"""Where the blocks of a history end: after a number of events, at long pauses, or where the content turns.

The thresholds are the same for every history: given, or a quantile of the training events', found once per run by
whoever knows the data. Never from the history itself, whose later events would move the borders of earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mufasa_rec.modules.history import History
from mufasa_rec.ops.jagged import sequence_ids
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.segments import coherence_borders, timegap_borders


@dataclass(frozen=True, kw_only=True)
class BorderConfig:
    """Thresholds of the segmentations `timegap` and `coherence`.

    Attributes:
        gap_seconds: A longer pause is a border of `timegap`; None for the quantile below.
        gap_quantile: Share of the training events' pauses that are no border.
        cosine: A lower cosine between the contents of consecutive events is a border of `coherence`; None for the
            quantile below.
        cosine_quantile: Share of the training events' cosines that are borders.
        modality: Content that `coherence` compares; None for the first modality that is used, by name.
    """

    gap_seconds: float | None = None
    gap_quantile: float = 0.9
    cosine: float | None = None
    cosine_quantile: float = 0.1
    modality: str | None = None

    def __post_init__(self) -> None:
        for name in ("gap_quantile", "cosine_quantile"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: choose above 0 and below 1.")
        if self.gap_seconds is not None and self.gap_seconds < 0:
            raise ValueError(f"gap_seconds={self.gap_seconds}: choose 0 or more, or None for the quantile.")
        if self.cosine is not None and not -1.0 <= self.cosine <= 1.0:
            raise ValueError(f"cosine={self.cosine}: choose -1 to 1, or None for the quantile.")

    def check(self, pattern: SparsePattern) -> None:
        """Refuse a segmentation whose threshold is still to be found.

        Raises:
            ValueError: Names the field.
        """
        needed = {"timegap": ("gap_seconds",), "coherence": ("cosine", "modality")}.get(pattern.segmentation, ())
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}=None: segmentation={pattern.segmentation!r} needs it; give a value, such as the quantile "
                    "of the training events."
                )


def borders_of(history: History, pattern: SparsePattern, config: BorderConfig) -> Tensor | None:
    """Find where blocks begin; reads the values of the history's times or contents.

    Args:
        history: The events.
        pattern: The segmentation and the bounds of a block.
        config: Thresholds, found.

    Returns:
        Whether a block begins at each event, `[L]` bool on the CPU; None for fixed blocks.

    Raises:
        ValueError: When the history lacks times or the content that borders are found by.
    """
    sizes = {"shortest": pattern.shortest_block, "longest": pattern.block}
    if pattern.segmentation == "timegap":
        if history.timestamps_ms is None:
            raise ValueError("History.timestamps_ms=None: required because segmentation='timegap'; or choose 'fixed'.")
        assert config.gap_seconds is not None, "BorderConfig.check"
        gap_ms = round(config.gap_seconds * 1000)
        return timegap_borders(history.offsets, history.timestamps_ms, gap_ms=gap_ms, **sizes)
    if pattern.segmentation == "coherence":
        name = config.modality
        assert name is not None and config.cosine is not None, "BorderConfig.check"
        if name not in history.content:
            raise ValueError(
                f"History.content[{name!r}]: missing, but segmentation='coherence' compares it; there are "
                f"{list(history.content)}."
            )
        vectors = _latest_present(history.content[name], history.present[name], history.offsets)
        return coherence_borders(history.offsets, vectors, cosine=config.cosine, **sizes)
    return None


def _latest_present(vectors: Tensor, present: Tensor, offsets: Tensor) -> Tensor:
    """Vectors `[L, P]` in which a missing one repeats the last that its sequence had; zeros before the first."""
    if not len(vectors):
        return vectors
    events = torch.arange(len(vectors), device=vectors.device)
    begin = offsets[:-1][sequence_ids(offsets, len(vectors))]
    latest = torch.maximum(torch.where(present, events, 0).cummax(0).values, begin)
    return vectors.masked_fill(~present[:, None], 0.0).index_select(0, latest)
