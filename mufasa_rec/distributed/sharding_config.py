"""How tables are spread over ranks: what may be chosen, for all tables and for single ones, and on which devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mufasa_rec.distributed.table_config import Precision

# TorchRec's names. An EmbeddingCollection has no others but data_parallel, whose tables no fused optimizer updates.
ShardingType = Literal["row_wise", "table_wise", "column_wise"]
Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching", "key_value"]
_CACHED: tuple[Kernel, ...] = ("fused_uvm_caching", "key_value")
_REFUSED_TYPES = {
    "data_parallel": "no fused optimizer updates its tables, and on a CPU its lookup fails",
    "table_row_wise": "TorchRec has it for pooled tables only",
    "table_column_wise": "TorchRec has it for pooled tables only",
    "grid_shard": "TorchRec has it for pooled tables only",
}


@dataclass(frozen=True, kw_only=True)
class TableSharding:
    """What differs for one table; None takes what holds for all.

    Attributes:
        types: Sharding types that the planner may choose from.
        kernels: Compute kernels that the planner may choose from.
        cache_share: Share of the table's rows that a cached kernel keeps on the device.
    """

    types: tuple[ShardingType, ...] | None = None
    kernels: tuple[Kernel, ...] | None = None
    cache_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How tables are spread over ranks.

    Attributes:
        types: Sharding types that the planner may choose from; None for table-wise on one rank, row-wise on CPUs, and
            row-wise and table-wise on GPUs.
        kernels: Where weights may lie and what looks them up: ``fused`` (the device's memory), ``fused_uvm`` (host
            memory), ``fused_uvm_caching`` (host memory, with a cache on the device), ``key_value`` (SSD, with such a
            cache). Nothing leaves the device's memory that is not asked to.
        cache_share: Share of a table's rows that a cached kernel keeps on the device.
        min_columns: Least columns of a column-wise shard.
        tables: What differs for single tables, by feature (``item``, ``item.brand``, ``content.title``).
        forward_comms: Precision of vectors on their way from the ranks that hold them.
        backward_comms: Precision of their gradients on the way back.
        group_size: Ranks that hold one copy of the tables; None for all of them. Several groups (TorchRec's 2D
            parallelism) average their tables every `sync_every` steps.
        sync_every: Steps between two averages of the groups' tables.
        prefetch: Fetch the rows of the next batch into the caches while this one is computed.
        ssd_folder: Folder on a local SSD, for ``key_value``.
        plan: File of a saved plan, which is then used as it is; empty to plan at the start.
    """

    types: tuple[ShardingType, ...] | None = None
    kernels: tuple[Kernel, ...] = ("fused",)
    cache_share: float = 0.2
    min_columns: int = 32
    tables: dict[str, TableSharding] = field(default_factory=dict)
    forward_comms: Precision = "fp32"
    backward_comms: Precision = "fp32"
    group_size: int | None = None
    sync_every: int = 1
    prefetch: bool = False
    ssd_folder: str = ""
    plan: str = ""

    def __post_init__(self) -> None:
        _check_names("sharding.types", self.types, get_args(ShardingType))
        _check_names("sharding.kernels", self.kernels, get_args(Kernel))
        _check_share("sharding.cache_share", self.cache_share)
        for name, table in self.tables.items():
            _check_names(f"sharding.tables[{name!r}].types", table.types, get_args(ShardingType))
            _check_names(f"sharding.tables[{name!r}].kernels", table.kernels, get_args(Kernel))
            if table.cache_share is not None:
                _check_share(f"sharding.tables[{name!r}].cache_share", table.cache_share)
        _check_names("sharding.forward_comms", (self.forward_comms,), get_args(Precision))
        _check_names("sharding.backward_comms", (self.backward_comms,), get_args(Precision))
        if self.min_columns < 4 or self.min_columns % 4:
            raise ValueError(f"sharding.min_columns={self.min_columns}: choose a positive multiple of 4.")
        for name in ("group_size", "sync_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"sharding.{name}={getattr(self, name)}: choose 1 or more.")
        self._check_caches()

    def _check_caches(self) -> None:
        kernels = {kernel for name in ("", *self.tables) for kernel in self.kernels_of(name)}
        if self.prefetch and "fused_uvm_caching" not in kernels:
            raise ValueError(
                "sharding.prefetch=True: no table may be cached; add 'fused_uvm_caching' to sharding.kernels, or leave "
                "it False."
            )
        if "key_value" in kernels and not self.ssd_folder:
            raise ValueError("sharding.kernels: 'key_value' keeps rows on an SSD; give sharding.ssd_folder.")

    def types_of(self, table: str, device_type: str, world_size: int) -> tuple[ShardingType, ...]:
        """Sharding types that a table may have on a kind of device.

        One rank has a table whole anyhow; by rows TorchRec would sort ids into one bucket, and vectors back again: half
        of a lookup's time on a CPU.
        """
        chosen = self.tables.get(table, TableSharding()).types or self.types
        if chosen:
            return chosen
        if world_size == 1:
            return ("table_wise",)
        return ("row_wise",) if device_type == "cpu" else ("row_wise", "table_wise")

    def kernels_of(self, table: str) -> tuple[Kernel, ...]:
        """Compute kernels that a table may have."""
        return self.tables.get(table, TableSharding()).kernels or self.kernels

    def cache_share_of(self, table: str) -> float | None:
        """Share of a table's rows that is cached; None where it may have no cache."""
        if not set(self.kernels_of(table)) & set(_CACHED):
            return None
        own = self.tables.get(table, TableSharding()).cache_share
        return self.cache_share if own is None else own

    def with_managed(self, tables: Iterable[str]) -> ShardingConfig:
        """The same, with the one way that tables with managed rows can be sharded."""
        own = {name: TableSharding(types=("row_wise",), kernels=("fused",)) for name in tables}
        return replace(self, tables={**self.tables, **own}) if own else self

    def for_judging(self, device_type: str) -> ShardingConfig:
        """The same for looking tables up only, on any number of ranks: no saved plan, no groups, nothing ahead.

        On a CPU tables are held in memory, whatever kernels they were trained with on a GPU.
        """
        changes: dict[str, Any] = {"plan": "", "group_size": None, "prefetch": False}
        if device_type == "cpu":
            tables = {name: replace(table, kernels=None) for name, table in self.tables.items()}
            changes |= {"kernels": ("fused",), "tables": tables, "forward_comms": "fp32", "backward_comms": "fp32"}
        return replace(self, **changes)

    def refuse_on(self, device_type: str, world_size: int) -> None:
        """Refuse what a kind of device cannot do, and groups that do not fit a world.

        Raises:
            ValueError: Names the field and what to choose instead.
        """
        group = self.group_size or world_size
        if world_size % group:
            raise ValueError(
                f"sharding.group_size={group}: must divide the {world_size} ranks; choose a divisor, or leave it out."
            )
        if device_type != "cpu":
            return
        for name in ("", *self.tables):
            kernels = [kernel for kernel in self.kernels_of(name) if kernel != "fused"]
            if kernels:
                field_name = f"sharding.tables[{name!r}].kernels" if name else "sharding.kernels"
                raise ValueError(
                    f"{field_name}: {kernels[0]!r} moves rows between a GPU and its host; on a CPU choose 'fused'."
                )
        for name in ("forward_comms", "backward_comms"):
            if getattr(self, name) == "bf16":
                raise ValueError(f"sharding.{name}='bf16': gloo has no bf16; on a CPU choose 'fp16' or 'fp32'.")
        if group != world_size:
            raise ValueError(
                f"sharding.group_size={group}: TorchRec keeps several copies of tables on GPUs only; on a CPU leave it "
                "out."
            )

    def refuse_unknown(self, tables: Iterable[str]) -> None:
        """Refuse settings of tables that there are not.

        Raises:
            ValueError: Names the table, and those there are.
        """
        known = sorted(tables)
        for name in self.tables:
            if name not in known:
                raise ValueError(f"sharding.tables: {name!r} is no table of this run; there are {', '.join(known)}.")


def _check_names(field_name: str, chosen: tuple[str, ...] | None, known: tuple[str, ...]) -> None:
    if chosen == ():
        raise ValueError(f"{field_name} is empty: name at least one, or leave it out.")
    for name in chosen or ():
        if name in _REFUSED_TYPES:
            raise ValueError(
                f"{field_name}: {name!r} is not for these tables ({_REFUSED_TYPES[name]}); choose from "
                f"{', '.join(known)}."
            )
        if name not in known:
            raise ValueError(f"{field_name}: {name!r}: choose from {', '.join(known)}.")


def _check_share(field_name: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"{field_name}={share}: choose above 0 and below 1.")
