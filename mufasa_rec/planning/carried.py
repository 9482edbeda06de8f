"""Content that travels with the batch: what it takes of a rank, and its line in the table of a plan.

The vectors stay in memory-mapped files. They are counted as if all of them lay in the system's cache, once a node and
shared by its ranks: from a disk, thousands of rows at random would take longer than a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mufasa_rec.modules.sparse_arch import ContentTableConfig
from mufasa_rec.planning.load import StepLoad
from mufasa_rec.planning.report import TablePlan
from mufasa_rec.planning.topology import Topology

_HALF_BYTES = 2
_BATCHES_ON_DEVICE = 3  # of TorchRec's pipeline: copied, distributed, computed


@dataclass(frozen=True)
class Carried:
    """What carried content takes of one rank, in bytes.

    Attributes:
        store: Its share of the node's copy of the vectors, in host memory.
        made: Vectors of the batches that the loader has made, in host memory.
        moved: Vectors of the batches that the pipeline holds, in the memory that it computes in.
        copied: Vectors of one batch, which are copied to the device in each step.
    """

    store: int = 0
    made: int = 0
    moved: int = 0
    copied: int = 0


def carried(contents: Mapping[str, ContentTableConfig], topology: Topology, load: StepLoad) -> Carried:
    """Count the modalities that travel with the batch.

    Args:
        contents: All modalities, by feature.
        topology: What the run is planned on.
        load: What a step asks of one rank.
    """
    on_host = {feature: content for feature, content in contents.items() if content.placement == "host"}
    batch = sum(load.ids.get(feature, 1) * content.width * _HALF_BYTES for feature, content in on_host.items())
    store = sum(store_bytes(content) for content in on_host.values())
    return Carried(
        store=-(-store // topology.ranks_per_node),
        made=batch * (load.batches_ahead + 1),  # one is in the making
        moved=batch * _BATCHES_ON_DEVICE,
        copied=batch,
    )


def store_bytes(content: ContentTableConfig) -> int:
    """Bytes of a modality's vectors in half precision; a store in int8 has half of them."""
    return content.num_embeddings * content.width * _HALF_BYTES


def carried_lines(contents: Mapping[str, ContentTableConfig], topology: Topology) -> tuple[TablePlan, ...]:
    """The lines of the modalities that travel with the batch."""
    return tuple(
        TablePlan(
            name=feature,
            rows=content.num_embeddings,
            dim=content.width,
            dtype=content.precision,
            sharding_type="host",
            compute_kernel="memory_map",
            shards=topology.nodes,
            optimizer="frozen",
            weight_bytes=store_bytes(content),
            state_bytes=0,
            bytes=store_bytes(content),
            bytes_per_rank=-(-store_bytes(content) // topology.ranks_per_node),
        )
        for feature, content in contents.items()
        if content.placement == "host"
    )
