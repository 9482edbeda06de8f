"""Configs become objects: the data set, the sharded retriever, loaders and evaluators of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.types import ShardingPlan

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.item_lookup import ItemLookup, ItemVocabulary, split_of
from mufasa_rec.data.loader import Loader
from mufasa_rec.data.negatives import NegativeSampler
from mufasa_rec.data.parquet import list_row_groups
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.managed_collision import start_rows_like
from mufasa_rec.evaluation.retrieval import Evaluator, RetrieverScorer
from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.retriever import Retriever
from mufasa_rec.modules.content_codes import pack
from mufasa_rec.modules.item_fusion import ItemFusion
from mufasa_rec.modules.segmentation import BorderConfig
from mufasa_rec.modules.sparse_arch import table_name
from mufasa_rec.planning import plan_file
from mufasa_rec.planning.start_table import start_table
from mufasa_rec.training.fusion_file import TrainedLayer
from torchx_apps import extractors, id_policies, model_facts
from torchx_apps.open_dataset import OpenDataset

logger = logging.getLogger(__name__)


def open_dataset(config: RunConfig, vocabulary: ItemVocabulary | None = None) -> OpenDataset:
    """Open the data set of a run.

    Raises:
        ValueError: When it is not there or not complete, or the vocabulary belongs to another split.
    """
    folder = config.data.dataset
    if not folder:
        raise ValueError("data.dataset: missing; give the folder that `prepare` wrote, as `--data.dataset FOLDER`.")
    manifest = DatasetManifest.load(folder)
    ref, split = split_of(manifest, folder, config.data.split)
    modalities = config.data.modalities if config.uses_content else ()
    if config.uses_content:
        config.content.refuse_unknown(manifest.content if modalities is None else modalities)
    catalog = ItemLookup(
        folder,
        manifest,
        split,
        modalities=modalities,
        min_count=config.data.min_count,
        vocabulary=vocabulary,
        carried=config.content.on_host(manifest.content),
        id_keys=id_policies.keys_of(id_policies.policies(config, manifest)["item"]),
    )
    return OpenDataset(folder, manifest, ref, split, catalog)


def event_columns(config: RunConfig, data: OpenDataset) -> tuple[str, ...]:
    """List columns that the model reads beside `item`."""
    columns = [name for name in ("action", "weight") if data.has(name)]
    if data.has_time and (config.model.num_gap_buckets or extractors.reads_times(config.model)):
        columns.append("timestamp")
    if config.model.use_categoricals:
        columns.extend(data.manifest.event_categoricals())
    return tuple(columns)


def make_loader(config: RunConfig, data: OpenDataset, part: str, env: DistributedEnv) -> Loader:
    """The loader of one part of the split; the training part draws negatives, the others do not."""
    if data.ref.rows == "requests":
        raise ValueError(
            f"data.split={data.ref.id!r}: holds requests, not next events; choose another, or task: ranking."
        )
    groups = list_row_groups(data.folder, data.manifest, data.ref, part)
    sampler = None
    actions = None
    data_config = config.data
    if part == "train":
        info = data.split.parts[part]
        targets = min(info.targets / max(info.rows, 1), config.data.max_history)
        sampler = NegativeSampler(
            config.data.negatives,
            data.catalog.available,
            data.catalog.counts,
            targets,
            config.seed,
        )
        if config.data.target_actions is not None:
            actions = _action_codes(data, config.data.target_actions)
    else:  # evaluation has no backward: larger batches, and all of them fit the ranks
        data_config = replace(config.data, batch_size=config.data.num_readers * 8)
    loader = Loader(
        groups,
        data.catalog,
        data_config,
        columns=event_columns(config, data),
        rank=env.rank,
        world_size=env.world_size,
        seed=config.seed,
        sampler=sampler,
        target_actions=actions,
        align=extractors.alignment(config),
    )
    loader.pin_memory = env.device.type == "cuda"
    return loader


def _action_codes(data: OpenDataset, names: tuple[str, ...]) -> np.ndarray:
    """Codes of actions by name."""
    if not data.has("action"):
        raise ValueError(f"data.target_actions={names}: data set {data.manifest.name!r} has no actions; leave it out.")
    with paths.open_file(paths.join(data.folder, "vocabularies", "action.json")) as file:
        values = [str(value) for value in json.load(file)["values"]]
    for name in names:
        if name not in values:
            raise ValueError(
                f"data.target_actions: {name!r} is no action of {data.manifest.name!r}; there are {values}."
            )
    return np.array([values.index(name) + 1 for name in names], dtype=np.int64)


def build_retriever(
    config: RunConfig, data: OpenDataset, exchange: RankExchange, layer: TrainedLayer | None = None
) -> Retriever:
    """The unsharded retriever, tables on `meta`, with fused optimizers attached.

    Args:
        config: The run.
        data: The data set.
        exchange: Reaches the other ranks.
        layer: The fusion layer that the retriever holds, with `model.fusion_source`.
    """
    facts, borders = model_facts.of_data(config, data), _thresholds(config, data)
    fusion = None if layer is None else ItemFusion(layer.build(), layer.genre, tune=config.model.finetune_fusion)
    torch.manual_seed(config.seed)  # after the layer, so that all else starts alike with it and without
    return model_facts.make_retriever(config, facts, borders, exchange, fusion)


def _thresholds(config: RunConfig, data: OpenDataset) -> BorderConfig:
    """Thresholds of blocks by pauses or content, found in the training split where the configuration gives none."""
    borders = config.model.extractor.borders
    if config.model.attention == "full":
        return borders
    extractors.check_data(config.model, data.manifest, list(data.catalog.stores))
    groups = list_row_groups(data.folder, data.manifest, data.ref, "train")
    return extractors.find_thresholds(config.model, groups, data.catalog)


def content_tables(data: OpenDataset) -> tuple[str, ...]:
    """Names of the frozen content tables."""
    return tuple(table_name(f"content.{name}") for name in data.catalog.stores)


def content_readers(config: RunConfig, data: OpenDataset) -> dict[str, Callable[[int, int], torch.Tensor]]:
    """What reads the rows of each frozen content table, in the table's form."""
    found = {}
    for name, store in data.catalog.stores.items():
        if config.content.placement_of(name) == "sharded":
            coded = config.content.precision_of(name) == "int8"
            found[table_name(f"content.{name}")] = partial(_read_coded, store) if coded else store.read
    return found


def _read_coded(store: ContentStore, start: int, stop: int) -> torch.Tensor:
    """Rows of a store as codes."""
    return pack(store.read(start, stop))


def shard_retriever(config: RunConfig, data: OpenDataset, retriever: Retriever, device: torch.device) -> nn.Module:
    """Shard the retriever, draw its tables' weights, and read the content shard by shard."""
    return shard_model(config, data, retriever, config.model.init_std, device)


def plan_of(config: RunConfig, model: Retriever | Ranker, device: torch.device) -> ShardingPlan:
    """The plan of a run's tables: the saved one that it names, or TorchRec's; collective."""
    if config.sharding.plan:
        return plan_file.load_plan(config.sharding.plan, model, device.type, config.sharding, dist.get_world_size())
    return sharding.make_plan(model, device, config.sharding, config.tables)


def shard_model(
    config: RunConfig,
    data: OpenDataset,
    model: Retriever | Ranker,
    init_std: float,
    device: torch.device,
    plan: ShardingPlan | None = None,
) -> nn.Module:
    """Shard a model by its plan, draw its tables' weights, and read the content shard by shard."""
    plan = plan or plan_of(config, model, device)
    drawn = model.sparse.drawn_tables
    if dist.get_rank() == 0:
        for line in start_table(model, plan):
            logger.info("%s", line)
    sharded = sharding.shard(model, plan, device, config.sharding)
    sharding.initialise_tables(sharded, dict.fromkeys(drawn, init_std), config.seed)
    start_rows_like(sharded, dict.fromkeys(drawn, init_std), config.seed)
    sharding.load_rows(sharded, content_readers(config, data))
    return sharded


def make_evaluator(
    config: RunConfig, data: OpenDataset, part: str, env: DistributedEnv, exchange: RankExchange
) -> Evaluator:
    """The evaluator of one part of the split."""
    masked = data.manifest.mask_seen_default if config.mask_seen is None else config.mask_seen
    loader = make_loader(config, data, part, env)
    return Evaluator(loader, data.catalog, exchange, env.device, mask_seen=masked)


def make_scorer(
    config: RunConfig, data: OpenDataset, model: nn.Module, env: DistributedEnv, exchange: RankExchange
) -> RetrieverScorer:
    """The scorer of a sharded retriever."""
    return RetrieverScorer(model, data.catalog, exchange, env.device, columns=event_columns(config, data))


def load_vocabulary(run: str) -> ItemVocabulary:
    """The vocabulary of an existing run."""
    return ItemVocabulary.load(run)
