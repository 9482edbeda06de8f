"""What would make a run fit that does not: each change is a configuration of its own, planned again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed.content_config import ContentConfig
from mufasa_rec.planning.report import PlanReport, Remedy
from mufasa_rec.planning.topology import Topology

_MOST_NODES = 16  # times as many
PlanAgain = Callable[[RunConfig, Topology], PlanReport]


@dataclass(frozen=True)
class Change:
    """A changed run.

    Attributes:
        words: What is changed.
        options: Options that change it.
        config: The changed configuration.
        topology: The changed topology.
    """

    words: str
    options: str
    config: RunConfig
    topology: Topology


def find(
    config: RunConfig, topology: Topology, plan_again: PlanAgain, *, has_content: bool = True
) -> tuple[Remedy, ...]:
    """Plan every change that applies to a run.

    Args:
        config: The run that does not fit.
        topology: Where it does not fit.
        plan_again: Plans a changed run.
        has_content: Whether the run reads content.

    Returns:
        Those that make it fit first, then those that only help, in order of the memory that they need.
    """
    applying = changes(config, topology, has_content=has_content)
    found = [_remedy(change, plan_again(change.config, change.topology)) for change in applying]
    found += _more_ranks(config, topology, plan_again)
    return tuple(sorted(found, key=lambda remedy: (not remedy.fits, remedy.memory_bytes)))


def _remedy(change: Change, report: PlanReport) -> Remedy:
    return Remedy(
        change=change.words,
        options=change.options,
        fits=report.fits,
        memory_bytes=report.memory(report.fullest),
        step_time_ms=report.step_time_ms,
    )


def _more_ranks(config: RunConfig, topology: Topology, plan_again: PlanAgain) -> Iterator[Remedy]:
    """The least power of two of the nodes that fits, else the most that is tried."""
    factor = 2
    while True:
        larger = topology.grown(factor)
        report = plan_again(config, larger)
        if report.fits or factor >= _MOST_NODES:
            words = f"{larger.world_size:,} ranks instead of {topology.world_size:,}"
            yield _remedy(Change(words, f"--topology {larger.name}", config, larger), report)
            return
        factor *= 2


def changes(config: RunConfig, topology: Topology, *, has_content: bool = True) -> Iterator[Change]:
    """Single changes that apply, and all that change no result but by rounding, together."""
    single = list(_single(config, topology))
    if has_content and config.uses_content and config.content == ContentConfig():
        single += _content(config, topology)
    for words, options, changed in single:
        yield Change(words, options, changed, topology)
    together, names, options = config, [], []
    for change in (_half_weights, _row_wise_optimizer, _caching):
        found = change(together, topology)
        if found is not None:
            names.append(found[0])
            options.append(found[1])
            together = found[2]
    if len(names) > 1:
        yield Change(" and ".join(names), " ".join(options), together, topology)


Changed = tuple[str, str, RunConfig]


def _single(config: RunConfig, topology: Topology) -> Iterator[Changed]:
    for change in (_half_weights, _row_wise_optimizer, _caching, _smaller_width, _smaller_batch):
        found = change(config, topology)
        if found is not None:
            yield found


def _content(config: RunConfig, topology: Topology) -> Iterator[Changed]:
    """Content elsewhere, where there is another place than a rank's own memory, or in fewer bits."""
    if topology.compute_device != "cpu":
        on_host = ContentConfig(placement="host")
        yield "content in host memory", "--content.placement host", replace(config, content=on_host)
    try:
        coded = replace(config, content=ContentConfig(precision="int8"))
    except ValueError:  # the run averages or rounds what is looked up
        return
    yield "content in 8 bits", "--content.precision int8", coded


def _half_weights(config: RunConfig, topology: Topology) -> Changed | None:
    if config.tables.weight_dtype != "fp32":
        return None
    tables = replace(config.tables, weight_dtype="fp16")
    return "fp16 weights", "--tables.weight-dtype fp16", replace(config, tables=tables)


def _row_wise_optimizer(config: RunConfig, topology: Topology) -> Changed | None:
    if config.optimizer.tables.name in ("row_wise_adagrad", "sgd"):
        return None
    optimizer = replace(config.optimizer, tables=replace(config.optimizer.tables, name="row_wise_adagrad"))
    options = "--optimizer.tables.name row_wise_adagrad"
    return "row-wise optimizer", options, replace(config, optimizer=optimizer)


def _caching(config: RunConfig, topology: Topology) -> Changed | None:
    if topology.compute_device == "cpu" or config.sharding.kernels != ("fused",):
        return None
    sharding = replace(config.sharding, kernels=("fused", "fused_uvm_caching"))
    options = "--sharding.kernels fused fused_uvm_caching"
    return "tables in host memory behind a cache", options, replace(config, sharding=sharding)


def _smaller_batch(config: RunConfig, topology: Topology) -> Changed | None:
    size, readers = config.data.batch_size // 2, config.data.num_readers
    if config.data.batch_size % 2 or size < topology.world_size or size % readers:
        return None
    data = replace(config.data, batch_size=size)
    return f"global batches of {size:,}", f"--data.batch-size {size}", replace(config, data=data)


def _smaller_width(config: RunConfig, topology: Topology) -> Changed | None:
    retrieval = config.task == "retrieval"
    part = config.model if retrieval else config.ranker
    heads = config.model.extractor.num_heads if retrieval else config.ranker.sal.num_heads
    step = math.lcm(4, 2 * heads)  # a head needs an even width
    width = part.width // 2 // step * step
    if width < step:
        return None
    if retrieval:
        return f"width {width}", f"--model.width {width}", replace(config, model=replace(config.model, width=width))
    return f"width {width}", f"--ranker.width {width}", replace(config, ranker=replace(config.ranker, width=width))
