"""Puts a ranker's data-parallel part together from its configuration and what the data has."""

from __future__ import annotations

from dataclasses import replace

from mufasa_rec.models.ranker import RankerArch
from mufasa_rec.models.ranker_config import RankerConfig, RankingFeatures
from mufasa_rec.modules.content_interest import EarlyFusionExtractor, SimTierExtractor
from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.full_attention import FullAttentionExtractor
from mufasa_rec.modules.history import InterestExtractor
from mufasa_rec.modules.interest import SparseInterestExtractor
from mufasa_rec.modules.over_arch import OverArch
from mufasa_rec.modules.ranking_objective import RankingObjective, SumExchange
from mufasa_rec.modules.similarity_interest import SimilarityInterestExtractor
from mufasa_rec.modules.target_attention import TargetAttentionExtractor


def build_arch(config: RankerConfig, features: RankingFeatures, exchange: SumExchange | None = None) -> RankerArch:
    """The data-parallel part of a ranker.

    Args:
        config: The ranker.
        features: What the data has.
        exchange: Reaches the other ranks; None for a world of one.

    Raises:
        ValueError: When content is to be read and there is none, or a weight is given for an unknown task.

    Example:
        >>> features = RankingFeatures(request=("user",), modalities={"title": 8}, tasks=("click", "like"))
        >>> sorted(build_arch(RankerConfig(), features).extractors)
        ['dmae', 'ids']
    """
    for task in config.task_weights:
        if task not in features.tasks:
            raise ValueError(f"ranker.task_weights: {task!r} is no task of the data; it has {list(features.tasks)}.")
    context = [f"context.{name}" for name in features.context]
    for name in config.dims:
        if name not in (*features.request, *context):
            raise ValueError(
                f"ranker.dims: {name!r} is no feature of requests or context, whose tables alone may differ in width; "
                f"there are {[*features.request, *context]}."
            )
    extractors: dict[str, InterestExtractor] = {}
    if config.use_id_interest:
        extractors["ids"] = TargetAttentionExtractor(config.width)
    if config.content_interest != "none":
        if not features.modalities:
            raise ValueError(
                f"ranker.content_interest={config.content_interest!r}: the data has no content that is used; choose "
                "'none', or give modalities."
            )
        for name in config.content_interest.split("+"):
            extractors[name] = _extractor(name, config, features)
    candidate = config.width + sum(config.dims.get(name, config.width) for name in context) + features.num_dense
    over_arch = OverArch(
        sum(config.dims.get(name, config.width) for name in features.request),
        candidate + sum(extractor.output_dim for extractor in extractors.values()),
        hidden=config.hidden,
        num_tasks=len(features.tasks),
        dropout=config.dropout,
    )
    objective = RankingObjective(
        [config.task_weights.get(task, 1.0) for task in features.tasks],
        distribution_weight=config.distribution_weight,
        exchange=exchange,
    )
    return RankerArch(extractors, over_arch, objective, features, config.width)


def _extractor(name: str, config: RankerConfig, features: RankingFeatures) -> InterestExtractor:
    modalities = features.modalities
    dmae = config.dmae if features.has_time else replace(config.dmae, num_time_buckets=0)
    if name == "dmae":
        return SimilarityInterestExtractor(dmae, modalities, config.width)
    if name == "early_fusion":
        return EarlyFusionExtractor(dmae, modalities, config.width)
    if name == "simtier":
        return SimTierExtractor(modalities, width=dmae.width, num_bins=dmae.num_bins, max_events=dmae.max_events)
    embedding = EventEmbedding(
        EventEmbeddingConfig(
            width=config.width,
            content=dict(modalities),
            num_actions=features.num_actions,
            num_gap_buckets=config.num_gap_buckets if features.has_time else 0,
            dropout=config.sal.dropout,
        )
    )
    if config.attention == "sparse":
        return SparseInterestExtractor(config.sal, embedding, features.max_history)
    return FullAttentionExtractor(config.sal, embedding, features.max_history)
