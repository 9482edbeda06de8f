"""What a plan says: tables, memory by rank, time by part, a verdict; as JSON and as a page of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mufasa_rec.planning.topology import GIB, Topology

ASSUMPTIONS = (
    "times are estimates from data-sheet bandwidths, not measurements: lookups and updates by TorchRec's model of each "
    "kernel, collectives at full bandwidth, matrix products at {efficiency:.0%} of the device's peak, all histories as "
    "long as they may be; only the ids' own exchange is taken to be hidden behind the step before"
)


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """What a table becomes.

    Attributes:
        name: Its feature.
        rows: Rows.
        dim: Numbers of a row; of content those of a vector, without padding.
        dtype: Precision of its weights.
        sharding_type: How it is cut; ``host`` for content that travels with the batch.
        compute_kernel: Where it lies and what looks it up.
        shards: Parts.
        optimizer: Its optimizer, or ``frozen``.
        weight_bytes: Bytes of its weights over all ranks, one copy.
        state_bytes: Bytes of its optimizer state over all ranks, one copy.
        bytes: Both.
        bytes_per_rank: Most bytes of both that a rank holds, wherever they lie.
    """

    name: str
    rows: int
    dim: int
    dtype: str
    sharding_type: str
    compute_kernel: str
    shards: int
    optimizer: str
    weight_bytes: int
    state_bytes: int
    bytes: int
    bytes_per_rank: int


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Memory of one rank.

    Attributes:
        rank: The rank; of several groups, the first one's.
        hbm_bytes: All that lies in the device's memory.
        ddr_bytes: All that lies in the host's memory.
        ssd_bytes: All that lies on SSDs.
        parts: Where it goes: ``tables``, ``content``, ``exchange``, ``dense``, ``activations``, ``runtime``.
    """

    rank: int
    hbm_bytes: int
    ddr_bytes: int
    ssd_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change with which it was planned again.

    Attributes:
        change: What is changed, in words.
        options: The options that change it.
        fits: Whether it fits then.
        memory_bytes: Memory that the fullest rank needs then, of the kind that tables lie in.
        step_time_ms: Estimated step time then.
    """

    change: str
    options: str
    fits: bool
    memory_bytes: int
    step_time_ms: float


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A run planned on a topology.

    Attributes:
        topology: What it is planned on.
        fits: Whether every rank has the memory.
        verdict: The same in a sentence.
        tables: What each table becomes.
        ranks: Memory of each rank.
        capacity: Bytes that a rank may use: ``hbm``, ``ddr``, ``ssd``.
        step_time_ms: Estimated time of a step.
        step_parts: Its parts, in milliseconds; all but the hidden one add up to it, unless that is longer.
        bottleneck: The longest part.
        remedies: Changes that were planned again, when it does not fit.
        document: The plan for a file, with which `train` runs; empty when it does not fit.
        assumptions: What the estimates take for granted.
    """

    topology: Topology
    fits: bool
    verdict: str
    tables: tuple[TablePlan, ...]
    ranks: tuple[RankPlan, ...]
    capacity: Mapping[str, int]
    step_time_ms: float
    step_parts: Mapping[str, float]
    bottleneck: str
    remedies: tuple[Remedy, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    assumptions: str = ""

    @property
    def fullest(self) -> RankPlan:
        """The rank that needs most of the memory that tables lie in."""
        return max(self.ranks, key=lambda rank: (self.memory(rank), rank.ddr_bytes))

    def memory(self, rank: RankPlan) -> int:
        """What a rank needs of the memory that tables lie in."""
        return rank.hbm_bytes if self.topology.compute_device == "cuda" else rank.ddr_bytes

    def as_json(self) -> dict[str, Any]:
        """Everything but the document of the plan itself."""
        found = {name: value for name, value in asdict(self).items() if name not in ("document", "topology")}
        return {"topology": asdict(self.topology) | {"world_size": self.topology.world_size}, **found}


def page(report: PlanReport) -> str:
    """A report for a reader."""
    where = report.topology
    lines = [
        f"{where.name}: {where.world_size:,} ranks, {where.ranks_per_node} a node; a rank may use "
        f"{size(report.capacity['hbm'])} of its device's memory and {size(report.capacity['ddr'])} of its host's",
        "",
        *_table_lines(report.tables),
        "",
        *_rank_lines(report),
        "",
        f"step (estimate) {report.step_time_ms:.1f} ms; the longest part: {report.bottleneck}",
        *[f"  {name:<22} {ms:>10.3f} ms" for name, ms in report.step_parts.items()],
        f"  ({report.assumptions})",
        "",
        report.verdict,
    ]
    return "\n".join([*lines, *_remedy_lines(report.remedies)])


def _table_lines(tables: Sequence[TablePlan]) -> list[str]:
    head = (
        "table",
        "rows",
        "dim",
        "dtype",
        "sharding",
        "kernel",
        "shards",
        "optimizer",
        "weights",
        "state",
        "per rank",
    )
    rows = [
        (t.name, f"{t.rows:,}", str(t.dim), t.dtype, t.sharding_type, t.compute_kernel, str(t.shards), t.optimizer,
         size(t.weight_bytes), size(t.state_bytes), size(t.bytes_per_rank))
        for t in tables
    ]  # fmt: skip
    return aligned([head, *rows])


def _rank_lines(report: PlanReport) -> list[str]:
    """The fullest and the emptiest rank."""
    emptiest = min(report.ranks, key=report.memory)
    shown = [("fullest", report.fullest), ("emptiest", emptiest)]
    parts = list(report.fullest.parts)
    head = ("rank", "device", "free", "host", "free", "SSD", *parts)
    rows = [
        (f"{rank.rank} ({name})", size(rank.hbm_bytes), size(report.capacity["hbm"] - rank.hbm_bytes),
         size(rank.ddr_bytes), size(report.capacity["ddr"] - rank.ddr_bytes), size(rank.ssd_bytes),
         *(size(rank.parts[part]) for part in parts))
        for name, rank in shown
    ]  # fmt: skip
    return aligned([head, *rows])


def _remedy_lines(remedies: Sequence[Remedy]) -> list[str]:
    if not remedies:
        return []
    head = ("what would help", "options", "fits", "fullest rank", "step")
    rows = [
        (one.change, one.options, "yes" if one.fits else "no", size(one.memory_bytes), f"{one.step_time_ms:.1f} ms")
        for one in remedies
    ]
    return ["", *aligned([head, *rows])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines: numbers to the right, the first column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column and (cell[:1].isdigit() or cell[:1] == "-") else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def size(count: int) -> str:
    """Bytes for a reader.

    Example:
        >>> size(3 << 30), size(1 << 20), size(0)
        ('3.0 GiB', '1.0 MiB', '0')
    """
    if count == 0:
        return "0"
    for unit, one in (("TiB", GIB << 10), ("GiB", GIB), ("MiB", 1 << 20)):
        if abs(count) >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
