"""The doctor on a user's own model: planned, sharded and put into the pipeline as training would."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.diagnosis.examination import Ready
from mufasa_rec.diagnosis.subject import Subject, load_subject
from mufasa_rec.diagnosis.tables import Asked, feature_findings, plan_findings, tables_of
from mufasa_rec.distributed import sharding
from mufasa_rec.training.optim import OptimizerConfig, TrainOptimizer
from torchx_apps.doctor_room import Room

_RESERVED_SHARE = 0.15  # of a device's memory, for everything that is no table
_ON_CPU = ["row_wise", "table_wise", "column_wise"]  # of unpooled tables that nothing is said of


def ready(path: str, room: Room) -> Ready | None:
    """Build what a factory returns; collective.

    Args:
        path: Import path of the factory.
        room: Takes what is found.

    Returns:
        None when a fault is in the way.
    """
    subject = room.look("configuration", lambda: load_subject(path))
    batches = None if subject is None else room.look("data", lambda: [subject.make_batch() for _ in range(2)])
    if subject is not None and batches is not None:
        room.add(feature_findings(subject.model, batches[0]))
    if room.in_the_way("configuration", *(["data"] if subject else [])) or subject is None or batches is None:
        return None
    device = room.env.device
    plan = room.look("tables", lambda: _plan(subject, device))
    if plan is not None:
        room.add(plan_findings(subject.model, plan, device.type, _asked(subject.constraints)))
    if room.in_the_way("tables") or plan is None:
        return None
    model = DistributedModelParallel(
        module=subject.model, device=device, plan=plan, sharders=get_default_sharders(), init_parameters=True
    )
    dense = {n: p for n, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
    optimizer = TrainOptimizer(dense, model.fused_optimizer, OptimizerConfig(warmup_steps=0), total_steps=2)
    return Ready(model=model, optimizer=optimizer, batches=batches, device=device, forward=model, peak=room.peak)


def _plan(subject: Subject, device: torch.device) -> ShardingPlan:
    """TorchRec's plan within the subject's constraints; collective."""
    world = dist.get_world_size()
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    planner = EmbeddingShardingPlanner(
        topology=sharding.planner_topology(world, local, device.type, {"hbm_cap_bytes": hbm}),
        constraints={**_defaults(subject.model, device.type), **subject.constraints},
        # The planner's default is deprecated: it warns, and over-estimates modules on `meta`.
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED_SHARE),
        debug=False,
    )
    group = dist.distributed_c10d._get_default_group()
    return planner.collective_plan(module=subject.model, sharders=get_default_sharders(), pg=group)


def _defaults(model: nn.Module, device_type: str) -> dict[str, ParameterConstraints]:
    """Constraints of unpooled tables on a CPU, where the planner itself would offer what cannot be looked up."""
    if device_type != "cpu":
        return {}
    return {
        table.name: ParameterConstraints(sharding_types=list(_ON_CPU))
        for _, module, table in tables_of(model)
        if isinstance(module, EmbeddingCollection)
    }


def _asked(constraints: Mapping[str, ParameterConstraints]) -> dict[str, Asked]:
    return {
        name: Asked(_names(one.sharding_types), _names(one.compute_kernels), f"constraints[{name!r}]")
        for name, one in constraints.items()
    }


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(given) if given else None
