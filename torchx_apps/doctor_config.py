"""The doctor on a run of a configuration: its data set or one that is only described, its model, its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.config import RunConfig
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.diagnosis.examination import Ready
from mufasa_rec.diagnosis.tables import Asked, feature_findings, plan_findings, tables_of
from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.retriever import Retriever
from mufasa_rec.training.fusion_file import TrainedLayer
from mufasa_rec.training.optim import TrainOptimizer
from torchx_apps import assembly, doctor_data, fusion_tuning, imagined_batches, ranking, run_folder, train
from torchx_apps.doctor_room import Room

Unsharded = tuple[Retriever | Ranker, list[Any], RunConfig, assembly.OpenDataset | None]


def ready(config: RunConfig, manifest: DatasetManifest | None, room: Room) -> Ready | None:
    """Build what a configuration describes; collective.

    Args:
        config: The run.
        manifest: What `dataset.json` would say of a catalog that is only described; None for the run's data set.
        room: Takes what is found.

    Returns:
        None when a fault is in the way.
    """
    room.look("configuration", lambda: train.refuse_on(config, room.env))
    if manifest is None:
        made = _of_data(config, room)
    else:
        made = None if room.in_the_way("configuration") else _imagined(config, manifest, room)
    if room.in_the_way("configuration") or made is None:
        return None
    model, batches, config, data = made
    device = room.env.device
    plan = room.look("tables", lambda: assembly.plan_of(config, model, device))
    if plan is not None:
        room.add(plan_findings(model, plan, device.type, _asked(config, model, room.env)))
    if room.in_the_way("data", "tables") or plan is None:
        return None
    if data is None:
        sharded: nn.Module = sharding.shard(model, plan, device, config.sharding)
    else:
        init_std = config.ranker.init_std if isinstance(model, Ranker) else config.model.init_std
        sharded = assembly.shard_model(config, data, model, init_std, device, plan)
    return _ready(config, sharded, batches, room)


def _of_data(config: RunConfig, room: Room) -> Unsharded | None:
    """The unsharded model and two batches of the run's data set; collective."""
    room.add(room.look("data", lambda: doctor_data.content_findings(config)) or ())
    source = Path(config.model.fusion_source)  # a new run has no layer of its own yet
    layer = room.look("data", lambda: fusion_tuning.open_layer(config, source, room.exchange))
    if room.in_the_way("configuration"):
        return None
    if layer is not None:
        config = run_folder.with_modalities(config, layer.widths)
    data = room.look("data", lambda: assembly.open_dataset(config))
    if data is not None and layer is not None:
        room.look("data", lambda: fusion_tuning.check(config, layer, data))
    if room.in_the_way("configuration") or data is None:
        return None
    if config.uses_content:
        config = run_folder.with_modalities(config, data.catalog.stores)
    module = ranking if config.task == "ranking" else assembly
    loader = room.look("data", lambda: module.make_loader(config, data, "train", room.env))
    if loader is not None:
        room.add(room.look("data", lambda: doctor_data.column_findings(loader)) or ())
    if room.in_the_way("data") or loader is None:
        return None
    batches = room.look("data", lambda: doctor_data.two_batches(loader))
    model = room.look("configuration", lambda: _model(config, data, layer, room))
    if batches is None or model is None:
        return None
    room.add(feature_findings(model, batches[0]))
    return model, batches, config, data


def _model(config: RunConfig, data: assembly.OpenDataset, layer: TrainedLayer | None, room: Room) -> Retriever | Ranker:
    if config.task == "ranking":
        return ranking.build_ranker(config, data, room.exchange)
    return assembly.build_retriever(config, data, room.exchange, layer)


def _imagined(config: RunConfig, manifest: DatasetManifest, room: Room) -> Unsharded | None:
    """The unsharded model and two drawn batches of a catalog that is only described."""
    made = room.look("configuration", lambda: imagined_batches.imagine(config, manifest, room.env, room.exchange))
    if made is None:
        return None
    model, batches, note = made
    room.report.notes += [note] if note else []
    return model, batches, config, None


def _asked(config: RunConfig, model: nn.Module, env: DistributedEnv) -> dict[str, Asked]:
    """What the configuration asks of each table; a saved plan is taken as it is."""
    if config.sharding.plan:
        return {}
    found = {}
    for _, _, table in tables_of(model):
        name = table.feature_names[0]
        own = f"sharding.tables[{name!r}]" if name in config.sharding.tables else "sharding"
        types = config.sharding.types_of(name, env.device.type, env.world_size)
        found[table.name] = Asked(types, config.sharding.kernels_of(name), own)
    return found


def _ready(config: RunConfig, model: nn.Module, batches: list[Any], room: Room) -> Ready:
    dense = {name: p for name, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    slow = fusion_tuning.slow_parameters(dense)
    fused: Any = model.fused_optimizer

    def forward(batch: Any) -> tuple[Tensor, Any]:
        with torch.autocast(room.env.device.type, dtype=torch.bfloat16, enabled=config.trainer.bf16):
            return model(batch)

    return Ready(
        model=model,
        optimizer=TrainOptimizer(dense, fused, config.optimizer, total_steps=2, slow=slow),
        batches=batches,
        device=room.env.device,
        forward=forward,
        prefetch=config.sharding.prefetch,
        peak=room.peak,
    )
