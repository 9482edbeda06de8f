"""DMAE as an interest extractor: interest in a candidate from its content similarities to each past event.

    MIEU (`similarity_encoding`): similarity of candidate and event, per modality, as a vector
    MIFU (`similarity_fusion`): those vectors fused over modalities at each event, and pooled
    MIDU (`similarity_distribution`): in training, the fused interest restores the histogram of the similarities

DMAE (arXiv 2508.14485) has no public code; this follows its abstract and secondary summaries, and each unit says what
is ours. The cost is per candidate and event, and the square of the events in MIFU, so at most `max_events` are read.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mufasa_rec.modules.candidate_pairs import ContentReader, PairGroup, Similarities, plan_pairs
from mufasa_rec.modules.event_embedding import time_bucket
from mufasa_rec.modules.history import Candidates, History, InterestExtractor
from mufasa_rec.modules.similarity_distribution import InterestDecoder
from mufasa_rec.modules.similarity_encoding import ContentEncoding, SimilarityEncoding
from mufasa_rec.modules.similarity_fusion import InterestFusion, MeanFusion

Selection = Literal["newest", "top"]


@dataclass(frozen=True, kw_only=True)
class SimilarityInterestConfig:
    """DMAE.

    Attributes:
        width: Width `D` of the interest vectors.
        num_buckets: Buckets of a similarity in MIEU; with one it enters linearly.
        num_bins: Bins of MIDU's histograms.
        num_time_buckets: Buckets of the time from an event to the request (base-2 seconds), 0 for none; only where the
            data has absolute times.
        num_heads: Attention heads of MIFU; must divide the width.
        dropout: Probability of dropping a channel of a block's output in MIFU.
        max_events: Events of a user that are read for a candidate.
        selection: Which: the ``newest``, or the ``top`` by mean similarity.
        use_mieu: Without, the content itself enters, never compared.
        use_mifu: Without, means over events and modalities are the interest.
        use_midu: Without, nothing has to be restored.
        joint: Two modalities whose joint histogram is restored too, or none.
    """

    width: int = 32
    num_buckets: int = 21
    num_bins: int = 20
    num_time_buckets: int = 32
    num_heads: int = 2
    dropout: float = 0.0
    max_events: int = 200
    selection: Selection = "newest"
    use_mieu: bool = True
    use_mifu: bool = True
    use_midu: bool = True
    joint: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("num_buckets", 1), ("num_bins", 1), ("num_time_buckets", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more.")
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide width={self.width}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: choose at least 0 and below 1.")
        if self.max_events < 1:
            raise ValueError(f"max_events={self.max_events}: choose 1 or more.")
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection={self.selection!r}: choose one of {get_args(Selection)}.")
        if len(self.joint) not in (0, 2) or len(set(self.joint)) != len(self.joint):
            raise ValueError(f"joint={self.joint}: name two modalities, or none.")


class Restored(NamedTuple):
    """What an extractor gives in training.

    Attributes:
        vectors: One per candidate, `[C, output_dim]`.
        loss_sum: Sum of the divergences of this rank's histograms.
        num_histograms: Histograms that are not empty, int64 scalar; the loss is the mean over those of all ranks.
    """

    vectors: Tensor
    loss_sum: Tensor
    num_histograms: Tensor


class RestoringExtractor(InterestExtractor):
    """An extractor with an auxiliary loss on distributions."""

    @abc.abstractmethod
    def restored(self, history: History, candidates: Candidates) -> Restored:
        """As `forward`, with the loss; every parameter is in the graph."""

    @abc.abstractmethod
    def drop_decoder(self) -> None:
        """Remove what only the loss needs, for serving."""

    def encode(self, history: History) -> Tensor:
        """Refuse: an event has no similarity to nothing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("encode: similarities need a candidate; call forward(history, candidates).")


class SimilarityInterestExtractor(RestoringExtractor):
    """DMAE with the interface of `InterestExtractor`; a candidate's vector is `[u ; u_1 ; ... ; u_M]`.

    Args:
        config: Sizes, and which units there are.
        modalities: Width of each modality's vectors; any number, at least one.
        target_width: Width `E` of the candidates' embeddings.

    Raises:
        ValueError: Without modalities, or when `joint` names an unknown one.

    Example:
        >>> config = SimilarityInterestConfig(width=8, num_time_buckets=0)
        >>> extractor = SimilarityInterestExtractor(config, {"title": 3}, target_width=4)
        >>> content, present = {"title": torch.randn(5, 3)}, {"title": torch.ones(5).bool()}
        >>> users, zero = torch.tensor([0, 5, 5]), torch.zeros(2, dtype=torch.int64)
        >>> events = torch.randn(5, 4)
        >>> history = History(embedded=events, offsets=users, start_position=zero, content=content, present=present)
        >>> items = Candidates(embedded=events, offsets=torch.tensor([0, 3, 5]), content=content, present=present)
        >>> extractor(history, items).shape
        torch.Size([5, 16])
    """

    def __init__(self, config: SimilarityInterestConfig, modalities: Mapping[str, int], target_width: int) -> None:
        super().__init__()
        if not modalities:
            raise ValueError("modalities: none; similarity interest needs content vectors, so leave the extractor out.")
        for name in config.joint:
            if name not in modalities:
                raise ValueError(f"joint: {name!r} is no modality of this model; choose from {list(modalities)}.")
        self.config, self.modalities, self.target_width = config, dict(modalities), target_width
        count, width = len(modalities), config.width
        self.output_dim = (1 + count) * width
        self.encoding = _encoding(config, modalities)
        if config.use_mifu:
            self.fusion: nn.Module = InterestFusion(
                count, width, target_width, num_heads=config.num_heads, dropout=config.dropout
            )
        else:
            self.fusion = MeanFusion()
        places = [list(modalities).index(name) for name in config.joint]
        joint = (places[0], places[1]) if places else None
        self.decoder = InterestDecoder(count, width, num_bins=config.num_bins, joint=joint) if config.use_midu else None
        self.empty = nn.Parameter(torch.randn(self.output_dim) * width**-0.5)

    def forward(self, history: History, candidates: Candidates | None = None) -> Tensor:
        """Return one vector per candidate, `[C, output_dim]`; those of users without history get a learned vector.

        Raises:
            ValueError: Without candidates, or when something that the model was built with is missing.
        """
        if candidates is None:
            raise ValueError("candidates=None: similarities need candidates; pass the items that are to be scored.")
        return self._read(history, candidates, restore=False).vectors

    def restored(self, history: History, candidates: Candidates) -> Restored:
        """As `forward`, with MIDU's loss (0 where it is switched off or dropped); see `RestoringExtractor`."""
        found = self._read(history, candidates, restore=True)
        # A batch without a pair leaves modules unread, but data-parallel training wants a gradient for everything.
        touched = torch.stack([p.flatten()[:0].sum() for p in self.parameters()]).sum()
        return found._replace(vectors=found.vectors + touched.to(found.vectors.dtype))

    def drop_decoder(self) -> None:
        """Remove MIDU, for serving; the vectors stay what they are."""
        self.decoder = None

    def _read(self, history: History, candidates: Candidates, *, restore: bool) -> Restored:
        for owner, rows in (("History", history), ("Candidates", candidates)):
            if rows.embedded.shape[1] != self.target_width:
                raise ValueError(f"{owner}.embedded: width {rows.embedded.shape[1]}, expected {self.target_width}.")
        content = ContentReader(history, candidates, self.modalities)
        newest = self.config.max_events if self.config.selection == "newest" else None
        vectors = self.empty.expand(len(candidates.embedded), -1)
        loss, histograms, self.num_places = self.empty[:0].sum(), torch.zeros_like(candidates.offsets[0]), 0
        for group in plan_pairs(history, candidates, max_events=newest):
            similar, events = self._chosen(content.similarities(group), group.pair_events)
            encoded = self._encoded(content, similar, events, self._times(history, candidates, group, events), group)
            self.num_places += group.events.numel()
            fused, per_modality = self.fusion(encoded, similar, candidates.embedded[group.candidates])
            read = torch.cat([fused[:, None], per_modality], dim=1).flatten(1)
            if group.empty is not None:
                read = torch.where(group.empty[:, None], self.empty.to(read.dtype), read)
                similar = replace(similar, has=similar.has & ~group.empty[:, None, None])
            vectors = vectors.index_copy(0, group.candidates, read.to(vectors.dtype))
            if restore and self.decoder is not None:
                more, count = self.decoder(fused, similar)
                loss, histograms = loss + more, histograms + count
        return Restored(vectors, loss, histograms)

    def _chosen(self, similar: Similarities, events: Tensor) -> tuple[Similarities, Tensor]:
        """The pairs that are read, in the order of time: all, or those with the highest mean similarity."""
        most = self.config.max_events
        if self.config.selection == "newest" or events.shape[1] <= most:
            return similar, events
        score = (similar.r.detach() * similar.has).sum(1) / similar.has.sum(1).clamp(min=1)
        score = score.masked_fill(~similar.valid, -1.0)
        newest_first = score.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :most]
        index = (events.shape[1] - 1 - newest_first).sort(dim=1).values
        wide = index[:, None].expand(-1, similar.r.shape[1], -1)
        chosen = Similarities(similar.r.gather(2, wide), similar.has.gather(2, wide), similar.valid.gather(1, index))
        return chosen, events.gather(1, index)

    def _times(self, history: History, candidates: Candidates, group: PairGroup, events: Tensor) -> Tensor | None:
        """Bucket of the time from each event to the request, `[c, n]`."""
        if not self.config.num_time_buckets:
            return None
        clicked, request = history.timestamps_ms, candidates.request_time_ms
        if clicked is None or request is None:
            name = "History.timestamps_ms" if clicked is None else "Candidates.request_time_ms"
            raise ValueError(f"{name}=None: required because the extractor was built with num_time_buckets > 0.")
        return time_bucket(request[group.candidates][:, None] - clicked[events], self.config.num_time_buckets)

    def _encoded(
        self, content: ContentReader, similar: Similarities, events: Tensor, times: Tensor | None, group: PairGroup
    ) -> Tensor:
        if isinstance(self.encoding, SimilarityEncoding):
            return self.encoding(similar, times)
        return self.encoding(content, events, group.candidates, times)


def _encoding(config: SimilarityInterestConfig, modalities: Mapping[str, int]) -> SimilarityEncoding | ContentEncoding:
    times = config.num_time_buckets
    if not config.use_mieu:
        return ContentEncoding(modalities, config.width, num_time_buckets=times)
    return SimilarityEncoding(len(modalities), config.width, num_buckets=config.num_buckets, num_time_buckets=times)
