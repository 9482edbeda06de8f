"""The fusion layer that a retriever holds (`model.fusion_source`): where it is from, and whether it fits the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.fusion_file import LAYER_FILE, TrainedLayer
from torchx_apps.assembly import OpenDataset
from torchx_apps.run_folder import dataset_facts

# The layer as the run began with it; what it has become is in the run's checkpoints.
START_FILE = "fusion_start.safetensors"


def open_layer(config: RunConfig, folder: Path, exchange: RankExchange) -> TrainedLayer | None:
    """The layer of a run: the one that it began with, for a new run that of its source; collective.

    Returns:
        None for a run without one.

    Raises:
        ValueError: When there is none where it should be; on all ranks alike.
    """
    source = config.model.fusion_source
    if not source:
        return None
    own = folder / START_FILE
    return on_all_ranks(exchange, lambda: TrainedLayer.load(own if own.exists() else paths.join(source, LAYER_FILE)))


def of_run(config: RunConfig, run: paths.Location) -> TrainedLayer | None:
    """The layer that a run began with; its checkpoints hold the weights that it has now. None for a run without one."""
    return TrainedLayer.load(paths.join(run, START_FILE)) if config.model.fusion_source else None


def check(config: RunConfig, layer: TrainedLayer, data: OpenDataset) -> None:
    """Refuse a layer that was trained on other data than the run reads.

    Raises:
        ValueError: For another split, other modalities, generations or widths, or other genres; names both sides.
    """
    where, split = f"model.fusion_source={config.model.fusion_source!r}", data.catalog.split
    if layer.dataset.get("split") != split:
        raise ValueError(
            f"{where}: trained on split {layer.dataset.get('split')}, but this run uses {split}: it may have seen "
            "events that the run is evaluated on; fuse on this split."
        )
    stores = data.catalog.stores
    if sorted(layer.widths) != sorted(stores):
        raise ValueError(
            f"data.modalities={sorted(stores)}: the layer of {where} fuses {sorted(layer.widths)}; leave "
            "data.modalities out, or name these."
        )
    now = dataset_facts(data)
    for name, width in layer.widths.items():
        saved, pinned = (facts.get(f"content.{name}", "?").partition("@")[0] for facts in (layer.dataset, now))
        if stores[name].width != width or saved != pinned:
            raise ValueError(
                f"{where}: reads {name!r} of width {width}, generation {saved}, but the data set has width "
                f"{stores[name].width}, generation {pinned}; fuse its vectors again."
            )
    if layer.genre is not None:
        column = data.catalog.items.categoricals.get(layer.genre)
        there = None if column is None else column.cardinality + 1
        if there != layer.num_genres:
            raise ValueError(
                f"{where}: knows {layer.num_genres} codes of {layer.genre!r}, but the data set has {there or 'none'}; "
                "fuse again."
            )


def slow_parameters(names: Iterable[str]) -> list[str]:
    """Those of a retriever's parameters that are its fusion layer's."""
    return [name for name in names if ".fusion.layer." in f".{name}"]
