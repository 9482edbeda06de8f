"""Tables that did not become what was asked for, that this device cannot look up, or that the batch has no ids for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.types import ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.diagnosis.finding import Finding


@dataclass(frozen=True)
class Asked:
    """What was asked for a table; None leaves it to the planner.

    Attributes:
        types: Sharding types.
        kernels: Compute kernels.
        field: Where it was asked, for the finding.
    """

    types: tuple[str, ...] | None
    kernels: tuple[str, ...] | None
    field: str


def tables_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, BaseEmbeddingConfig]]:
    """Path and module of every embedding collection of an unsharded model, with each of its tables."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingCollection):
            for table in module.embedding_configs():
                yield path, module, table
        elif isinstance(module, EmbeddingBagCollection):
            for bag in module.embedding_bag_configs():
                yield path, module, bag


def plan_findings(
    model: nn.Module, plan: ShardingPlan, device_type: str, asked: Mapping[str, Asked] | None = None
) -> list[Finding]:
    """Look at a plan before a model is sharded by it.

    Args:
        model: The unsharded model.
        plan: Its plan.
        device_type: Kind of the devices.
        asked: What was asked, by the tables' names.

    Returns:
        A finding for each table that would fail on these devices, or that is not what was asked for.
    """
    findings = []
    for path, module, table in tables_of(model):
        planned: dict[str, ParameterSharding] = plan.plan.get(path, {})  # type: ignore[assignment]
        part = planned.get(table.name)
        if part is None:
            findings.append(_unplanned(path, table.name))
            continue
        wish = (asked or {}).get(table.name)
        place = f"table {table.name} of {path}" + (f" ({wish.field})" if wish is not None else "")
        unpooled = isinstance(module, EmbeddingCollection)
        if unpooled and device_type == "cpu" and part.sharding_type == "data_parallel":
            findings.append(_fails_on_cpu(place))
        elif wish is not None:
            findings += _fallen_back(place, part, wish)
    return findings


def _fails_on_cpu(place: str) -> Finding:
    return Finding(
        check="tables",
        what="planned data_parallel, which an EmbeddingCollection cannot look up on a CPU: its forward would fail",
        where=place,
        remedy="allow it 'row_wise', 'table_wise' or 'column_wise' (ParameterConstraints.sharding_types)",
    )


def _unplanned(path: str, table: str) -> Finding:
    return Finding(
        check="tables",
        what="not in the plan: it stays a plain module, whole on every rank, and its gradient is dense",
        where=f"table {table} of {path}",
        remedy="plan it, or give a sharder for its collection",
    )


def _fallen_back(place: str, part: ParameterSharding, asked: Asked) -> list[Finding]:
    found = []
    pairs = (("sharding type", part.sharding_type, asked.types), ("kernel", part.compute_kernel, asked.kernels))
    for name, became, wanted in pairs:
        if wanted is not None and became not in wanted:
            found.append(
                Finding(
                    check="tables",
                    what=f"its {name} became {became!r}, asked for was {' or '.join(map(repr, wanted))}",
                    where=place,
                    remedy=f"allow {became!r}, or plan again for these devices",
                )
            )
    return found


def feature_findings(model: nn.Module, batch: Any) -> list[Finding]:
    """Findings for features of tables that no KeyedJaggedTensor of a batch has.

    Args:
        model: The unsharded model.
        batch: A batch, as the model's forward takes it.
    """
    keys = sorted({key for found in _keyed(batch, 0) for key in found.keys()})  # noqa: SIM118  a method, no dict
    return [
        Finding(
            check="data",
            what=f"feature {feature!r} is in no KeyedJaggedTensor of the batch, which has {', '.join(keys) or 'none'}",
            where=f"feature {feature} of table {table.name} ({path})",
            remedy="add the column to what makes batches, or take the feature out of the table",
        )
        for path, _, table in tables_of(model)
        for feature in table.feature_names
        if feature not in keys
    ]


def _keyed(value: Any, depth: int) -> Iterator[KeyedJaggedTensor]:
    """The KeyedJaggedTensors of a batch."""
    if isinstance(value, KeyedJaggedTensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _keyed(entry, depth)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _keyed(entry, depth)
    elif hasattr(value, "__dict__") and depth < 3:
        yield from _keyed(vars(value), depth + 1)
