"""A model's tables planned on a topology by TorchRec's planner, and all that a rank holds counted.

TorchRec chooses how each table is cut and where its parts go. Bytes are counted here from the parts: weights in their
precision, optimizer state in fp32, caches, the exchanged ids and vectors, the data-parallel part and its activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Stats
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.sharding_config import Kernel, ShardingConfig
from mufasa_rec.distributed.table_config import BYTES, TableOptimizerConfig, TablesConfig
from mufasa_rec.modules.sparse_arch import ContentTableConfig
from mufasa_rec.planning import times
from mufasa_rec.planning.carried import carried, carried_lines
from mufasa_rec.planning.load import StepLoad
from mufasa_rec.planning.plan_file import plan_document
from mufasa_rec.planning.report import ASSUMPTIONS, PlanReport, RankPlan, TablePlan, size
from mufasa_rec.planning.topology import GIB, Topology

_USABLE_SHARE = 0.93  # of a GPU's memory: the rest is lost to pieces that the allocator cannot give out
_RUNTIME_BYTES = 3 * GIB // 2  # on a GPU: CUDA's context, NCCL's buffers, workspaces
_ID_BYTES = 8
_SCALE = 1 << 20  # times the memory, to see what a plan would need that does not fit


@dataclass(frozen=True, kw_only=True)
class TableRules:
    """How the tables of a run are spread, made and trained.

    Attributes:
        sharding: How they are spread.
        tables: What they are made of.
        optimizer: How those learn that do not differ.
        frozen: Features whose tables are only looked up.
        content: Content, by feature.
        row_bytes: What is kept of each row beside weights and optimizer state, by feature: ids of managed rows.
    """

    sharding: ShardingConfig
    tables: TablesConfig
    optimizer: TableOptimizerConfig
    frozen: frozenset[str] = frozenset()
    content: Mapping[str, ContentTableConfig] = field(default_factory=dict)
    row_bytes: Mapping[str, int] = field(default_factory=dict)

    def optimizer_of(self, feature: str) -> TableOptimizerConfig | None:
        """How a table learns; None for one that does not."""
        return None if feature in self.frozen else self.tables.optimizer_of(feature, self.optimizer)


class _Choice(Stats):
    """Keeps what the planner chose."""

    def __init__(self) -> None:
        self.options: list[ShardingOption] = []

    def log(self, sharding_plan: ShardingPlan, *_: Any, best_plan: list[ShardingOption], **__: Any) -> None:
        """What the planner calls with its choice."""
        self.options = list(best_plan)


def plan_model(model: nn.Module, topology: Topology, rules: TableRules, load: StepLoad) -> PlanReport:
    """Plan a model on a topology; needs none of its devices.

    Args:
        model: The unsharded model, its embedding collections on `meta`.
        topology: What it is to run on.
        rules: How its tables are spread, made and trained.
        load: What a step asks of one rank.

    Returns:
        The report, without remedies. For a model that does not fit it shows what would be needed.

    Raises:
        ValueError: For what the topology's devices cannot do.
    """
    device = topology.compute_device
    rules.sharding.refuse_on(device, topology.world_size)
    rules.tables.refuse_on(device)
    rules.optimizer.refuse_on(device)
    tables = {
        table.name: table
        for module in model.modules()
        if isinstance(module, EmbeddingCollection)
        for table in module.embedding_configs()
    }
    fixed = _fixed_parts(topology, load)
    reserved = sum(fixed.values()) + topology.memory_bytes - _usable(topology)
    plan, options = _choose(model, topology, rules, load, reserved)
    placed = plan is not None
    if plan is None:
        roomiest = replace(rules, sharding=_roomiest(rules.sharding))
        plan, options = _choose(model, topology, roomiest, load, 0, _SCALE)
        assert plan is not None
    ranks = _ranks(topology, rules, load, options, tables, fixed)
    report = _report(topology, rules, load, options, tables, ranks, placed)
    group = rules.sharding.group_size or topology.world_size
    if not report.fits:
        return report
    document = plan_document(plan, device, group, min(topology.ranks_per_node, group))
    return replace(report, document=document)


def _choose(
    model: nn.Module, topology: Topology, rules: TableRules, load: StepLoad, reserved: int, scale: int = 1
) -> tuple[ShardingPlan | None, list[ShardingOption]]:
    """The planner's choice; None when there is no room."""
    choice = _Choice()
    planner = sharding.make_planner(
        topology.planner(group_size=rules.sharding.group_size, reserved_bytes=reserved, scale=scale),
        model,
        rules.sharding,
        rules.tables,
        ids_per_step=load.ids,
        stats=[choice],
    )
    try:
        device = torch.device(topology.compute_device)
        plan = planner.plan(module=model, sharders=sharding.sharders(rules.sharding, device))
    except PlannerError:
        return None, []
    return plan, choice.options


def _roomiest(config: ShardingConfig) -> ShardingConfig:
    """The same where each table takes the least of the device's memory that it may."""
    order: tuple[Kernel, ...] = ("key_value", "fused_uvm", "fused_uvm_caching", "fused")

    def least(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        return (next(kernel for kernel in order if kernel in kernels),)

    tables = {name: replace(own, kernels=least(config.kernels_of(name))) for name, own in config.tables.items()}
    kernels = least(config.kernels)
    return replace(config, kernels=kernels, tables=tables, prefetch=config.prefetch and "fused_uvm_caching" in kernels)


def _fixed_parts(topology: Topology, load: StepLoad) -> dict[str, int]:
    """What every rank holds beside tables, in the memory that tables lie in."""
    runtime = _RUNTIME_BYTES if topology.compute_device == "cuda" else 0
    return {"dense": load.dense_bytes, "activations": load.activation_bytes, "runtime": runtime}


def _usable(topology: Topology) -> int:
    share = _USABLE_SHARE if topology.compute_device == "cuda" else 1.0
    return int(topology.memory_bytes * share)


def _ranks(
    topology: Topology,
    rules: TableRules,
    load: StepLoad,
    options: list[ShardingOption],
    tables: Mapping[str, EmbeddingConfig],
    fixed: Mapping[str, int],
) -> tuple[RankPlan, ...]:
    """Memory of every rank of the first group."""
    on_gpu = topology.compute_device == "cuda"
    group = rules.sharding.group_size or topology.world_size
    placed: dict[str, list[int]] = {kind: [0] * group for kind in ("hbm", "ddr", "ssd")}
    parts: dict[str, list[int]] = {name: [0] * group for name in ("tables", "content", "exchange")}
    for option in options:
        table = tables[option.name]
        feature = table.feature_names[0]
        for shard in option.shards:
            rank = shard.rank or 0
            weights, state = shard_bytes(table, shard.size, rules)
            held = where_bytes(option.compute_kernel, weights + state, shard.size[0], rules.sharding, feature, on_gpu)
            for kind, count in held.items():
                placed[kind][rank] += count
            parts["content" if feature in rules.content else "tables"][rank] += weights + state
            exchanged = _exchange_bytes(option, shard.size, rules, load.ids.get(feature, 1), group, feature)
            parts["exchange"][rank] += exchanged
            placed["hbm" if on_gpu else "ddr"][rank] += exchanged
    travels = carried(rules.content, topology, load)
    for rank in range(group):
        placed["hbm" if on_gpu else "ddr"][rank] += sum(fixed.values()) + travels.moved
        placed["ddr"][rank] += travels.store + travels.made
        parts["content"][rank] += travels.store
        parts["exchange"][rank] += travels.made + travels.moved
    return tuple(
        RankPlan(
            rank=rank,
            hbm_bytes=placed["hbm"][rank],
            ddr_bytes=placed["ddr"][rank],
            ssd_bytes=placed["ssd"][rank],
            parts={**{name: count[rank] for name, count in parts.items()}, **fixed},
        )
        for rank in range(group)
    )


def shard_bytes(table: EmbeddingConfig, shape: list[int], rules: TableRules) -> tuple[int, int]:
    """Bytes of a shard's weights, and of its optimizer state and whatever else is kept of its rows."""
    (rows, columns), feature = shape, table.feature_names[0]
    optimizer = rules.optimizer_of(feature)
    weights = rows * columns * BYTES[sharding.precision_of(table)]
    state = 0 if optimizer is None else optimizer.state_bytes(columns)
    return weights, rows * (state + rules.row_bytes.get(feature, 0))


def where_bytes(
    kernel: str, count: int, rows: int, config: ShardingConfig, feature: str, on_gpu: bool
) -> dict[str, int]:
    """Where a shard's bytes lie: all in one place, or behind a cache (whose bookkeeping takes some more)."""
    if kernel == "fused":
        return {"hbm" if on_gpu else "ddr": count}
    if kernel == "fused_uvm":
        return {"ddr": count}
    share = config.cache_share_of(feature) or 0.0
    cache = int(count * share) + int(rows * (4 + 16 * share))
    return {"hbm": cache, "ddr" if kernel == "fused_uvm_caching" else "ssd": count}


def _exchange_bytes(
    option: ShardingOption, shape: list[int], rules: TableRules, ids: int, group: int, feature: str
) -> int:
    """Ids that a shard is asked for (two batches are on their way) and the vectors that it answers with."""
    asked = ids * (1 if option.sharding_type == "row_wise" else group)
    copies = 1 if feature in rules.frozen else 2  # vectors, and their gradients
    return asked * (2 * _ID_BYTES + copies * shape[1] * BYTES[rules.tables.output_dtype_of(feature)])


def _report(
    topology: Topology,
    rules: TableRules,
    load: StepLoad,
    options: list[ShardingOption],
    tables: Mapping[str, EmbeddingConfig],
    ranks: tuple[RankPlan, ...],
    placed: bool,
) -> PlanReport:
    on_gpu = topology.compute_device == "cuda"
    capacity = {
        "hbm": _usable(topology) if on_gpu else 0,
        "ddr": topology.ddr_bytes if on_gpu else _usable(topology),
        "ssd": topology.ssd_bytes,
    }
    needs = {kind: max(getattr(rank, f"{kind}_bytes") for rank in ranks) for kind in capacity}
    over = {kind: needs[kind] - room for kind, room in capacity.items() if needs[kind] > room}
    parts = times.step_parts(topology, rules.frozen, load, options, tables, rules.sharding)
    parts |= times.copy_ms(carried(rules.content, topology, load).copied, topology)
    step = times.step_time(parts)
    longest = max(parts, key=lambda name: parts[name] * (name not in times.HIDDEN or step == parts[name]))
    return PlanReport(
        topology=topology,
        fits=placed and not over,
        verdict=_verdict(topology, needs, capacity, over, placed),
        tables=(
            *(_table_plan(option, tables[option.name], rules) for option in options),
            *carried_lines(rules.content, topology),
        ),
        ranks=ranks,
        capacity=capacity,
        step_time_ms=step,
        step_parts=parts,
        bottleneck=longest,
        assumptions=ASSUMPTIONS.format(efficiency=times.EFFICIENCY),
    )


def _verdict(
    topology: Topology, needs: Mapping[str, int], capacity: Mapping[str, int], over: Mapping[str, int], placed: bool
) -> str:
    names = {"hbm": "device memory", "ddr": "host memory", "ssd": "SSD"}
    if over:
        said = ", ".join(f"{size(needs[kind])} of {names[kind]} and has {size(capacity[kind])}" for kind in over)
        return f"does not fit: the fullest rank needs {said}"
    if not placed:
        return "does not fit: TorchRec's planner finds no way to place the tables within what may be chosen"
    kind = "hbm" if topology.compute_device == "cuda" else "ddr"
    free = capacity[kind] - needs[kind]
    return f"fits: the fullest rank has {size(free)} ({free / max(capacity[kind], 1):.0%}) of {names[kind]} left"


def _table_plan(option: ShardingOption, table: EmbeddingConfig, rules: TableRules) -> TablePlan:
    by_rank: dict[int, int] = defaultdict(int)
    weight_bytes = state_bytes = 0
    for shard in option.shards:
        weights, state = shard_bytes(table, shard.size, rules)
        weight_bytes, state_bytes = weight_bytes + weights, state_bytes + state
        by_rank[shard.rank or 0] += weights + state
    feature = table.feature_names[0]
    optimizer, content = rules.optimizer_of(feature), rules.content.get(feature)
    return TablePlan(
        name=feature,
        rows=table.num_embeddings,
        dim=content.width if content else table.embedding_dim,
        dtype=content.precision if content else sharding.precision_of(table),
        sharding_type=option.sharding_type,
        compute_kernel=option.compute_kernel,
        shards=sum(1 for shard in option.shards if shard.size[0]),
        optimizer="frozen" if optimizer is None else optimizer.name,
        weight_bytes=weight_bytes,
        state_bytes=state_bytes,
        bytes=weight_bytes + state_bytes,
        bytes_per_rank=max(by_rank.values()),
    )
