"""How long a step takes, part by part: an estimate, from TorchRec's model of lookups and data-sheet numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torchrec.distributed.planner.types import ShardingOption
from torchrec.modules.embedding_configs import EmbeddingConfig

from mufasa_rec.distributed.sharding_config import ShardingConfig
from mufasa_rec.planning.load import StepLoad
from mufasa_rec.planning.topology import Topology

EFFICIENCY = 0.35  # of the peak that a step's matrix products are taken to reach
IDS, COPY = "ids' exchange (hidden)", "content's copy (hidden)"
HIDDEN = (IDS, COPY)  # behind the step before
_ID_BYTES = 8


def step_parts(
    topology: Topology,
    frozen: frozenset[str],
    load: StepLoad,
    options: list[ShardingOption],
    tables: Mapping[str, EmbeddingConfig],
    config: ShardingConfig,
) -> dict[str, float]:
    """Milliseconds of each part of a step, of the rank that takes longest for the part.

    Args:
        topology: What the run is planned on.
        frozen: Features whose tables are only looked up: they cost no backward.
        load: What a step asks of one rank.
        options: The planner's choice, with its estimates.
        tables: The tables by name.
        config: How they are spread.
    """
    names = ("lookup", "all-to-all", "update", "cache", IDS)
    by_rank: dict[str, dict[int, float]] = {name: defaultdict(float) for name in names}
    for option in options:
        learns = tables[option.name].feature_names[0] not in frozen
        for shard in option.shards:
            if shard.perf is None:
                continue
            rank, perf = shard.rank or 0, shard.perf
            by_rank["lookup"][rank] += perf.fwd_compute
            by_rank["all-to-all"][rank] += perf.fwd_comms
            by_rank["cache"][rank] += perf.prefetch_compute
            by_rank[IDS][rank] += _ids_ms(option, load, tables[option.name].feature_names[0], topology, config)
            if learns:
                by_rank["all-to-all"][rank] += perf.bwd_comms
                by_rank["update"][rank] += perf.bwd_compute
    found = {name: max(ms.values(), default=0.0) for name, ms in by_rank.items()}
    found = {name: ms for name, ms in found.items() if ms or name != "cache"}
    return {
        **found,
        "dense": _compute_ms(load.dense_flops, topology),
        "objective": _compute_ms(load.objective_flops, topology),
        "attention": _compute_ms(load.attention_flops, topology),
        "gradient all-reduce": _all_reduce_ms(4 * load.dense_parameters, topology),
        **_sync(topology, options, config),
    }


def step_time(parts: Mapping[str, float]) -> float:
    """A step's time: its parts one after the other, or a hidden one when that takes longer than all of them."""
    return max(sum(ms for name, ms in parts.items() if name not in HIDDEN), *(parts.get(name, 0.0) for name in HIDDEN))


def _ids_ms(option: ShardingOption, load: StepLoad, feature: str, topology: Topology, config: ShardingConfig) -> float:
    """The exchange of a table's ids: a row-wise shard gets its part of every rank's, another shard all of them.

    TorchRec's own estimate takes all of them for a row-wise shard too.
    """
    group = config.group_size or topology.world_size
    asked = load.ids.get(feature, 1) * (1 if option.sharding_type == "row_wise" else group)
    bandwidth = topology.intra_node_gb_s if group <= topology.ranks_per_node else topology.inter_node_gb_s
    return _ID_BYTES * asked / (bandwidth * 1e9) * 1e3


def copy_ms(count: int, topology: Topology) -> dict[str, float]:
    """The copy of bytes from the host to the device, where there is one to make."""
    if topology.compute_device == "cpu" or not count:
        return {}
    return {COPY: count / (topology.host_link_gb_s * 1e9) * 1e3}


def _compute_ms(flops: float, topology: Topology) -> float:
    return flops / (topology.tflops * 1e12 * EFFICIENCY) * 1e3


def _all_reduce_ms(count: int, topology: Topology) -> float:
    """A ring over all ranks, or over the nodes' equal ranks side by side, at the slowest link's bandwidth."""
    world = topology.world_size
    bandwidth = topology.intra_node_gb_s if topology.nodes == 1 else topology.inter_node_gb_s
    return 2 * (world - 1) / world * count / (bandwidth * 1e9) * 1e3


def _sync(topology: Topology, options: list[ShardingOption], config: ShardingConfig) -> dict[str, float]:
    """The average of several groups' tables, spread over the steps between two of them."""
    group = config.group_size or topology.world_size
    copies = topology.world_size // group
    if copies == 1:
        return {}
    held: dict[int, int] = defaultdict(int)
    for option in options:
        for shard in option.shards:
            held[shard.rank or 0] += shard.size[0] * shard.size[1] * option.tensor.element_size()
    count = 2 * (copies - 1) / copies * max(held.values(), default=0)
    # Copies of a shard lie on one node, as far as a node holds them.
    bandwidth = topology.intra_node_gb_s if copies <= topology.ranks_per_node else topology.inter_node_gb_s
    return {"average of the groups": count / (bandwidth * 1e9) * 1e3 / config.sync_every}
