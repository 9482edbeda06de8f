"""Sharding a model: TorchRec's planner within what is allowed, fused optimizers, and the model spread over ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner import types as planner_types
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, KeyValueParams, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import SGD, Adagrad, Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mufasa_rec.distributed import cpu_tables
from mufasa_rec.distributed.gradients import average_in_rank_order
from mufasa_rec.distributed.managed_collision import ManagedCollectionSharder, managed_ids
from mufasa_rec.distributed.sharding_config import ShardingConfig, ShardingType, TableSharding
from mufasa_rec.distributed.table_config import Precision, TableOptimizerConfig, TablesConfig, TableSettings
from mufasa_rec.distributed.table_rows import TableShard, initialise_tables, load_rows, local_shards

__all__ = [
    "ShardingConfig",
    "ShardingType",
    "TableOptimizerConfig",
    "TableSettings",
    "TableShard",
    "TableSharding",
    "TablesConfig",
    "fuse_optimizer",
    "freeze",
    "initialise_tables",
    "load_rows",
    "local_shards",
    "make_plan",
    "make_planner",
    "planner_topology",
    "shard",
    "sharders",
]
_RESERVED_SHARE = 0.15  # of a device's memory, for everything that is no table
_OPTIMIZERS = {"row_wise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "adam": Adam, "sgd": SGD}
DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


def fuse_optimizer(collections: nn.Module, config: TableOptimizerConfig, tables: TablesConfig | None = None) -> None:
    """Let the backward of embedding collections update their tables.

    Args:
        collections: Holds the collections.
        config: How tables learn that do not differ.
        tables: How single tables differ.
    """
    for collection in _collections(collections):
        for table in collection.embedding_configs():
            own = (tables or TablesConfig()).optimizer_of(table.feature_names[0], config)
            arguments: dict[str, Any] = {"lr": own.learning_rate}
            if own.name != "sgd":
                arguments["eps"] = own.eps
            apply_optimizer_in_backward(
                optimizer_class=_OPTIMIZERS[own.name],
                params=collection.embeddings[table.name].parameters(),
                optimizer_kwargs=arguments,
            )


def freeze(collections: nn.Module) -> None:
    """Give collections the one fused optimizer without state; their lookups run without gradient, so it never acts."""
    apply_optimizer_in_backward(optimizer_class=SGD, params=collections.parameters(), optimizer_kwargs={"lr": 0.0})


def make_plan(
    model: nn.Module, device: torch.device, config: ShardingConfig | None = None, tables: TablesConfig | None = None
) -> ShardingPlan:
    """Plan every table with TorchRec's planner; collective.

    Args:
        model: The unsharded model, embedding collections on `meta` or on a device.
        device: Device of this rank.
        config: What the planner may choose from.
        tables: Precision of the vectors that are looked up.

    Returns:
        The same plan on every rank. With groups of ranks it is that of the first one.

    Raises:
        ValueError: For what the device cannot do, and settings of a table that there is not.
    """
    config = config or ShardingConfig()
    world = dist.get_world_size()
    config.refuse_on(device.type, world)
    group = config.group_size or world
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    topology = planner_topology(group, min(local, group), device.type, {"hbm_cap_bytes": hbm})
    planner = make_planner(topology, model, config, tables, reserved_share=_RESERVED_SHARE)
    return planner.collective_plan(
        module=model, sharders=sharders(config, device), pg=dist.distributed_c10d._get_default_group()
    )


def make_planner(
    topology: Topology,
    model: nn.Module,
    config: ShardingConfig,
    settings: TablesConfig | None = None,
    *,
    ids_per_step: Mapping[str, int] | None = None,
    reserved_share: float = 0.0,
    stats: list[Any] | None = None,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner for a model's tables.

    Args:
        topology: The world.
        model: The unsharded model, fused optimizers attached.
        config: What may be chosen.
        settings: Precision of the vectors that are looked up.
        ids_per_step: Ids that a rank looks up in a step, by feature.
        reserved_share: Share of the devices' memory that tables may not have.
        stats: Who is told of the plan.

    Raises:
        ValueError: For settings of a table that there is not, or a type that its optimizer would not be the same in.
    """
    tables = [(collection, table) for collection in _collections(model) for table in collection.embedding_configs()]
    config.refuse_unknown(table.feature_names[0] for _, table in tables)
    _refuse_managed(model, config, topology.world_size)
    config = config.with_managed(managed_ids(model))
    constraints = {}
    for collection, table in tables:
        _refuse_parted_rows(collection, table, config)
        constraints[table.name] = _constraints(table, config, settings or TablesConfig(), topology, ids_per_step or {})
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,  # a step's ids of a feature are one list
        constraints=constraints,
        # The planner's default heuristic is deprecated: it warns, and over-estimates modules on `meta`.
        storage_reservation=FixedPercentageStorageReservation(percentage=reserved_share),
        # Its default tries every combination first, up to 10,000 plans of all ranks.
        proposer=[GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        stats=stats or [],
        debug=False,
    )


def _refuse_parted_rows(collection: EmbeddingCollection, table: EmbeddingConfig, config: ShardingConfig) -> None:
    """Refuse parts of rows under an optimizer that has one number per row: each part would have its own."""
    name = table.feature_names[0]
    classes = getattr(collection.embeddings[table.name].weight, "_optimizer_classes", ())
    if RowWiseAdagrad in classes and "column_wise" in config.types_of(name, "", 0):
        raise ValueError(
            f"sharding.types: 'column_wise' may cut table {name!r}, whose optimizer row_wise_adagrad keeps one number "
            "per row, and each part would keep its own; choose 'adagrad' for it, or leave its rows whole."
        )


def _refuse_managed(model: nn.Module, config: ShardingConfig, world_size: int) -> None:
    """Refuse what a table with managed rows cannot be."""
    for name, ids in managed_ids(model).items():
        ids.config.refuse_world(world_size, name)
        own = config.tables.get(name, TableSharding())
        if own.types not in (None, ("row_wise",)) or own.kernels not in (None, ("fused",)):
            raise ValueError(
                f"sharding.tables[{name!r}]: its rows are managed (ids.{name}.policy), which needs types: [row_wise] "
                "and kernels: [fused]; leave them out."
            )
        if config.group_size is not None:
            raise ValueError(
                f"sharding.group_size={config.group_size}: the groups would admit different ids to table {name!r} "
                f"(ids.{name}.policy); leave it out, or choose another policy."
            )


def _constraints(
    table: EmbeddingConfig,
    config: ShardingConfig,
    settings: TablesConfig,
    topology: Topology,
    ids_per_step: Mapping[str, int],
) -> ParameterConstraints:
    """What the planner may do with one table."""
    name = table.feature_names[0]
    output = settings.output_dtype_of(name)
    cache_share = config.cache_share_of(name)
    on_ssd = "key_value" in config.kernels_of(name)
    return ParameterConstraints(
        sharding_types=list(config.types_of(name, topology.compute_device, topology.world_size)),
        compute_kernels=list(config.kernels_of(name)),
        min_partition=min(config.min_columns, table.embedding_dim),
        pooling_factors=[float(ids_per_step.get(name, 1))] * len(table.feature_names),
        output_dtype=None if output == "fp32" else DATA_TYPES[output],
        cache_params=CacheParams(load_factor=cache_share, prefetch_pipeline=config.prefetch) if cache_share else None,
        key_value_params=KeyValueParams(ssd_storage_directory=config.ssd_folder) if on_ssd else None,
    )


def sharders(config: ShardingConfig, device: torch.device) -> list[Any]:
    """Who shards what: typed by TorchRec for its base classes only."""
    comms = QCommsConfig(
        forward_precision=CommType(config.forward_comms), backward_precision=CommType(config.backward_comms)
    )
    tables = EmbeddingCollectionSharder(qcomm_codecs_registry=get_qcomm_codecs_registry(comms, device=device))
    return [tables, ManagedCollectionSharder(tables)]


def planner_topology(
    world_size: int, local_world_size: int, device_type: str, hardware: Mapping[str, float | None]
) -> Topology:
    """A world as the planner sees it.

    Args:
        world_size: Ranks.
        local_world_size: Ranks of a node.
        device_type: ``cuda`` or ``cpu``.
        hardware: Fields of TorchRec's `HardwareConfig`: bytes, and bytes per millisecond.
    """
    given: dict[str, Any] = {name: value for name, value in hardware.items() if value is not None}
    sizes: dict[str, Any] = {"world_size": world_size, "local_world_size": local_world_size}
    factory = getattr(planner_types, "TopologyFactory", None)
    if factory is None:  # TorchRec before 1.8 has the constructor only; from 1.8 on that one warns
        return Topology(
            compute_device=device_type, **sizes, **{name.removesuffix("_bytes"): value for name, value in given.items()}
        )
    return factory.create_topology(
        trainer_config=planner_types.TrainerConfig(**sizes),
        hardware_config=planner_types.HardwareConfig(**given),
        kernel_config=planner_types.KernelConfig(compute_device=device_type, use_hardware_based_bandwidth=True),
    )


def shard(
    model: nn.Module, plan: ShardingPlan, device: torch.device, config: ShardingConfig | None = None
) -> DistributedModelParallel:
    """Shard the embedding collections by the plan and wrap the rest data-parallel.

    Args:
        model: The unsharded model.
        plan: What `make_plan` gave.
        device: Device of this rank.
        config: What `make_plan` was given.
    """
    config = config or ShardingConfig()
    world = dist.get_world_size()
    arguments: dict[str, Any] = {"module": model, "device": device, "plan": plan, "init_parameters": True}
    arguments["sharders"] = sharders(config, device)
    if config.group_size is not None and config.group_size != world:
        return DMPCollection(
            **arguments,
            world_size=world,
            sharding_group_size=config.group_size,
            global_pg=dist.distributed_c10d._get_default_group(),
        )
    sharded = DistributedModelParallel(**arguments)
    if device.type == "cpu":
        cpu_tables.speed_up(sharded)
        if world > 2:
            average_in_rank_order(sharded)
    return sharded


def sync_of(model: nn.Module, config: ShardingConfig) -> tuple[Callable[[], None], int] | None:
    """What averages the tables of several groups of ranks, and after how many steps; None for one group."""
    return (model.sync, config.sync_every) if isinstance(model, DMPCollection) else None


def precision_of(table: EmbeddingConfig) -> Precision:
    """Precision of a table's weights."""
    return next(name for name, kind in DATA_TYPES.items() if kind == table.data_type)  # type: ignore[return-value]


def _collections(model: nn.Module) -> list[EmbeddingCollection]:
    return [module for module in model.modules() if isinstance(module, EmbeddingCollection)]
