"""What a model must be told of its data, from an opened data set or from `dataset.json` alone; models made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mufasa_rec.config import RunConfig
from mufasa_rec.data import raw
from mufasa_rec.data.batch import ITEM
from mufasa_rec.data.ranking_batch import USER
from mufasa_rec.data.schema import DatasetManifest, ImpressionsInfo
from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.id_policy import IdPolicyConfig
from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.ranker_build import build_arch
from mufasa_rec.models.ranker_config import RankingFeatures
from mufasa_rec.models.retriever import FUSED, Retriever, RetrieverArch
from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.item_fusion import ItemFusion
from mufasa_rec.modules.item_tower import ItemTower
from mufasa_rec.modules.next_item import Exchange, NextItemObjective
from mufasa_rec.modules.ranking_objective import SumExchange
from mufasa_rec.modules.segmentation import BorderConfig
from mufasa_rec.modules.sparse_arch import ContentTableConfig, SparseArch, TableConfig
from torchx_apps import extractors, id_policies
from torchx_apps.open_dataset import OpenDataset


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a model must be told of its data.

    Attributes:
        rows: Rows of the tables of ids and categoricals, by feature, that of items first.
        contents: Content, and where it lies.
        multi_valued: Item categoricals, and whether they are multi-valued.
        event_categoricals: Categoricals of events.
        num_actions: Action codes, `unknown` included; 0 without actions.
        has_time: Whether events have absolute times.
        num_available: Items that may be negatives.
        ids: How raw ids find their rows, by feature.
    """

    rows: Mapping[str, int]
    contents: tuple[ContentTableConfig, ...]
    multi_valued: Mapping[str, bool]
    event_categoricals: tuple[str, ...]
    num_actions: int
    has_time: bool
    num_available: int
    ids: Mapping[str, IdPolicyConfig]

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's vectors."""
        return {content.modality: content.width for content in self.contents}


def of_data(config: RunConfig, data: OpenDataset) -> ModelFacts:
    """The facts of an opened data set."""
    columns = data.catalog.items.categoricals
    return _facts(
        config,
        data.manifest,
        item_rows=data.catalog.id_keys.size,
        ids=id_policies.policies(config, data.manifest),
        multi_valued={name: column.offsets is not None for name, column in columns.items()},
        cardinality={name: column.cardinality for name, column in columns.items()},
        contents={name: (store.rows, store.width) for name, store in data.catalog.stores.items()},
        num_available=data.catalog.num_available,
    )


def of_manifest(config: RunConfig, manifest: DatasetManifest, item_rows: int | None = None) -> ModelFacts:
    """The facts that `dataset.json` tells, of all items unless `item_rows` says how many have a row of their own."""
    items, ids = manifest.item_categoricals(), id_policies.policies(config, manifest)
    modalities = config.data.modalities if config.data.modalities is not None else tuple(manifest.content)
    for name in modalities:
        if name not in manifest.content:
            raise ValueError(
                f"data.modalities: {name!r} is no content of data set {manifest.name!r}; there are "
                f"{', '.join(manifest.content) or 'none'}."
            )
    if config.uses_content:
        config.content.refuse_unknown(modalities)
    return _facts(
        config,
        manifest,
        item_rows=ids["item"].rows if ids["item"].policy != "vocabulary" else item_rows or manifest.items.count + 1,
        ids=ids,
        multi_valued={name: feature.multi_valued for name, feature in items.items()},
        cardinality={name: feature.cardinality for name, feature in items.items()},
        contents={
            name: (manifest.content[name].rows, manifest.content[name].width)
            for name in (modalities if config.uses_content else ())
        },
        num_available=manifest.items.count,
    )


def _facts(
    config: RunConfig,
    manifest: DatasetManifest,
    *,
    item_rows: int,
    multi_valued: Mapping[str, bool],
    cardinality: Mapping[str, int],
    contents: Mapping[str, tuple[int, int]],
    num_available: int,
    ids: Mapping[str, IdPolicyConfig],
) -> ModelFacts:
    use_categoricals = config.task == "ranking" or config.model.use_categoricals
    rows = {"item": item_rows}
    events = tuple(manifest.event_categoricals()) if use_categoricals else ()
    if use_categoricals:
        rows.update({f"item.{name}": count + 1 for name, count in cardinality.items()})
        rows.update({f"event.{name}": manifest.features[name].cardinality + 1 for name in events})
    return ModelFacts(
        rows=rows,
        contents=tuple(
            ContentTableConfig(
                modality=name,
                num_embeddings=count,
                width=width,
                precision=config.content.precision_of(name),
                placement=config.content.placement_of(name),
            )
            for name, (count, width) in contents.items()
        ),
        multi_valued=dict(multi_valued) if use_categoricals else {},
        event_categoricals=events,
        num_actions=num_actions(manifest),
        has_time=manifest.time.absolute,
        num_available=num_available,
        ids=ids,
    )


def num_actions(manifest: DatasetManifest) -> int:
    """Action codes of the events, `unknown` included; 0 without actions."""
    return max((f.cardinality for f in manifest.features.values() if f.kind == "action"), default=-1) + 1


def make_retriever(
    config: RunConfig,
    facts: ModelFacts,
    borders: BorderConfig,
    exchange: Exchange | None = None,
    fusion: ItemFusion | None = None,
) -> Retriever:
    """The unsharded retriever, tables on `meta`, with fused optimizers attached.

    Args:
        config: The run.
        facts: What the data has.
        borders: Thresholds of the extractor's blocks, found.
        exchange: Reaches the other ranks; None for a world of one.
        fusion: The fusion layer that the retriever holds, with `model.fusion_source`.
    """
    model = config.model
    sparse = make_sparse_arch(config, facts.rows, facts, model.width)
    modalities = facts.widths if fusion is None else {FUSED: fusion.layer.config.width}
    tower = ItemTower(
        modalities, dict(facts.multi_valued), model.width, use_id=model.use_id, id_dropout=model.id_dropout
    )
    embedding = EventEmbedding(
        EventEmbeddingConfig(
            width=model.width,
            content={FUSED: model.width} if modalities else {},
            num_actions=facts.num_actions,
            num_gap_buckets=model.num_gap_buckets if facts.has_time else 0,
            dropout=model.extractor.dropout,
        )
    )
    extractor = extractors.build(config, embedding, borders)
    full = config.data.negatives.is_full(facts.num_available)
    dense = RetrieverArch(
        tower,
        extractor,
        NextItemObjective(model.objective, full=full, exchange=exchange),
        max_history=extractors.max_events(config),
        event_categoricals=facts.event_categoricals,
        raw_content=extractors.raw_content(extractor),
        fusion=fusion,
    )
    return Retriever(sparse, dense)


def make_ranker(
    config: RunConfig,
    features: RankingFeatures,
    rows: Mapping[str, int],
    facts: ModelFacts,
    exchange: SumExchange | None = None,
) -> Ranker:
    """The unsharded ranker, tables on `meta`, with fused optimizers attached.

    Args:
        config: The run.
        features: What the data has.
        rows: Rows of its tables, by feature.
        facts: Content and where it lies, and its id policies.
        exchange: Reaches the other ranks; None for a world of one.
    """
    arch = build_arch(config.ranker, features, exchange)
    return Ranker(make_sparse_arch(config, rows, facts, config.ranker.width, config.ranker.dims), arch)


def ranking_features(facts: ModelFacts, info: ImpressionsInfo, max_history: int) -> RankingFeatures:
    """What a ranker must be told of its data.

    Args:
        facts: What the data has.
        info: What it says of impressions.
        max_history: Most events of a history.
    """
    return RankingFeatures(
        item=facts.multi_valued,
        event=facts.event_categoricals,
        request=(USER,),
        context=tuple(info.context),
        modalities=facts.widths,
        num_dense=len(info.dense),
        tasks=tuple(info.tasks),
        num_actions=facts.num_actions,
        has_time=facts.has_time,
        max_history=max_history,
    )


def ranker_rows(facts: ModelFacts, info: ImpressionsInfo, users: int) -> dict[str, int]:
    """Rows of a ranker's tables by feature; `users` of them for users."""
    context = {raw.CONTEXT_PREFIX + name: size + 1 for name, size in info.context.items()}
    return {**facts.rows, USER: users, **context}


def make_sparse_arch(
    config: RunConfig,
    rows: Mapping[str, int],
    facts: ModelFacts,
    width: int,
    dims: Mapping[str, int] | None = None,
) -> SparseArch:
    """All tables on `meta`, with fused optimizers attached.

    Args:
        config: The run.
        rows: Rows of the tables of ids and categoricals, by feature.
        facts: Content and where it lies, and its id policies.
        width: Width of tables that `dims` does not name.
        dims: Width of single tables.
    """
    settings = config.tables
    settings.refuse_unknown(rows)
    tables = [
        TableConfig(
            name=name,
            num_embeddings=count,
            dim=(dims or {}).get(name),
            weight_dtype=settings.weight_dtype_of(name),
            output_dtype=settings.output_dtype_of(name),
            frozen=settings.is_frozen(name),
            **_lookups(name, facts.ids.get(name)),
        )
        for name, count in rows.items()
    ]
    sparse = SparseArch(tables, width, facts.contents, torch.device("meta"))
    sharding.fuse_optimizer(sparse.trained, config.optimizer.tables, settings)
    sharding.freeze(sparse.untrained)
    return sparse


def _lookups(name: str, policy: IdPolicyConfig | None) -> dict[str, Any]:
    """How a table is looked up: by one key, by several, or by raw ids."""
    if policy is None or policy.policy == "vocabulary":
        return {}
    if policy.policy == "hash":
        return {"salts": policy.salts}
    return {"managed": policy.managed, "drawn": name == ITEM}
