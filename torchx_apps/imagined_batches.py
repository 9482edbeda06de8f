"""A run on a catalog that is only described: the model as it would be, and batches of the shape that it would read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mufasa_rec.config import RunConfig
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.collate import keyed_jagged
from mufasa_rec.data.ranking_batch import RankingBatch
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.retriever import Retriever
from mufasa_rec.modules.segmentation import BorderConfig
from torchx_apps import extractors, model_facts, ranking
from torchx_apps.model_facts import ModelFacts

MAX_ROWS = 1_000_000  # of a table: the examination is of the model, not of the memory of a cluster


@dataclass(frozen=True)
class _Shape:
    """Sizes of one rank's share of a step."""

    rows: int
    longest: int
    items: int
    candidates: int


def imagine(
    config: RunConfig, manifest: DatasetManifest, env: DistributedEnv, exchange: RankExchange
) -> tuple[Retriever | Ranker, list[Any], str]:
    """Build the model of a described catalog, and draw two batches.

    Args:
        config: The run.
        manifest: The catalog.
        env: This process among its peers.
        exchange: Reaches the other ranks.

    Returns:
        The unsharded model, two batches of this rank, and what was changed for the examination.
    """
    facts, note = _cut(model_facts.of_manifest(config, manifest))
    torch.manual_seed(config.seed)
    rng = np.random.default_rng((config.seed, env.rank))
    rows = max(math.ceil(config.data.batch_size / env.world_size), 1)
    if config.task == "ranking":
        info = ranking.impressions_in(manifest)
        longest = config.data.max_history + ranking.alignment(config) - 1
        tables = model_facts.ranker_rows(facts, info, min(info.users + 1, MAX_ROWS))
        features = model_facts.ranking_features(facts, info, longest)
        ranker = model_facts.make_ranker(config, features, tables, facts, exchange)
        shown = rows * max(round(info.impressions / max(info.requests, 1)), 1)
        shape = _Shape(rows, longest, min(rows * longest, facts.num_available), shown)
        return ranker, [_ranking_batch(rng, shape, tables, facts) for _ in range(2)], note
    borders = _borders(config, facts)
    retriever = model_facts.make_retriever(config, facts, borders, exchange)
    negatives = config.data.negatives
    longest = extractors.max_events(config)
    if negatives.is_full(facts.num_available):
        first, last = (facts.num_available * r // env.world_size for r in (env.rank, env.rank + 1))
        shape = _Shape(rows, longest, facts.num_available, last - first)
        return retriever, [_batch(rng, shape, facts, (first, last)) for _ in range(2)], note
    candidates = math.ceil((negatives.num_uniform + negatives.num_inbatch) / env.world_size)
    shape = _Shape(rows, longest, min(rows * longest + candidates, facts.num_available), candidates)
    return retriever, [_batch(rng, shape, facts, None) for _ in range(2)], note


def _cut(facts: ModelFacts) -> tuple[ModelFacts, str]:
    """Tables of at most `MAX_ROWS` rows, and a sentence about it."""
    rows = {name: min(count, MAX_ROWS) for name, count in facts.rows.items()}
    contents = tuple(replace(c, num_embeddings=min(c.num_embeddings, MAX_ROWS)) for c in facts.contents)
    cut = replace(facts, rows=rows, contents=contents)
    if cut == facts:
        return facts, ""
    return cut, f"tables are cut to {MAX_ROWS:,} rows here; `plan` has the memory of the whole ones"


def _borders(config: RunConfig, facts: ModelFacts) -> BorderConfig:
    """Thresholds that the data would give, had it been prepared."""
    borders = config.model.extractor.borders
    return replace(
        borders,
        gap_seconds=3600.0 if borders.gap_seconds is None else borders.gap_seconds,
        cosine=0.0 if borders.cosine is None else borders.cosine,
        modality=borders.modality or min(facts.widths, default=None),
    )


def _batch(rng: np.random.Generator, shape: _Shape, facts: ModelFacts, part: tuple[int, int] | None) -> Batch:
    """A batch of the retriever; `part` are the candidates of this rank when the whole catalog is scored."""
    offsets = _offsets(rng, shape)
    events = int(offsets[-1])
    ids, present, counts = _item_features(rng, shape, facts)
    ids |= {f"event.{name}": _ids(rng, facts.rows[f"event.{name}"], events) for name in facts.event_categoricals}
    chosen = _ids(rng, shape.items, shape.candidates) if part is None else np.arange(*part)
    return Batch(
        features=keyed_jagged(ids),
        item_row=torch.arange(shape.items),
        event_item=_tensor(_ids(rng, shape.items, events)),
        next_item=_tensor(_ids(rng, shape.items, events)),
        target_weight=torch.ones(events),
        offsets=_tensor(offsets),
        start_position=torch.zeros(shape.rows, dtype=torch.int64),
        candidate_item=_tensor(chosen),
        candidate_bias=torch.zeros(len(chosen)),
        user=torch.arange(shape.rows),
        target_row=_tensor(_ids(rng, shape.items, shape.rows)),
        seen_row=torch.zeros(0, dtype=torch.int64),
        seen_offsets=torch.zeros(shape.rows + 1, dtype=torch.int64),
        present=present,
        category_lengths=counts,
        num_targets=events,
        num_rows=shape.rows,
        **_times(rng, facts, events),
    )


def _ranking_batch(
    rng: np.random.Generator, shape: _Shape, tables: Mapping[str, int], facts: ModelFacts
) -> RankingBatch:
    """A batch of the ranker, with as many candidates for each request."""
    offsets, number = _offsets(rng, shape), shape.candidates
    events = int(offsets[-1])
    ids, present, counts = _item_features(rng, shape, facts)
    ids |= {f"event.{name}": _ids(rng, facts.rows[f"event.{name}"], events) for name in facts.event_categoricals}
    ids["user"] = _ids(rng, tables["user"], shape.rows)
    none = torch.zeros(number, dtype=torch.int64)
    return RankingBatch(
        features=keyed_jagged(ids),
        item_row=torch.arange(shape.items),
        event_item=_tensor(_ids(rng, shape.items, events)),
        offsets=_tensor(offsets),
        start_position=torch.zeros(shape.rows, dtype=torch.int64),
        candidate_item=_tensor(_ids(rng, shape.items, number)),
        candidate_offsets=torch.arange(0, number + 1, number // shape.rows),
        dense=torch.zeros(number, 0),
        labels=_tensor(_ids(rng, 2, number)).float()[:, None],
        weight=torch.ones(number),
        logit_offset=torch.zeros(number),
        user=torch.arange(shape.rows),
        request=torch.arange(shape.rows),
        impression=torch.arange(number),
        item_count=none,
        history_length=_tensor(np.diff(offsets)),
        request_time_ms=none + 10**12,
        present=present,
        category_lengths=counts,
        num_targets=number,
        num_rows=shape.rows,
        **_times(rng, facts, events),
    )


def _item_features(
    rng: np.random.Generator, shape: _Shape, facts: ModelFacts
) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Ids, presence and numbers of values of the batch's items, as `collate` gives them."""
    ids = {"item": _ids(rng, facts.rows["item"], shape.items)}
    counts = {}
    for name, multi_valued in facts.multi_valued.items():
        size = rng.integers(0, 4, shape.items) if multi_valued else np.ones(shape.items, np.int64)
        ids[f"item.{name}"] = _ids(rng, facts.rows[f"item.{name}"], int(size.sum()))
        if multi_valued:
            counts[name] = _tensor(size)
    for content in facts.contents:
        ids[f"content.{content.modality}"] = _ids(rng, content.num_embeddings, shape.items)
    present = {content.modality: _tensor(rng.random(shape.items) < 0.9) for content in facts.contents}
    return ids, present, counts


def _times(rng: np.random.Generator, facts: ModelFacts, events: int) -> dict[str, Any]:
    steps = rng.integers(0, 10**7, events).cumsum()
    actions = _tensor(_ids(rng, facts.num_actions, events)) if facts.num_actions else None
    return {"timestamps_ms": _tensor(steps) if facts.has_time else None, "actions": actions}


def _offsets(rng: np.random.Generator, shape: _Shape) -> np.ndarray:
    """Histories of all lengths up to the longest, `[B + 1]`."""
    lengths = rng.integers(1, shape.longest + 1, shape.rows)
    lengths[0] = shape.longest
    return np.r_[0, lengths.cumsum()]


def _ids(rng: np.random.Generator, below: int, number: int) -> np.ndarray:
    return rng.integers(0, max(below, 1), number)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)
