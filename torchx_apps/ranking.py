"""Configs become objects, for ranking: loaders of requests, the sharded ranker, its evaluator, names of its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mufasa_rec.config import RunConfig
from mufasa_rec.data import raw
from mufasa_rec.data.batch import ITEM
from mufasa_rec.data.coding import Vocabulary
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.item_columns import ItemColumn
from mufasa_rec.data.item_lookup import ItemVocabulary
from mufasa_rec.data.parquet import list_row_groups
from mufasa_rec.data.ranking_batch import USER
from mufasa_rec.data.ranking_collate import ShownFeatures
from mufasa_rec.data.ranking_loader import RankingLoader, load_users
from mufasa_rec.data.row_ids import RowIds
from mufasa_rec.data.schema import DatasetManifest, ImpressionsInfo
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.impressions import ImpressionsEvaluator
from mufasa_rec.models.ranker import Ranker
from mufasa_rec.modules.sparse_arch import table_name
from torchx_apps import assembly, id_policies, model_facts


def impressions_of(data: assembly.OpenDataset) -> ImpressionsInfo:
    """What the data set says of its impressions.

    Raises:
        ValueError: When it, or the split that was chosen, has none.
    """
    found = impressions_in(data.manifest)
    if data.ref.rows != "requests":
        raise ValueError(
            f"data.split={data.ref.id!r}: holds next events, not requests; choose data.split: impressions."
        )
    return found


def impressions_in(manifest: DatasetManifest) -> ImpressionsInfo:
    """What `dataset.json` says of impressions.

    Raises:
        ValueError: When it has none.
    """
    if manifest.impressions is None:
        raise ValueError(
            f"task='ranking': data set {manifest.name!r} has no impressions; prepare a source that has some "
            "(`--columns.impressions.source events` takes its events), or choose task: retrieval."
        )
    return manifest.impressions


def features_of(config: RunConfig, data: assembly.OpenDataset) -> ShownFeatures:
    """What candidates come with; with a vocabulary users need as many training impressions as items."""
    keys = id_policies.keys_of(id_policies.policies(config, data.manifest)[USER])
    return ShownFeatures(impressions_of(data), keys or load_users(data.folder, data.split, config.data.min_count))


def alignment(config: RunConfig) -> int:
    """Events of a block that histories are cut at; 1 where they may begin anywhere."""
    ranker = config.ranker
    pattern = ranker.sal.pattern
    if "sal" not in ranker.content_interest or ranker.attention == "full" or pattern.segmentation != "fixed":
        return 1
    return pattern.resolve(config.data.max_history).selection_block


def make_loader(config: RunConfig, data: assembly.OpenDataset, part: str, env: DistributedEnv) -> RankingLoader:
    """The loader of one part; the training part is shuffled and may drop negatives, the others do neither."""
    columns = [*(["action"] if data.has("action") else []), *(["timestamp"] if data.has_time else [])]
    training = part == "train"
    loader = RankingLoader(
        list_row_groups(data.folder, data.manifest, data.ref, part),
        data.catalog,
        features_of(config, data),
        config.data if training else replace(config.data, requests=replace(config.data.requests, negative_rate=1.0)),
        columns=(*columns, *data.manifest.event_categoricals()),
        training=training,
        align=alignment(config),
        rank=env.rank,
        world_size=env.world_size,
        seed=config.seed,
    )
    loader.pin_memory = env.device.type == "cuda"
    return loader


def table_rows(config: RunConfig, data: assembly.OpenDataset) -> dict[str, int]:
    """Rows of every trained table, by feature."""
    shown = features_of(config, data)
    return model_facts.ranker_rows(model_facts.of_data(config, data), shown.info, shown.users.size)


def build_ranker(config: RunConfig, data: assembly.OpenDataset, exchange: RankExchange) -> Ranker:
    """The unsharded ranker, tables on `meta`, with fused optimizers attached."""
    torch.manual_seed(config.seed)
    facts = model_facts.of_data(config, data)
    features = model_facts.ranking_features(
        facts, impressions_of(data), config.data.max_history + alignment(config) - 1
    )
    return model_facts.make_ranker(config, features, table_rows(config, data), facts, exchange)


def shard_ranker(config: RunConfig, data: assembly.OpenDataset, ranker: Ranker, device: torch.device) -> nn.Module:
    """Shard the ranker, draw its tables' weights, and read the content shard by shard."""
    return assembly.shard_model(config, data, ranker, config.ranker.init_std, device)


def make_evaluator(
    config: RunConfig, data: assembly.OpenDataset, part: str, env: DistributedEnv, exchange: RankExchange
) -> ImpressionsEvaluator:
    """The evaluator of one part of the split."""
    loader = make_loader(config, data, part, env)
    return ImpressionsEvaluator(loader, impressions_of(data).tasks, has_content(data), exchange, env.device)


def has_content(data: assembly.OpenDataset) -> dict[str, ItemColumn]:
    """Whether each item has a modality, for all of the data set's, those that the model does not use included."""
    ids = np.asarray(data.catalog.items.ids)
    stores = {
        name: ContentStore.open(data.folder, name, ref.generation, checksum=ref.checksum)
        for name, ref in data.manifest.content.items()
    }
    return {name: ItemColumn(ids, lambda ids, store=store: store.rows_of(ids) >= 0) for name, store in stores.items()}


def row_ids(config: RunConfig, data: assembly.OpenDataset) -> dict[str, RowIds]:
    """What the rows of every trained table stand for, by feature, where that is known beforehand."""
    ids = {ITEM: data.catalog.id_keys, USER: features_of(config, data).users}
    found = {name: RowIds(table_name(name), keys.ids) for name, keys in ids.items() if isinstance(keys, ItemVocabulary)}
    for name in table_rows(config, data).keys() - ids.keys():
        feature = name if name.startswith(raw.CONTEXT_PREFIX) else name.split(".", 1)[1]
        found[name] = RowIds.of_values(table_name(name), Vocabulary.load(data.folder, feature).values)
    return dict(sorted(found.items()))
