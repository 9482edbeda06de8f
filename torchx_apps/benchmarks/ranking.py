"""Ranking: requests with eight candidates against the same impressions one by one; DMAE beside its rivals.

Checked first: both give the same logits. User-side work is what a batch costs without any candidate: lookups of the
history's items, its embedding, its content, and what an extractor reads of it before a candidate comes. It is counted,
so it does not depend on the machine. Each distinct item of a batch is looked up once in both, and counts in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.ranker_config import ContentInterest, RankerConfig, RankingFeatures
from mufasa_rec.modules.similarity_interest import SimilarityInterestConfig
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured
from torchx_apps.benchmarks._operations import operations
from torchx_apps.benchmarks._requests import Requests, make_requests, one_by_one, ranker_of, ranking_features

_CANDIDATES = 8
_COMPARED: tuple[ContentInterest, ...] = ("none", "dmae", "dmae+sal")
_ALONE: tuple[ContentInterest, ...] = ("simtier", "early_fusion", "sal")


def run(settings: Settings) -> Iterator[Measured]:
    """Count, then measure training steps."""
    torch.set_num_threads(1)
    requests, events, items = (4, 10, 40) if settings.small else (32, 100, 1000)
    lengths = torch.randint(events // 2, events * 3 // 2, (requests,), generator=torch.Generator().manual_seed(0))
    features = ranking_features({"title": 64, "image": 32}, max_history=events * 2)
    many = make_requests(lengths.tolist(), [_CANDIDATES] * requests, features, num_items=items)
    copies = one_by_one(many)
    nobody, nobodies = _without_candidates(many), _without_candidates(copies)
    shape = {
        "requests": requests,
        "candidates": _CANDIDATES * requests,
        "events": int(lengths.sum()),
        "items": items,
        "width": 32,
    }
    for interest in _COMPARED:
        model = _model(interest, features, items)
        _check_equal(model, many, copies)
        one, other = (_operations(model, batch) for batch in (nobody, nobodies))
        yield measured(f"{interest}: user-side operations, requests", "million", [one / 1e6], shape)
        yield measured(f"{interest}: user-side operations, one by one", "million", [other / 1e6])
        yield measured(f"{interest}: user-side operations saved", "x", [other / one])
        whole, wholes = (_operations(model, batch) for batch in (many, copies))
        yield measured(f"{interest}: all operations saved", "x", [wholes / whole])
        yield from _rates(model, interest, many, copies, settings.rounds)
    for interest in _ALONE:
        model = _model(interest, features, items)
        _check_equal(model, many, copies)
        yield next(_rates(model, interest, many, copies, settings.rounds))


def _model(interest: ContentInterest, features: RankingFeatures, items: int) -> Ranker:
    torch.manual_seed(0)
    config = RankerConfig(
        content_interest=interest,
        dmae=SimilarityInterestConfig(width=32),
        sal=SparseAttentionConfig(dropout=0.0),
    )
    return ranker_of(config, features, items)


def _check_equal(model: Ranker, many: Requests, copies: Requests) -> None:
    one, other = (model.eval()(batch)[1].logits for batch in (many, copies))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def _operations(model: Ranker, batch: Requests) -> int:
    """Operations of an evaluation step."""
    model.eval()
    return operations(lambda: model(batch))


def _rates(model: Ranker, interest: str, many: Requests, copies: Requests, rounds: int) -> Iterator[Measured]:
    """Impressions per second of forward and backward."""
    model.train()

    def step(batch: Requests) -> None:
        model.zero_grad()
        model(batch)[0].backward()

    seconds = in_turn({"many": lambda: step(many), "copies": lambda: step(copies)}, rounds)
    count = len(many.candidate_item)
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
