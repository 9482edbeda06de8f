"""Sharding a model: plan, fused optimizers, weights that do not depend on the number of ranks, content by shards."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner import types as planner_types
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import SGD, Adagrad, Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mufasa_rec.distributed.gradients import average_in_rank_order

logger = logging.getLogger(__name__)
_BLOCK = 1 << 16  # rows that share one random stream
_RESERVED_SHARE = 0.15  # of a device's memory, for everything that is no table
# Rows stay whole (weights are drawn and content is read by rows), and every table is a ShardedTensor in the checkpoint.
ShardingType = Literal["row_wise", "table_wise", "table_row_wise"]
_GPU_SHARDING_TYPES: tuple[ShardingType, ...] = get_args(ShardingType)


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How tables are spread over ranks.

    Attributes:
        types: Sharding types that the planner may choose from; None for row-wise on a CPU, and all of them on a GPU.
    """

    types: tuple[ShardingType, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.types or ():
            if name not in get_args(ShardingType):
                raise ValueError(f"sharding.types: {name!r}: choose from {', '.join(get_args(ShardingType))}.")
        if self.types == ():
            raise ValueError("sharding.types is empty: name at least one, or leave it out.")

    def allowed(self, device: torch.device) -> tuple[ShardingType, ...]:
        """What the planner may choose from on a device.

        Raises:
            ValueError: For a type that the device does not have.
        """
        if device.type != "cpu":
            return self.types or _GPU_SHARDING_TYPES
        if self.types and "table_row_wise" in self.types:
            raise ValueError(
                "sharding.types: 'table_row_wise' spreads a table over one node's GPUs; on a CPU choose row_wise or "
                "table_wise."
            )
        return self.types or ("row_wise",)


@dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The optimizer that FBGEMM applies to the tables inside the backward.

    Attributes:
        name: ``row_wise_adagrad`` (one number of state per row), ``adagrad`` (one per weight), ``sgd``, or ``adam``
            (GPU only).
        learning_rate: Learning rate.
        eps: Added to the root of the second moment.
    """

    name: Literal["row_wise_adagrad", "adagrad", "adam", "sgd"] = "row_wise_adagrad"
    learning_rate: float = 0.02
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.tables.learning_rate={self.learning_rate}: choose above 0.")

    def refuse_on(self, device: torch.device) -> None:
        """Refuse an optimizer that the device's kernels do not have.

        Raises:
            ValueError: For Adam on a CPU.
        """
        if self.name == "adam" and device.type == "cpu":
            raise ValueError(
                "optimizer.tables.name='adam': FBGEMM has no fused Adam on a CPU; choose 'row_wise_adagrad' or "
                "'adagrad', or train on a GPU."
            )


def fuse_optimizer(collection: nn.Module, config: TableOptimizerConfig) -> None:
    """Let the backward of `collection` update its tables."""
    classes = {"row_wise_adagrad": RowWiseAdagrad, "adagrad": Adagrad, "adam": Adam, "sgd": SGD}
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.name != "sgd":
        arguments["eps"] = config.eps
    apply_optimizer_in_backward(
        optimizer_class=classes[config.name], params=collection.parameters(), optimizer_kwargs=arguments
    )


def freeze(collection: nn.Module) -> None:
    """Give `collection` the one fused optimizer without state; its lookups run without gradient, so it never acts."""
    apply_optimizer_in_backward(optimizer_class=SGD, params=collection.parameters(), optimizer_kwargs={"lr": 0.0})


def make_plan(model: nn.Module, device: torch.device, config: ShardingConfig | None = None) -> ShardingPlan:
    """Plan every table: with a fused kernel on a CPU, with the planner's choice on a GPU.

    Args:
        model: The unsharded model, embedding collections on `meta` or on a device.
        device: Device of this rank.
        config: What the planner may choose from.

    Returns:
        The same plan on every rank.
    """
    tables = [
        config.name
        for module in model.modules()
        if isinstance(module, EmbeddingCollection)
        for config in module.embedding_configs()
    ]
    allowed = ParameterConstraints(
        sharding_types=list((config or ShardingConfig()).allowed(device)),
        compute_kernels=["fused"] if device.type == "cpu" else None,
    )
    planner = EmbeddingShardingPlanner(
        topology=_topology(device),
        constraints=dict.fromkeys(tables, allowed),
        # The planner's default heuristic is deprecated: it warns, and over-estimates modules on `meta`.
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED_SHARE),
    )
    return planner.collective_plan(module=model, sharders=_sharders(), pg=dist.distributed_c10d._get_default_group())


def _sharders() -> list[Any]:
    """Who shards what: typed by TorchRec for its base classes only."""
    return [EmbeddingCollectionSharder()]


def _topology(device: torch.device) -> Topology:
    """This world as the planner sees it, with the device's real memory."""
    world = dist.get_world_size()
    sizes: dict[str, Any] = {"world_size": world, "local_world_size": int(os.environ.get("LOCAL_WORLD_SIZE", world))}
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    factory = getattr(planner_types, "TopologyFactory", None)
    if factory is None:  # TorchRec before 1.8 has the constructor only; from 1.8 on that one warns
        return Topology(compute_device=device.type, hbm_cap=hbm, **sizes)
    return factory.create_topology(
        trainer_config=planner_types.TrainerConfig(hbm_cap_bytes=hbm, **sizes),
        kernel_config=planner_types.KernelConfig(compute_device=device.type),
    )


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device) -> DistributedModelParallel:
    """Shard the embedding collections by the plan and wrap the rest data-parallel."""
    sharded = DistributedModelParallel(
        module=model, device=device, plan=plan, sharders=_sharders(), init_parameters=True
    )
    if device.type == "cpu" and dist.get_world_size() > 2:
        average_in_rank_order(sharded)
    return sharded


def local_shards(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """This rank's part of every sharded table.

    Returns:
        Table name to (local weights `[rows, dim]`, first row).

    Raises:
        ValueError: For a table whose shards are not whole rows; on all ranks alike.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, ShardedTensor):
            continue
        table = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if any(part.shard_sizes[1] != value.size()[1] for part in value.metadata().shards_metadata):
            raise ValueError(
                f"table {table}: its shards hold parts of rows, but weights are drawn and read by rows; shard it "
                "row-wise or table-wise."
            )
        for part in value.local_shards():
            found[table] = (part.tensor, part.metadata.shard_offsets[0])
    return found


@torch.no_grad()
def initialise_tables(model: nn.Module, std: Mapping[str, float], seed: int) -> None:
    """Draw the tables' initial weights from streams keyed by (seed, table, block of rows).

    So the same row starts with the same weights on any number of ranks. Row 0 of a table, the row of unknown and rare
    values, starts at zero: a value that was never trained should say nothing.

    Args:
        model: The sharded model.
        std: Standard deviation of each table's weights; other tables are left alone.
        seed: Seed of the run.
    """
    for table, (weight, first) in local_shards(model).items():
        if table not in std:
            continue
        last = first + len(weight)
        for block in range(first // _BLOCK, -(-last // _BLOCK)):
            stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{table}/{block}".encode()))
            start, stop = max(block * _BLOCK, first), min((block + 1) * _BLOCK, last)
            drawn = torch.randn(stop - block * _BLOCK, weight.shape[1], generator=stream) * std[table]
            weight[start - first : stop - first] = drawn[start - block * _BLOCK :].to(weight)
        if first == 0 and len(weight):
            weight[0] = 0.0


@torch.no_grad()
def load_rows(model: nn.Module, readers: Mapping[str, Callable[[int, int], Tensor]], chunk_rows: int = _BLOCK) -> None:
    """Fill tables from stores, each rank reading only the rows of its own shard.

    Args:
        model: The sharded model.
        readers: Table to a function that returns its rows `start` to `stop`, `[stop - start, width]` with a width of
            at most the table's.
        chunk_rows: Rows read at once.
    """
    for table, (weight, first) in local_shards(model).items():
        if table not in readers:
            continue
        for start in range(0, len(weight), chunk_rows):
            stop = min(start + chunk_rows, len(weight))
            rows = readers[table](first + start, first + stop)
            weight[start : start + len(rows), : rows.shape[1]] = rows.to(weight)
        logger.info("table %s: rows %d to %d read from its store", table, first, first + len(weight))


def describe(plan: ShardingPlan) -> str:
    """A plan as lines of text: table, sharding type, kernel, ranks."""
    lines = []
    for path, module in plan.plan.items():
        for table, parameter in module.items():  # type: ignore[attr-defined]
            ranks = sorted(set(parameter.ranks or []))
            lines.append(f"{path}.{table}: {parameter.sharding_type}, {parameter.compute_kernel}, ranks {ranks}")
    return "\n".join(lines)
