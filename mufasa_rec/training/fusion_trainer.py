"""The loop that trains the fusion layer: steps keyed by (seed, step), early stopping on held-out items, checkpoints.

Smaller than `Trainer`, which is made for sharded tables, pipelines and readers of rows; signals, the agreement of
ranks, checkpoints, optimizer and metrics are the same objects. A state is saved only behind a step and its validation,
so (number of steps, progress) is all that says where a run stands.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mufasa_rec.distributed.collectives import RankExchange, host_group
from mufasa_rec.modules.fusion import ItemContent
from mufasa_rec.modules.fusion_batch import Behaviour
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.fusion_trainer_config import FusionTrainerConfig
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.preemption import Agreement, Preempted, StopAgreed, StopSignals
from mufasa_rec.training.progress import Progress, seed_step
from mufasa_rec.training.saver import Saver
from mufasa_rec.training.tracker import Tracker

logger = logging.getLogger(__name__)
Batch = tuple[ItemContent, Behaviour]


class Feed(Protocol):
    """This rank's parts of batches."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        ...

    def held_out(self) -> Iterator[Batch]:
        """Batches of the held-out items, the same each time."""
        ...


class NoTables:
    """Stands where a model with tables has their fused optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def zero_grad(self) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Do nothing."""

    def set_optimizer_step(self, step: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {"state": {}}


@dataclass(frozen=True)
class FusionSurroundings:
    """What the loop reports to and saves with; as `trainer.Surroundings`.

    Attributes:
        tracker: Where metrics go.
        exchange: Reaches the other ranks.
        saver: Writes checkpoints.
        seed: Seed of the run.
        watch: Called with the number of steps after each.
    """

    tracker: Tracker
    exchange: RankExchange
    saver: Saver
    seed: int = 0
    watch: Callable[[int], None] | None = None


class FusionTrainer:
    """Trains a `Fuser`.

    Args:
        module: The module whose weights are saved.
        model: What is stepped: the module, or the module wrapped for several ranks.
        optimizer: Updates the weights.
        feed: Gives batches.
        config: How long, and with what care.
        surroundings: What the loop reports to and saves with.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: TrainOptimizer,
        feed: Feed,
        config: FusionTrainerConfig,
        surroundings: FusionSurroundings,
    ) -> None:
        self.module, self.model, self.optimizer, self.feed, self.config = module, model, optimizer, feed, config
        self.around, self.tracker, self.saver = surroundings, surroundings.tracker, surroundings.saver
        self.progress = Progress()
        self.begin = time.perf_counter()
        self._sums: dict[str, Tensor] = {}  # on the device, so that no step waits for them
        self._counted = 0
        self._saved_at = -1
        self.signals = StopSignals(self.saver.config.grace_s)
        alone = surroundings.exchange.world_size == 1
        self.agreement = Agreement(None if alone else host_group(), num_wishes=2)

    def restore(self, manifest: Manifest) -> None:
        """Continue where a checkpoint was written; collective.

        Raises:
            ValueError: When the model or the seed is not the checkpoint's.
        """
        state = manifest.state
        if state["seed"] != self.around.seed:
            raise ValueError(
                f"seed={self.around.seed}: the checkpoint has seed {state['seed']}; continue with that one."
            )
        self.saver.load(manifest, self._tensors())
        self.optimizer.resume(manifest.step)
        self.progress = Progress(**state["progress"])
        device = next(self.module.parameters()).device
        sums, self._counted = state["interval"]["sums"], state["interval"]["steps"]
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in sums.items()}
        self._saved_at = manifest.step
        self.begin = time.perf_counter() - self.progress.seconds

    def fit(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The best validation, steps and seconds in all.

        Raises:
            Preempted: When the run was asked to stop and has been saved.
        """
        try:
            with self.signals:
                try:
                    while not self._ended():
                        self._step()
                    self.agreement.close()
                    self._save_last()
                except StopAgreed:
                    self._stop()
        finally:
            self.tracker.close()
        seconds = time.perf_counter() - self.begin
        return {"best": self.progress.best, "steps": self.optimizer.num_steps, "seconds": seconds}

    def _ended(self) -> bool:
        patience = self.config.patience
        return self._last() or bool(patience and self.progress.poor >= patience)

    def _last(self) -> bool:
        """Whether there are no more steps, or a validation comes last."""
        steps, most = self.optimizer.num_steps, self.config.max_steps
        return self.progress.epoch >= self.config.epochs or (most is not None and steps >= most)

    def _step(self) -> None:
        seed_step(self.around.seed, self.optimizer.num_steps, self.around.exchange.rank)
        self.model.train()
        total, terms = self.model(*self.feed.batch(self.optimizer.num_steps))
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self._count(total, terms)
        self.tracker.advance()
        step, progress = self.optimizer.num_steps, self.progress
        progress.epoch, progress.step = divmod(step, self.feed.steps_per_epoch)
        if step % self.config.log_every == 0 or (self._last() and self._counted):
            self._record()
        closes = progress.step == 0 and progress.epoch % self.config.validate_every == 0
        if closes or self._last():
            self._validate()
        if self.around.watch is not None:
            self.around.watch(step)
        stop, due = self.agreement.ask(self.signals.received is not None, self.saver.due)
        if stop:
            raise StopAgreed
        if (due or self.saver.due_at(step)) and self._saved_at != step:
            self._save()

    def _count(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        for name, value in {"loss": total.detach(), **terms}.items():
            value = value.double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counted += 1

    def _record(self) -> None:
        """End an interval: means of the loss and its terms, which are of all ranks already."""
        step = self.optimizer.num_steps
        metrics = {name: float(value) / self._counted for name, value in self._sums.items()}
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"loss={metrics['loss']} at step {step}: lower optimizer.learning_rate.")
        self._sums, self._counted = {}, 0
        about = {
            "epoch": self.progress.epoch,
            "time_s": time.perf_counter() - self.begin,
            "learning_rate": self.optimizer.learning_rate,
            "grad_norm": float(self.optimizer.grad_norm),
        }
        self.tracker.record("train", step, {**metrics, **about}, f"step {step:6d} · {_line(metrics)}")

    def _validate(self) -> None:
        """Validate on the held-out items; the best so far is saved before training goes on."""
        self.model.eval()
        sums, batches = {}, 0
        with torch.no_grad():
            for items, behaviour in self.feed.held_out():
                total, terms = self.module(items, behaviour)
                batches += 1
                for name, value in {"loss": total, **terms}.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        metrics = {name: value / max(batches, 1) for name, value in sums.items()} or {"loss": 0.0}
        # All ranks must decide alike, also where their arithmetic differs in the last bit.
        metrics = self.around.exchange.objects(metrics)[0]
        step, epoch, best = self.optimizer.num_steps, self.progress.epoch, self.progress.best
        record = {"epoch": epoch, "time_s": time.perf_counter() - self.begin, **metrics}
        self.tracker.record("validation", step, record, f"epoch {epoch:3d} validation · {_line(metrics)}")
        if best and batches and not metrics["loss"] < best["loss"]:
            self.progress.poor += 1
            return
        name = self.saver.name(step)
        self.progress.best = {**metrics, "step": step, "epoch": epoch, "checkpoint": name}
        self.progress.poor = 0
        self._save(name=name, wait=True)  # small, and what the catalog is encoded with: it must be there

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.tensors()["dense"]}

    def _save(self, *, name: str | None = None, wait: bool = False) -> None:
        name = name or self.saver.name(self.optimizer.num_steps)
        self.progress.seconds = time.perf_counter() - self.begin
        state = {
            "progress": asdict(self.progress),
            "seed": self.around.seed,
            "interval": {"sums": {name: float(value) for name, value in self._sums.items()}, "steps": self._counted},
            "metrics_bytes": self.around.exchange.objects(self.tracker.position)[0],
        }
        step = self.optimizer.num_steps
        self.saver.save(Manifest(name=name, step=step, state=state, about={}), self._tensors(), wait=wait)
        self._saved_at = step

    def _save_last(self) -> None:
        """Return when the run's present state is on the disk."""
        self.saver.wait()
        if self.saver.failed or self._saved_at != self.optimizer.num_steps:
            self._save(wait=True)

    def _stop(self) -> None:
        """Save where the run stands, and leave."""
        self.agreement.close()
        try:
            self._save_last()
        except OSError as error:
            raise Preempted from error  # the saver has said why, and the last complete checkpoint stands
        logger.info("asked to stop: saved at step %d; start the same command again", self.optimizer.num_steps)
        raise Preempted


def _line(metrics: dict[str, float]) -> str:
    """The loss and its four terms for a reader of the log."""
    return " · ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)
