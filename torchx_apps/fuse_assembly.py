"""A fusion run's configuration becomes objects: the catalog, what is learned of behaviour, the layer, its batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mufasa_rec.data import collaborative, paths
from mufasa_rec.data.collaborative import CollaborativeVectors
from mufasa_rec.data.content_manifest import ContentManifest, generation_folder
from mufasa_rec.data.cooccurrence import count_pairs
from mufasa_rec.data.item_lookup import ItemLookup, split_of
from mufasa_rec.data.item_sampler import ItemSampler, genre_weights
from mufasa_rec.data.items import Categorical
from mufasa_rec.data.parquet import list_row_groups
from mufasa_rec.data.schema import DatasetManifest, SplitManifest
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.gradients import average_in_rank_order
from mufasa_rec.models.fuser import Fuser
from mufasa_rec.modules.fusion import FusionLayer
from mufasa_rec.modules.fusion_losses import title_threshold
from mufasa_rec.modules.fusion_objective import FusionObjective
from mufasa_rec.training.fusion_feed import RankFeed, hold_out
from mufasa_rec.training.fusion_items import FusionItems, mine_neighbours, titles_of
from mufasa_rec.training.table_sources import open_source
from torchx_apps import tables
from torchx_apps.assembly import OpenDataset
from torchx_apps.fuse_config import GENRES, FuseConfig

logger = logging.getLogger(__name__)
PAIRS_FILE, VECTORS_FILE = "pairs.safetensors", "collaborative.safetensors"
VECTOR_FILES = (".npy", ".npz", ".parquet", ".safetensors")


def open_dataset(config: FuseConfig) -> OpenDataset:
    """Open the data set with the modalities that are fused.

    Raises:
        ValueError: When it is not there, lacks a modality or the title, or a modality was learned on another split.
    """
    if not config.dataset:
        raise ValueError("dataset: missing; give the folder that `prepare` wrote, as `--dataset FOLDER`.")
    manifest = DatasetManifest.load(config.dataset)
    ref, split = split_of(manifest, config.dataset, config.split)
    catalog = ItemLookup(config.dataset, manifest, split, modalities=_modalities(config, manifest, split))
    return OpenDataset(config.dataset, manifest, ref, split, catalog)


def _modalities(config: FuseConfig, manifest: DatasetManifest, split: SplitManifest) -> tuple[str, ...]:
    learned = {}
    for name, ref in manifest.content.items():
        learned[name] = ContentManifest.load(generation_folder(config.dataset, name, ref.generation)).split
    chosen = config.modalities
    if chosen is None:
        chosen = tuple(name for name in manifest.content if learned[name] is None and name != config.output)
    if config.layer.anchor not in chosen:
        raise ValueError(
            f"layer.anchor={config.layer.anchor!r}: not among the modalities {sorted(chosen)} of {manifest.name!r}; "
            "name the modality of titles, or prepare the data set with it."
        )
    for name in chosen:
        found = learned.get(name)
        if found is not None and found != split_facts(split):
            raise ValueError(
                f"modalities: {name!r} was learned on split {found['id']}@{found['hash']}, but this run uses "
                f"{split.id}@{split.hash}; leave it out, or learn it on this split."
            )
    return chosen


def split_facts(split: SplitManifest) -> dict[str, str]:
    """Id and hash of a split, as content manifests carry them."""
    return {"id": split.id, "hash": split.hash}


def genre_name(config: FuseConfig, data: OpenDataset) -> str | None:
    """The categorical of items that is their genre, None for no genres.

    Raises:
        ValueError: When it is not there, or cannot be told from the others.
    """
    there = list(data.catalog.items.categoricals)
    if config.genre == "none" or (config.genre is None and not there):
        logger.warning("no genres: loss (i) has no positives across genres, and batches are not balanced")
        return None
    if config.genre is not None and config.genre in there:
        return config.genre
    found = next((name for name in GENRES if config.genre is None and name in there), None)
    if found is None:
        raise ValueError(f"genre={config.genre!r}: items have the categoricals {there}; give one of them, or 'none'.")
    return found


def genres_of(config: FuseConfig, data: OpenDataset) -> Categorical | None:
    """Genres of all items."""
    name = genre_name(config, data)
    return None if name is None else data.catalog.items.categoricals[name]


def forget_behaviour(folder: Path) -> None:
    """Remove what an attempt left that never became a run; it may have had other settings."""
    for file in (PAIRS_FILE, VECTORS_FILE):
        paths.remove_file(folder / file)


def learn_behaviour(
    config: FuseConfig, data: OpenDataset, folder: Path, exchange: RankExchange
) -> tuple[CollaborativeVectors | None, np.ndarray | None]:
    """Collaborative vectors or pairs of the training split, made once and kept in the run folder; collective.

    Raises:
        ValueError: When they cannot be had, or what is there is of another split.
    """
    if not config.objective.collaborative_weight:
        return None, None
    if config.objective.collaborative.kind == "pairs":
        file = folder / PAIRS_FILE
        _made_once(file, exchange, lambda: _save_pairs(config, data, file))
        return None, on_all_ranks(exchange, lambda: load_file(file)["code"])
    file = folder / VECTORS_FILE
    source = config.behaviour.source
    if source == "cooccurrence":
        _made_once(file, exchange, lambda: _factorised(config, data).save(file))
    elif PurePosixPath(source).suffix.lower() in VECTOR_FILES:
        _made_once(file, exchange, lambda: _given(config, data).save(file))
    else:
        learned = _from_run(source, data, exchange)
        _made_once(file, exchange, lambda: learned.save(file))
    vectors = on_all_ranks(exchange, lambda: CollaborativeVectors.load(file))
    collaborative.refuse_other_split(file, vectors.split, data.catalog.split)
    return vectors, None


def _made_once(file: Path, exchange: RankExchange, make: Callable[[], None]) -> None:
    """Have rank 0 make a file that is not there."""
    on_all_ranks(exchange, lambda: make() if exchange.rank == 0 and not file.exists() else None)


def _factorised(config: FuseConfig, data: OpenDataset) -> CollaborativeVectors:
    catalog, groups = data.catalog, list_row_groups(data.folder, data.manifest, data.ref, "train")
    pairs = count_pairs(groups, catalog, config.behaviour.window)
    ids = np.asarray(catalog.items.ids)
    return collaborative.factorise(pairs, ids, catalog.counts, catalog.split, config.behaviour, config.seed)


def _save_pairs(config: FuseConfig, data: OpenDataset, file: Path) -> None:
    groups = list_row_groups(data.folder, data.manifest, data.ref, "train")
    codes = collaborative.closest(count_pairs(groups, data.catalog, config.behaviour.window), config.behaviour)
    with paths.atomic_write(file) as path:
        save_file({"code": codes}, path, metadata={"format_version": "1", "split": data.catalog.split})


def _given(config: FuseConfig, data: OpenDataset) -> CollaborativeVectors:
    catalog, wanted = data.catalog, config.behaviour
    ids = np.asarray(catalog.items.ids)
    return collaborative.read_given(wanted.source, wanted.split, catalog.split, ids, catalog.counts)


def _from_run(source: str, data: OpenDataset, exchange: RankExchange) -> CollaborativeVectors:
    """The id table of a retriever's run or export; items that share the row of rare ones are left out."""
    location = on_all_ranks(exchange, lambda: tables.checkpoints_of(source))
    opened = open_source(source, exchange, checkpoints=location)
    said = opened.about.get("split")
    collaborative.refuse_other_split(source, str(said), data.catalog.split)

    def read() -> CollaborativeVectors:
        ids = opened.ids("item")
        if ids is None:
            raise ValueError(f"behaviour.source={source}: its id table does not say its ids; give a run or an export.")
        rows = data.catalog.items.rows_of(ids.ids)
        known = np.flatnonzero(rows >= 0)
        vectors = opened.rows("item").read(known + 1).float().numpy()
        events = data.catalog.counts[rows[known]].astype(np.int64)
        return CollaborativeVectors(ids.ids[known], vectors, events, data.catalog.split)

    return on_all_ranks(exchange, read)


def make_feed(config: FuseConfig, items: FusionItems, env: DistributedEnv) -> tuple[RankFeed, float]:
    """Batches of this rank, and the cosine from which on titles are near duplicates."""
    trainer, anchor = config.trainer, config.layer.anchor
    rows = items.has_content()
    trained, held = hold_out(rows, np.asarray(items.catalog.items.ids)[rows], trainer.holdout, config.seed)
    titled, titles = titles_of(items, trained, anchor, trainer.max_mined)
    threshold = config.objective.semantic.threshold
    if threshold is None:
        threshold = title_threshold(titles, config.objective.semantic.quantile)
    mined = mine_neighbours(items, titled, titles, threshold)
    sampler = ItemSampler(trained, genre_weights(items.genres, trained), mined, trainer.batch_size, config.seed)
    if env.is_main:
        logger.info(
            "%d items, %d held out; titles are near from cosine %.4f on: %d pairs across genres",
            len(rows), len(held), threshold, len(mined),
        )  # fmt: skip
    return RankFeed(items, sampler, held, env.rank, env.world_size), threshold


def build_fuser(config: FuseConfig, items: FusionItems, threshold: float, exchange: RankExchange) -> Fuser:
    """The layer and its objective, the same on all ranks."""
    torch.manual_seed(config.seed)
    widths = {name: store.width for name, store in items.catalog.stores.items()}
    layer = FusionLayer(config.layer, widths, 0 if items.genres is None else items.genres.cardinality + 1)
    objective = replace(config.objective, semantic=replace(config.objective.semantic, threshold=threshold))
    width = None if items.vectors is None else items.vectors.vectors.shape[1]
    return Fuser(layer, FusionObjective(objective, layer, collaborative_width=width, exchange=exchange)).to(
        items.device
    )


def wrap(module: Fuser, env: DistributedEnv) -> nn.Module:
    """The module with gradients averaged over ranks."""
    if env.world_size == 1:
        return module
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)
    if env.device.type == "cpu" and env.world_size > 2:
        average_in_rank_order(wrapped)
    return wrapped
