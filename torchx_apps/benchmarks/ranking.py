"""Ranking: requests with eight candidates against the same impressions one by one; DMAE beside its rivals.

Checked first: both give the same logits. User-side work is what a batch costs without any candidate: lookups of the
history's items, its embedding, its content, and what an extractor reads of it before a candidate comes. It is counted,
so it does not depend on the machine. Each distinct item of a batch is looked up once in both, and counts in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.ranker_config import ContentInterest, RankerConfig, RankingFeatures
from mufasa_rec.modules.similarity_interest import SimilarityInterestConfig
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured
from torchx_apps.benchmarks._operations import operations
from torchx_apps.benchmarks._requests import Requests, make_requests, one_by_one, ranker_of, ranking_features

_CANDIDATES = 8
_COUNTED: tuple[ContentInterest, ...] = ("none", "dmae", "dmae+sal")


@dataclass(frozen=True)
class _Trial:
    """The same impressions twice, and the same histories without any."""

    features: RankingFeatures
    items: int
    many: Requests
    copies: Requests

    @property
    def shape(self) -> dict[str, int]:
        """Sizes for a reader of the numbers."""
        asked, events = len(self.many.candidate_item), len(self.many.event_item)
        requests = len(self.many.start_position)
        return {"requests": requests, "candidates": asked, "events": events, "items": self.items, "width": 32}

    def model(self, interest: ContentInterest) -> Ranker:
        """A ranker that has been seen to give the same logits for both."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"dmae": SimilarityInterestConfig(width=32), "sal": SparseAttentionConfig(dropout=0.0)}
        model = ranker_of(RankerConfig(content_interest=interest, **sizes), self.features, self.items).eval()
        one, other = (model(batch)[1].logits for batch in (self.many, self.copies))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        return model


def run(settings: Settings) -> Iterator[Measured]:
    """Count, then measure training steps."""
    torch.set_num_threads(1)
    yield from counted(settings)
    trial = _trial(settings)
    for interest in get_args(ContentInterest):
        yield from _rates(interest, trial, settings.rounds)


def counted(settings: Settings) -> Iterator[Measured]:
    """Operations of evaluation steps."""
    trial = _trial(settings)
    empty = [_without_candidates(batch) for batch in (trial.many, trial.copies)]
    for interest in _COUNTED:
        model = trial.model(interest)
        one, other = (_operations(model, batch) for batch in empty)
        yield measured(f"{interest}: user-side operations, requests", "million", [one / 1e6], trial.shape)
        yield measured(f"{interest}: user-side operations, one by one", "million", [other / 1e6])
        yield measured(f"{interest}: user-side operations saved", "x", [other / one])
        whole, wholes = (_operations(model, batch) for batch in (trial.many, trial.copies))
        yield measured(f"{interest}: all operations saved", "x", [wholes / whole])


def _trial(settings: Settings) -> _Trial:
    requests, events, items = (4, 10, 40) if settings.small else (32, 100, 1000)
    lengths = torch.randint(events // 2, events * 3 // 2, (requests,), generator=torch.Generator().manual_seed(0))
    features = ranking_features({"title": 64, "image": 32}, max_history=events * 2)
    many = make_requests(lengths.tolist(), [_CANDIDATES] * requests, features, num_items=items)
    return _Trial(features, items, many, one_by_one(many))


def _operations(model: Ranker, batch: Requests) -> int:
    """Operations of an evaluation step."""
    model.eval()
    return operations(lambda: model(batch))


def _rates(interest: ContentInterest, trial: _Trial, rounds: int) -> Iterator[Measured]:
    """Impressions per second of forward and backward."""
    model = trial.model(interest).train()

    def step(batch: Requests) -> None:
        model.zero_grad()
        model(batch)[0].backward()

    seconds = in_turn({"many": lambda: step(trial.many), "copies": lambda: step(trial.copies)}, rounds)
    count = len(trial.many.candidate_item)
    for name, how in (("many", "requests"), ("copies", "one by one")):
        yield measured(f"{interest}: training, {how}", "samples/s", [count / s for s in seconds[name]])
    ratio = [b / a for a, b in zip(seconds["many"], seconds["copies"], strict=True)]
    yield measured(f"{interest}: training, requests over one by one", "x the speed", ratio)


def _without_candidates(batch: Requests) -> Requests:
    """The same histories, and nothing to score."""
    none = slice(0, 0)
    assert batch.request_time_ms is not None
    return replace(
        batch,
        ids={**batch.ids, "context.hour": batch.ids["context.hour"][none]},
        candidate_item=batch.candidate_item[none],
        candidate_offsets=torch.zeros_like(batch.candidate_offsets),
        request_time_ms=batch.request_time_ms[none],
        dense=batch.dense[none],
        labels=batch.labels[none],
        weight=batch.weight[none],
        logit_offset=batch.logit_offset[none],
    )
