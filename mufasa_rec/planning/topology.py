"""A cluster as it is planned for: nodes, devices, memory and bandwidths, written as ``128x8xH100`` or ``2xCPU``."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torchrec.distributed.planner import Topology as PlannerTopology

from mufasa_rec.distributed.sharding import planner_topology

GIB = 1 << 30
_GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What a job runs on. Numbers are those of one rank; bandwidths are in one direction.

    Attributes:
        name: As it was written.
        nodes: Nodes.
        ranks_per_node: Ranks of a node, one per GPU.
        compute_device: ``cuda`` or ``cpu``.
        hbm_bytes: The device's memory; 0 on a CPU.
        ddr_bytes: Share of the host's memory.
        ssd_bytes: Share of the host's SSDs.
        hbm_gb_s: Bandwidth of the device's memory, 10^9 bytes per second; unused on a CPU.
        ddr_gb_s: Bandwidth of host memory.
        ssd_gb_s: Bandwidth of an SSD.
        host_link_gb_s: Bandwidth between device and host.
        intra_node_gb_s: Bandwidth to other ranks of the node.
        inter_node_gb_s: Bandwidth to ranks of other nodes.
        tflops: Peak of dense matrix products in the precision of training (bf16 on a GPU), 10^12 per second.
    """

    name: str
    nodes: int
    ranks_per_node: int
    compute_device: Literal["cuda", "cpu"]
    hbm_bytes: int
    ddr_bytes: int
    ssd_bytes: int
    hbm_gb_s: float
    ddr_gb_s: float
    ssd_gb_s: float
    host_link_gb_s: float
    intra_node_gb_s: float
    inter_node_gb_s: float
    tflops: float

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name in ("hbm_bytes", "ssd_bytes") else 1e-9
            if not isinstance(value, str) and value < least:
                raise ValueError(f"topology {self.name}: {item.name}={value}: choose above 0.")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def memory_bytes(self) -> int:
        """Memory that tables of the fused kernel lie in."""
        return self.hbm_bytes if self.compute_device == "cuda" else self.ddr_bytes

    @classmethod
    def parse(cls, text: str, **overrides: Any) -> Topology:
        """Read a topology.

        Args:
            text: `<ranks>x<device>`, in nodes of 8 GPUs, or `<nodes>x<ranks per node>x<device>`; devices are H100,
                H200, A100 (of 80 GB) and CPU.
            overrides: Fields that differ from those of the device, such as `hbm_bytes`.

        Raises:
            ValueError: For another form, an unknown device or field, or a number of GPUs that fills no nodes.

        Example:
            >>> Topology.parse("128x8xH100").world_size, Topology.parse("64xH200").nodes
            (1024, 8)
        """
        *counts, device = text.strip().split("x")
        if device.upper() not in _DEVICES or not 1 <= len(counts) <= 2 or not all(_is_count(part) for part in counts):
            raise ValueError(
                f"topology={text!r}: give ranks x device or nodes x ranks x device, such as 8xH100, 64xH200, "
                f"128x8xH100 or 2xCPU; devices are {', '.join(_DEVICES)}."
            )
        node, ranks = (int(counts[0]), int(counts[1])) if len(counts) == 2 else _nodes(text, int(counts[0]), device)
        numbers: dict[str, Any] = dict(zip(_NUMBERS, _DEVICES[device.upper()]))
        kind: Literal["cuda", "cpu"] = "cuda"
        if device.upper() == "CPU":
            kind, numbers["ddr_bytes"] = "cpu", _this_machine() // ranks
        made = cls(name=text.strip(), nodes=node, ranks_per_node=ranks, compute_device=kind, **numbers)
        return made.override(**overrides)

    def override(self, **changes: Any) -> Topology:
        """The same with other numbers; a `ValueError` names a field that there is not."""
        known = [item.name for item in fields(self) if item.name not in ("name", "nodes", "compute_device")]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"topology {self.name}: {name} is no field; "
                    + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}.")
                )
        return replace(self, **changes)

    def grown(self, factor: int) -> Topology:
        """The same devices in `factor` times as many nodes; on one node not yet full, more of its devices."""
        nodes, ranks = self.nodes, self.ranks_per_node
        while factor > 1 and nodes == 1 and ranks * 2 <= _GPUS_PER_NODE and self.compute_device == "cuda":
            ranks, factor = ranks * 2, factor // 2
        device = self.name.rsplit("x", 1)[1]
        return replace(self, name=f"{nodes * factor}x{ranks}x{device}", nodes=nodes * factor, ranks_per_node=ranks)

    def planner(self, *, group_size: int | None = None, reserved_bytes: int = 0, scale: int = 1) -> PlannerTopology:
        """The same as TorchRec's planner sees it.

        Args:
            group_size: Ranks that hold one copy of the tables; all of them when None.
            reserved_bytes: Memory of each rank that tables may not have.
            scale: Times this much memory is pretended to be there, to see what a plan would need that does not fit.
        """
        free = max(self.memory_bytes - reserved_bytes, 1) * scale
        on_gpu = self.compute_device == "cuda"
        ranks = group_size or self.world_size
        return planner_topology(
            ranks,
            min(self.ranks_per_node, ranks),
            self.compute_device,
            {
                "hbm_cap_bytes": free if on_gpu else 0,
                "ddr_cap_bytes": self.ddr_bytes * scale if on_gpu else free,
                "ssd_cap_bytes": self.ssd_bytes * scale,
                "hbm_mem_bw": self.hbm_gb_s * 1e6,  # bytes per millisecond
                "ddr_mem_bw": self.ddr_gb_s * 1e6,
                "ssd_mem_bw": self.ssd_gb_s * 1e6,
                "hbm_to_ddr_mem_bw": self.host_link_gb_s * 1e6,
                "intra_host_bw": self.intra_node_gb_s * 1e6,
                "inter_host_bw": self.inter_node_gb_s * 1e6,
            },
        )


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _nodes(text: str, ranks: int, device: str) -> tuple[int, int]:
    """Nodes and their ranks for a number of ranks."""
    if device.upper() == "CPU" or ranks <= _GPUS_PER_NODE:
        return 1, ranks
    if ranks % _GPUS_PER_NODE:
        raise ValueError(
            f"topology={text!r}: {ranks} GPUs fill no nodes of {_GPUS_PER_NODE}; give nodes x GPUs x device, such as "
            f"{ranks}x1x{device}."
        )
    return ranks // _GPUS_PER_NODE, _GPUS_PER_NODE


def _this_machine() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_NUMBERS = ("hbm_bytes", "ddr_bytes", "ssd_bytes", "hbm_gb_s", "ddr_gb_s", "ssd_gb_s", "host_link_gb_s",
            "intra_node_gb_s", "inter_node_gb_s", "tflops")  # fmt: skip
# Data sheets: memory as a program sees it; NVLink per direction; a 400 Gb/s (A100: 200 Gb/s) port and 1/8 of 2 TB
# (A100: 1 TB) of host memory per GPU; PCIe 5 (A100: 4). A CPU's are those of one core, and of gloo on loopback.
_DEVICES: dict[str, tuple[float, ...]] = {
    "H100": (79 * GIB, 240 * GIB, 3_500 * GIB, 3350.0, 50.0, 5.0, 55.0, 400.0, 45.0, 989.0),
    "H200": (139 * GIB, 240 * GIB, 3_500 * GIB, 4800.0, 50.0, 5.0, 55.0, 400.0, 45.0, 989.0),
    "A100": (79 * GIB, 120 * GIB, 1_700 * GIB, 2039.0, 25.0, 3.0, 25.0, 270.0, 22.0, 312.0),
    "CPU": (0, GIB, 0, 1.0, 8.0, 1.0, 8.0, 1.0, 1.0, 0.1),
}
