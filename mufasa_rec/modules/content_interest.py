"""Rivals of DMAE behind the same interface: SimTier's histograms, and one similarity of all modalities together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mufasa_rec.modules.candidate_pairs import ContentReader, check_content, plan_pairs, unit
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.similarity_distribution import bin_of, counted
from mufasa_rec.modules.similarity_interest import (
    Restored,
    RestoringExtractor,
    SimilarityInterestConfig,
    SimilarityInterestExtractor,
)

_TOGETHER = "together"


class SimTierExtractor(InterestExtractor):
    """Histogram counts as vectors: `sum over bins of log(count + 1) E_m[bin]` per modality (arXiv 2407.19467).

    Args:
        modalities: Width of each modality's vectors, at least one.
        width: Width `D` of a modality's vector.
        num_bins: Equal bins of a similarity over [0, 1].
        max_events: Newest events of a user that are counted.

    Example:
        >>> extractor = SimTierExtractor({"title": 3}, width=4, num_bins=20)
        >>> content, present = {"title": torch.randn(5, 3)}, {"title": torch.ones(5).bool()}
        >>> users, zero = torch.tensor([0, 5, 5]), torch.zeros(2, dtype=torch.int64)
        >>> events = torch.zeros(5, 2)
        >>> history = History(embedded=events, offsets=users, start_position=zero, content=content, present=present)
        >>> items = Candidates(embedded=events, offsets=torch.tensor([0, 3, 5]), content=content, present=present)
        >>> extractor(history, items)[3:].abs().sum().item()  # no history, no count
        0.0
    """

    def __init__(self, modalities: Mapping[str, int], *, width: int, num_bins: int, max_events: int = 200) -> None:
        super().__init__()
        if not modalities:
            raise ValueError("modalities: none; SimTier needs content vectors, so leave the extractor out.")
        self.modalities, self.num_bins, self.max_events = dict(modalities), num_bins, max_events
        self.output_dim = len(modalities) * width
        self.tiers = nn.Parameter(torch.randn(len(modalities), num_bins, width) * width**-0.5)

    def encode(self, history: History) -> Tensor:
        """Refuse: an event has no similarity to nothing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("encode: similarities need a candidate; call forward(history, candidates).")

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per candidate, `[C, output_dim]`; zero without an event to compare with.

        Raises:
            ValueError: Without candidates, or when a modality is missing.
        """
        if candidates is None:
            raise ValueError("candidates=None: similarities need candidates; pass the items that are to be scored.")
        content = ContentReader(history, candidates, self.modalities)
        counts = self.tiers.new_zeros(len(candidates.embedded), len(self.modalities), self.num_bins)
        self.num_places = 0
        for group in plan_pairs(history, candidates, max_events=self.max_events):
            similar = content.similarities(group)
            has = similar.has if group.empty is None else similar.has & ~group.empty[:, None, None]
            self.num_places += group.events.numel()
            found = counted(bin_of(similar.r, self.num_bins), has, self.num_bins)
            counts = counts.index_copy(0, group.candidates, found.to(counts.dtype))
        return torch.einsum("cmk,mkd->cmd", counts.log1p(), self.tiers).flatten(1)


class EarlyFusionExtractor(RestoringExtractor):
    """DMAE over one cosine: the modalities' unit vectors end to end are one content, a missing one is zeros in it.

    Args:
        config: Sizes, and which units there are; `joint` is not read.
        modalities: Width of each modality's vectors, at least one.
        target_width: Width `E` of the candidates' embeddings.
    """

    def __init__(self, config: SimilarityInterestConfig, modalities: Mapping[str, int], target_width: int) -> None:
        super().__init__()
        self.modalities = dict(modalities)
        together = {_TOGETHER: sum(modalities.values())} if modalities else {}
        self.interest = SimilarityInterestExtractor(replace(config, joint=()), together, target_width)
        self.output_dim = self.interest.output_dim

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per candidate, `[C, output_dim]`; see `SimilarityInterestExtractor.forward`."""
        if candidates is None:
            return self.interest(history, candidates)
        found = self.interest(*self._joined(history, candidates))
        self.num_places = self.interest.num_places
        return found

    def restored(self, history: History, candidates: Candidates) -> Restored:
        """As `forward`, with the loss; see `SimilarityInterestExtractor.restored`."""
        found = self.interest.restored(*self._joined(history, candidates))
        self.num_places = self.interest.num_places
        return found

    def drop_decoder(self) -> None:
        """Remove MIDU, for serving."""
        self.interest.drop_decoder()

    def _joined(self, history: History, candidates: Candidates) -> tuple[History, Candidates]:
        check_content("History", history, self.modalities)
        check_content("Candidates", candidates, self.modalities)
        events, has = self._together(history.content, history.present)
        targets, target_has = self._together(candidates.content, candidates.present)
        return (
            replace(history, content={_TOGETHER: events}, present={_TOGETHER: has}),
            replace(candidates, content={_TOGETHER: targets}, present={_TOGETHER: target_has}),
        )

    def _together(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        vectors = torch.cat([unit(content[name], present[name]) for name in self.modalities], dim=1)
        return vectors, torch.stack([present[name] for name in self.modalities]).any(0)
