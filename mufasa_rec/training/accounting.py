"""What one interval of training did and where its time went, summed over ranks once per interval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mufasa_rec.distributed.managed_ids import COUNTERS

T = TypeVar("T")


def train_line(step: int, metrics: dict[str, float]) -> str:
    """The accounting line of an interval."""
    return (
        f"epoch {metrics['epoch']:3d} step {step:6d} · loss {metrics['loss']:.4f} · {metrics['step_ms']:.0f} ms/step · "
        f"{metrics['samples_per_s']:,.0f} rows/s · {metrics['events_per_s']:,.0f} events/s · "
        f"padding {metrics['padding_share']:.1%} · imbalance {metrics['rank_imbalance']:.1%} · "
        f"dedup {metrics['dedup_ratio']:.1f}" + _histories(metrics["history_ratio"]) + " · "
        f"data wait {metrics['data_wait_share']:.1%} · lr {metrics['learning_rate']:.2g} · "
        f"|g| {metrics['grad_norm']:.2f}"
        + (f" · τ {metrics['temperature']:.3f}" if metrics["temperature"] else "")
        + "".join(
            _ids_line(name.removesuffix("_hit_share"), metrics) for name in metrics if name.endswith("_hit_share")
        )
    )


def _histories(ratio: float) -> str:
    """How many candidates read one history, where several do."""
    return f" (histories {ratio:.1f})" if ratio > 1 else ""


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What a step of one rank was made of.

    Attributes:
        targets: Targets, or candidates that were scored.
        rows: Rows, or requests, each with one history.
        readings: What the histories were read for: rows, or candidates.
        events: Events of the histories.
        places: Places that the events took with their padding.
        asked: Items that events, targets and candidates asked for.
        items: Items that were looked up for that.
    """

    targets: int = 0
    rows: int = 0
    readings: int = 0
    events: int = 0
    places: int = 0
    asked: int = 0
    items: int = 0


_COUNTS = tuple(field.name for field in fields(StepCounts))


def _ids_line(feature: str, metrics: dict[str, float]) -> str:
    """What became of the ids of a managed table."""
    shares = {name: metrics[f"{feature}_{name}_share"] for name in ("hit", "fallback", "admitted", "evicted")}
    return f" · {feature} " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def id_metrics(feature: str, sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an interval of a managed table.

    Args:
        feature: The table's feature.
        sums: What `COUNTERS` names, over all ranks.
    """
    counted, lookups = max(sums["counted"], 1.0), max(sums["lookups"], 1.0)
    return {
        f"{feature}_hit_share": sums["hits"] / counted,
        f"{feature}_fallback_share": sums["fallbacks"] / lookups,
        f"{feature}_admitted_share": sums["admitted"] / counted,
        f"{feature}_evicted_share": sums["evicted"] / counted,
        **{f"{feature}_{name}": sums[name] for name in ("counted", "lookups", "admitted", "evicted")},
    }


class RankSum(Protocol):
    """What accounting needs from the other ranks."""

    world_size: int

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks."""
        ...


@dataclass
class Waiting:
    """Time spent waiting for batches, in seconds."""

    seconds: float = 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches through and count how long each made the caller wait."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


class Interval:
    """Sums of one logging interval. Losses stay on the device until the interval ends.

    Args:
        exchange: Reaches the other ranks.
        waiting: Counts the wait for data.
        device: Where sums are made.
        ids: Counters of the managed tables by feature, which count on the device by themselves.
    """

    def __init__(
        self, exchange: RankSum, waiting: Waiting, device: torch.device, ids: Mapping[str, Tensor] | None = None
    ) -> None:
        self.exchange, self.waiting, self.device, self.ids = exchange, waiting, device, ids or {}
        self._reset()

    def _reset(self) -> None:
        self.begin, self.steps = time.perf_counter(), 0
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.waiting.seconds = 0.0
        for counters in self.ids.values():
            counters.zero_()

    def add(self, loss_sum: Tensor, counts: StepCounts) -> None:
        """Count one step of this rank."""
        self.steps += 1
        self.loss += loss_sum
        for name, count in asdict(counts).items():
            self.counts[name] += count

    def state(self) -> dict[str, Any]:
        """What this rank has counted since the interval began, without times: they do not outlive the process."""
        ids = {feature: counters.tolist() for feature, counters in self.ids.items()}
        return {"loss": float(self.loss), "steps": self.steps, **self.counts, **({"ids": ids} if ids else {})}

    def restore(self, states: list[dict[str, Any]], rank: int) -> None:
        """Continue an interrupted interval.

        Args:
            states: What each rank had counted; on another number of ranks the first takes the sums.
            rank: This rank.
        """
        ids = [state.get("ids", {}) for state in states]
        if len(states) != self.exchange.world_size:
            total = {name: sum(state[name] for state in states) for name in states[0] if name != "ids"}
            total["steps"] = states[0]["steps"]
            states = [total] + [{**dict.fromkeys(total, 0), "steps": total["steps"]}] * (self.exchange.world_size - 1)
            summed = {feature: [sum(column) for column in zip(*(one[feature] for one in ids))] for feature in ids[0]}
            ids = [summed] + [{feature: [0] * len(COUNTERS) for feature in summed}] * (self.exchange.world_size - 1)
        self._reset()
        for feature, counters in self.ids.items():
            counters += torch.tensor(ids[rank][feature], device=counters.device)
        self.loss += states[rank]["loss"]
        self.steps = int(states[rank]["steps"])
        for name in _COUNTS:
            self.counts[name] = int(states[rank].get(name, 0))  # an older checkpoint counts fewer things

    def close(self) -> dict[str, float]:
        """End the interval on all ranks together; returns its metrics and begins the next one."""
        seconds = time.perf_counter() - self.begin
        mine = [self.waiting.seconds, self.counts["events"] ** 2, *self.counts.values()]
        counted = [counters.double() for counters in self.ids.values()]
        sums = torch.cat([self.loss[None], torch.tensor(mine, dtype=torch.float64, device=self.device), *counted])
        loss, waited, squares, *rest = self.exchange.sum(sums).tolist()
        total, by_id = dict(zip(_COUNTS, rest)), rest[len(_COUNTS) :]
        ranks, events = self.exchange.world_size, total["events"]
        spread = max(squares * ranks / max(events, 1.0) ** 2 - 1.0, 0.0) ** 0.5  # standard deviation over the mean
        steps = max(self.steps, 1)
        metrics = {
            "loss": loss / max(total["targets"], 1.0),
            "samples_per_s": total["rows"] / seconds,
            "events_per_s": events / seconds,
            # an extractor may read the newest events only
            "padding_share": max(0.0, 1.0 - events / max(total["places"], 1.0)),
            "rank_imbalance": spread,
            "dedup_ratio": total["asked"] / max(total["items"], 1.0),
            "history_ratio": total["readings"] / max(total["rows"], 1.0),
            "data_wait_share": waited / ranks / seconds,
            "step_ms": 1000.0 * seconds / steps,
        }
        for index, feature in enumerate(self.ids):
            part = by_id[index * len(COUNTERS) : (index + 1) * len(COUNTERS)]
            metrics |= id_metrics(feature, dict(zip(COUNTERS, part)))
        self._reset()
        return metrics
