"""A sharding plan as a JSON file: written where jobs are planned, read back where they run."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    KeyValueParams,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingCollection

from mufasa_rec.data import paths
from mufasa_rec.distributed.managed_collision import INSIDE
from mufasa_rec.distributed.sharding_config import ShardingConfig

FORMAT_VERSION = 1
_AGAIN = "plan again with `python -m torchx_apps.plan ... --save FILE`, or leave it empty to plan at the start"


def plan_document(plan: ShardingPlan, device_type: str, world_size: int, local_world_size: int) -> dict[str, Any]:
    """A plan as JSON.

    Args:
        plan: The plan.
        device_type: What it was made for.
        world_size: Ranks that it was made for.
        local_world_size: Ranks of a node.
    """
    modules = {
        path: {table: _table_document(parameter) for table, parameter in module.items()}  # type: ignore[attr-defined]
        for path, module in plan.plan.items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "device_type": device_type,
        "world_size": world_size,
        "local_world_size": local_world_size,
        "modules": modules,
    }


def _table_document(parameter: ParameterSharding) -> dict[str, Any]:
    spec, cache, ssd = parameter.sharding_spec, parameter.cache_params, parameter.key_value_params
    assert isinstance(spec, EnumerableShardingSpec)
    shards = []
    for shard in spec.shards:
        assert shard.placement is not None
        shards.append([*shard.shard_offsets, *shard.shard_sizes, shard.placement.rank()])
    return {
        "sharding_type": parameter.sharding_type,
        "compute_kernel": parameter.compute_kernel,
        "output_dtype": parameter.output_dtype.value if parameter.output_dtype is not None else None,
        "cache_share": cache.load_factor if cache is not None else None,
        "prefetch": bool(cache.prefetch_pipeline) if cache is not None else False,
        "ssd_folder": ssd.ssd_storage_directory if ssd is not None else None,
        "shards": shards,  # row, column, rows, columns, rank
    }


def save_plan(document: dict[str, Any], file: paths.Location) -> None:
    """Write what `plan_document` gave."""
    with paths.atomic_write(file) as path:
        path.write_text(json.dumps(document))


def load_plan(
    file: paths.Location, model: nn.Module, device_type: str, config: ShardingConfig, world_size: int
) -> ShardingPlan:
    """Read a plan back.

    Args:
        file: What `save_plan` wrote.
        model: The model that it is for.
        device_type: Kind of device that it is for.
        config: Says in which groups of ranks it is used.
        world_size: Ranks that there are.

    Raises:
        ValueError: When it is no plan, or one for another kind of device, world or model; says what differs.
    """
    config.refuse_on(device_type, world_size)
    wanted: dict[str, Any] = {"format_version": FORMAT_VERSION, "device_type": device_type}
    wanted["world_size"] = config.group_size or world_size
    try:
        with paths.open_file(file, "rb") as handle:
            document = json.load(handle)
        found = {name: document[name] for name in wanted}
        differences = [
            f"{name} {found[name]}, this run has {wanted[name]}" for name in wanted if found[name] != wanted[name]
        ]
        if not differences:
            local = document["local_world_size"]
            plan = {path: _read_module(module, device_type, local) for path, module in document["modules"].items()}
            differences = _differences(plan, model, wanted["world_size"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"sharding.plan={file}: damaged ({error!r}); {_AGAIN}.") from error
    if differences:
        raise ValueError(f"sharding.plan={file}: made for {'; '.join(differences[:5])}; {_AGAIN}.")
    return ShardingPlan(plan=plan)  # type: ignore[arg-type]


def _read_module(tables: dict[str, Any], device_type: str, local_world_size: int) -> EmbeddingModuleShardingPlan:
    module = EmbeddingModuleShardingPlan()
    for name, table in tables.items():
        share, output, folder = table["cache_share"], table["output_dtype"], table["ssd_folder"]
        shards = [
            ShardMetadata(
                shard_offsets=[row, column],
                shard_sizes=[rows, columns],
                placement=placement(device_type, rank, local_world_size),
            )
            for row, column, rows, columns, rank in table["shards"]
        ]
        module[name] = ParameterSharding(
            sharding_type=table["sharding_type"],
            compute_kernel=table["compute_kernel"],
            ranks=[shard[-1] for shard in table["shards"]],
            sharding_spec=EnumerableShardingSpec(shards),
            output_dtype=None if output is None else DataType(output),
            cache_params=CacheParams(load_factor=share, prefetch_pipeline=table["prefetch"]) if share else None,
            key_value_params=None if folder is None else KeyValueParams(ssd_storage_directory=folder),
        )
    return module


def _differences(plan: dict[str, EmbeddingModuleShardingPlan], model: nn.Module, world_size: int) -> list[str]:
    """How a plan's tables differ from a model's, in words."""
    wanted = {
        f"{path.removesuffix(f'.{INSIDE}')}.{table.name}": (table.num_embeddings, table.embedding_dim)
        for path, module in model.named_modules()
        if isinstance(module, EmbeddingCollection)
        for table in module.embedding_configs()
    }
    found: dict[str, tuple[int, int]] = {}
    for path, module in plan.items():
        for name, table in module.items():
            shards = table.sharding_spec.shards  # type: ignore[union-attr]
            ends = [[o + s for o, s in zip(shard.shard_offsets, shard.shard_sizes)] for shard in shards]
            found[f"{path}.{name}"] = (max(end[0] for end in ends), max(end[1] for end in ends))
            if any(rank >= world_size for rank in table.ranks or ()):
                return [f"more ranks than {world_size}"]
    names = sorted(wanted.keys() | found.keys())
    return [
        f"{name} {_shape(found.get(name))}, this run has {_shape(wanted.get(name))}"
        for name in names
        if wanted.get(name) != found.get(name)
    ]


def _shape(shape: tuple[int, int] | None) -> str:
    return "not there" if shape is None else f"of {shape[0]:,} x {shape[1]}"
