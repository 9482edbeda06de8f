"""The interest extractor of a run: which one, how long its histories are, where they may begin, where blocks end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from mufasa_rec.config import RunConfig
from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.parquet import RowGroupRef
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.data.transitions import cosine_quantile, gap_quantile
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.modules.event_embedding import EventEmbedding
from mufasa_rec.modules.full_attention import FullAttentionExtractor
from mufasa_rec.modules.history import InterestExtractor
from mufasa_rec.modules.interest import SparseInterestExtractor
from mufasa_rec.modules.segmentation import BorderConfig

logger = logging.getLogger(__name__)


def alignment(config: RunConfig) -> int:
    """Events of a block that histories are cut at; 1 where they may begin anywhere.

    Blocks of a fixed length are counted from a user's first event, so a cut at whole blocks leaves those that an uncut
    history would have. Blocks by pauses or content are counted from the first event that is kept.
    """
    pattern = config.model.extractor.pattern
    if config.model.attention == "full" or pattern.segmentation != "fixed":
        return 1
    return pattern.resolve(config.data.max_history).selection_block


def max_events(config: RunConfig) -> int:
    """Most events of a history: `data.max_history` and the rest of a block."""
    return config.data.max_history + alignment(config) - 1


def reads_times(model: RetrieverConfig) -> bool:
    """Whether the extractor needs the events' times, beside the time gaps that an event is made of."""
    return model.attention == "sparse" and model.extractor.pattern.segmentation == "timegap"


def check_data(model: RetrieverConfig, manifest: DatasetManifest, modalities: Sequence[str]) -> None:
    """Refuse a segmentation that a data set has nothing for.

    Args:
        model: The retriever.
        manifest: The data set.
        modalities: Content that is used.

    Raises:
        ValueError: Names the field, the data set, and what it lacks.
    """
    if model.attention == "full":
        return
    segmentation, borders = model.extractor.pattern.segmentation, model.extractor.borders
    name = f"model.extractor.pattern.segmentation={segmentation!r}"
    if segmentation == "timegap" and not manifest.time.absolute:
        raise ValueError(f"{name}: data set {manifest.name!r} has no absolute times; choose 'fixed'.")
    if segmentation == "coherence" and not modalities:
        raise ValueError(f"{name}: data set {manifest.name!r} has no content that is used; choose 'fixed'.")
    if segmentation == "coherence" and borders.modality not in (None, *modalities):
        raise ValueError(f"model.extractor.borders.modality={borders.modality!r}: choose one of {list(modalities)}.")


def find_thresholds(model: RetrieverConfig, groups: Sequence[RowGroupRef], catalog: ItemLookup) -> BorderConfig:
    """Thresholds of the segmentation, those that are not given from the training split.

    Args:
        model: The retriever.
        groups: Row groups of the training part.
        catalog: Items of the data set.

    Returns:
        Thresholds without a gap, for the segmentation that is used.
    """
    segmentation, borders = model.extractor.pattern.segmentation, model.extractor.borders
    if segmentation == "timegap" and borders.gap_seconds is None:
        borders = replace(borders, gap_seconds=gap_quantile(groups, borders.gap_quantile))
        logger.info("blocks end at pauses above %.0f s", borders.gap_seconds)
    if segmentation == "coherence":
        borders = replace(borders, modality=borders.modality or min(catalog.stores))
        if borders.cosine is None:
            found = cosine_quantile(groups, catalog, str(borders.modality), borders.cosine_quantile)
            borders = replace(borders, cosine=max(-1.0, min(1.0, found)))
            logger.info("blocks end where the cosine of %s falls below %.3f", borders.modality, found)
    return borders


def build(config: RunConfig, embedding: EventEmbedding, borders: BorderConfig) -> InterestExtractor:
    """The extractor that `model.attention` names.

    Args:
        config: The run.
        embedding: What an event is made of.
        borders: Thresholds of the segmentation, found.
    """
    model = config.model
    if model.attention == "full":
        return FullAttentionExtractor(model.extractor, embedding, max_events(config))
    # Blocks are resolved from the same number as the loader's alignment, which the rest of a block does not change.
    return SparseInterestExtractor(replace(model.extractor, borders=borders), embedding, config.data.max_history)


def raw_content(extractor: InterestExtractor) -> tuple[str, ...]:
    """Modalities that the extractor reads as they are stored."""
    if not isinstance(extractor, SparseInterestExtractor) or extractor.pattern.segmentation != "coherence":
        return ()
    return (str(extractor.config.borders.modality),)
