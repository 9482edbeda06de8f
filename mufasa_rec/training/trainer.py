"""The training loop: pipelined steps, one accounting line per interval, validation, early stopping, checkpoints.

The loop is a function of its `Progress` and of the weights: an interrupted run continues in the middle of an epoch, or
in front of a validation, as if nothing had happened.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mufasa_rec.data.row_loader import RowLoader
from mufasa_rec.distributed.collectives import RankExchange, host_group
from mufasa_rec.distributed.managed_collision import managed_ids
from mufasa_rec.distributed.managed_history import history, restore_history
from mufasa_rec.training.accounting import Interval, StepCounts, Waiting, train_line
from mufasa_rec.training.checkpoint import model_state
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.pipelining import check_pipelined, make_pipeline
from mufasa_rec.training.preemption import Agreement, Preempted, StopAgreed, StopSignals
from mufasa_rec.training.progress import Progress, check_data, run_state, seed_step
from mufasa_rec.training.saver import Saver
from mufasa_rec.training.tracker import Tracker
from mufasa_rec.training.trainer_config import TrainerConfig

logger = logging.getLogger(__name__)


class StepOutput(Protocol):
    """What the trainer reads of a model's output."""

    loss_sum: Tensor
    num_places: int
    temperature: Tensor


class StepBatch(Protocol):
    """What the trainer reads of a batch."""

    num_targets: int
    num_rows: int
    num_asked: int

    @property
    def num_events(self) -> int:
        """Events of this rank's histories."""
        ...

    @property
    def num_items(self) -> int:
        """Items that are looked up."""
        ...

    @property
    def num_readings(self) -> int:
        """What the rows' histories are read for: rows, or candidates."""
        ...


Validate = Callable[[Callable[[], None]], dict[str, float]]


@dataclass(frozen=True)
class Surroundings:
    """What the loop reports to and saves with.

    Attributes:
        tracker: Where metrics go.
        exchange: Reaches the other ranks.
        saver: Writes checkpoints.
        seed: Seed of the run.
        frozen: Tables that are not saved.
        watch: Called with each batch of this rank once its step is done; for those who count rows.
        prefetch: Whether rows of cached tables are fetched ahead.
        sync: Averages the tables of several groups of ranks, and after how many steps; None with one group.
    """

    tracker: Tracker
    exchange: RankExchange
    saver: Saver
    seed: int = 0
    frozen: tuple[str, ...] = ()
    watch: Callable[[Any], None] | None = None
    prefetch: bool = False
    sync: tuple[Callable[[], None], int] | None = None


class Trainer:
    """Trains a sharded model.

    Args:
        model: The sharded model; its forward takes a batch and returns (loss, output).
        optimizer: Updates the weights.
        loader: Training batches of this rank.
        validate: Evaluates the model in evaluation mode on all ranks and returns metrics; calls what it is given after
            every batch.
        config: How long, and with what care.
        surroundings: What the loop reports to and saves with.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: TrainOptimizer,
        loader: RowLoader[Any],
        validate: Validate,
        config: TrainerConfig,
        surroundings: Surroundings,
    ) -> None:
        self.model, self.optimizer, self.loader, self.validate, self.config = model, optimizer, loader, validate, config
        self.around, self.tracker, self.saver = surroundings, surroundings.tracker, surroundings.saver
        self.device = next(iter(optimizer.parameters.values())).device
        self.pipeline = make_pipeline(model, optimizer, self.device, self._forward, prefetch=surroundings.prefetch)
        self.waiting = Waiting()
        counters = {feature: table.counters for feature, table in managed_ids(model).items()}
        self.interval = Interval(surroundings.exchange, self.waiting, self.device, counters)
        self.progress = Progress()
        self._best_before: dict[str, Any] = {}
        self.signals = StopSignals(self.saver.config.grace_s)
        alone = surroundings.exchange.world_size == 1
        self.agreement = Agreement(None if alone else host_group(), num_wishes=2)
        self.begin = time.perf_counter()
        self._saved_at: tuple[int, int, int, bool] | None = None
        self._batches: list[StepBatch] = []
        self._checked = False
        self._temperature = torch.zeros(())

    def _forward(self, batch: StepBatch) -> tuple[Tensor, StepOutput]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bf16):
            return self.model(batch)

    def restore(self, manifest: Manifest) -> None:
        """Continue where a checkpoint was written; collective.

        Raises:
            ValueError: When the model, the data or the seed is not the checkpoint's.
        """
        progress = Progress(**manifest.state["progress"])
        check_data(manifest.state, self.loader.state(progress.epoch, progress.step), self.around.seed)
        self.saver.load(manifest, self._tensors())
        restore_history(self.model, manifest.state.get("ids", {}), lambda wanted: self._load_ids(manifest, wanted))
        self.optimizer.resume(manifest.step)
        self.interval.restore(manifest.state["intervals"], self.around.exchange.rank)
        self.progress = progress
        self.begin = time.perf_counter() - progress.seconds
        self._saved_at = self._place()

    def _load_ids(self, manifest: Manifest, wanted: dict[str, Any]) -> None:
        if manifest.state.get("ids"):
            self.saver.load(manifest, {"ids": wanted})

    def fit(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The best validation metrics, the step they were reached at, steps and seconds in all.

        Raises:
            Preempted: When the run was asked to stop and has been saved.
        """
        try:
            with self.signals:
                try:
                    self._fit()
                except StopAgreed:
                    self._stop()
        finally:
            self.tracker.close()
        seconds = time.perf_counter() - self.begin
        return {"best": self.progress.best, "steps": self.optimizer.num_steps, "seconds": seconds}

    def _fit(self) -> None:
        while not self._ended():
            self._epoch()
            self._close_epoch()
        self.agreement.close()
        self._save_last()

    def _stop(self) -> None:
        """Save where the run stands, and leave; without a save where there can be none."""
        self.agreement.close()
        try:
            self._save_last()
        except OSError as error:
            raise Preempted from error  # the saver has said why, and the last complete checkpoint stands
        logger.info(
            "asked to stop (%s): saved at step %d; start the same command again to continue",
            self.signals.received or "another rank was", self.optimizer.num_steps,
        )  # fmt: skip
        raise Preempted

    def _save_last(self) -> None:
        """Return when the run's present state is on the disk."""
        self.saver.wait()
        if self.saver.failed or self._saved_at != self._place():
            self._save(wait=True)

    def _place(self) -> tuple[int, int, int, bool]:
        """What distinguishes two states of the run."""
        return self.optimizer.num_steps, self.progress.epoch, self.progress.step, self.progress.validated

    def _ended(self) -> bool:
        """Whether nothing is left to do; true again when an ended run is started once more."""
        progress, patience = self.progress, self.config.patience
        if progress.epoch >= self.config.epochs or (patience and progress.poor >= patience):
            return True
        return self._finished() and (progress.validated or progress.step == 0)

    def _finished(self) -> bool:
        return self.config.max_steps is not None and self.optimizer.num_steps >= self.config.max_steps

    def _epoch(self) -> None:
        """Run what is left of the epoch's steps; the pipeline is empty again at its end."""
        progress = self.progress
        left = self.loader.order(progress.epoch).num_steps - progress.step
        if self.config.max_steps is not None:
            left = min(left, self.config.max_steps - self.optimizer.num_steps)
        if not left:
            return
        self.model.train()
        made = self.loader.batches(progress.epoch, first_step=progress.step, num_steps=left)
        batches = self.waiting.timed(self._remembered(made))
        while True:
            seed_step(self.around.seed, self.optimizer.num_steps, self.around.exchange.rank)
            try:
                output = self.pipeline.progress(batches)
            except StopIteration:
                return
            if not self._checked:
                check_pipelined(self.model, self.pipeline)
                self._checked = True
            left -= 1
            self._account(self._batches.pop(0), output, last=not left)

    def _remembered(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """Keep the batches that the pipeline holds, to account for each when its step is done."""
        for batch in batches:
            self._batches.append(batch)
            yield batch

    def _account(self, batch: StepBatch, output: StepOutput, last: bool) -> None:
        """Count a step, and save or stop after it; after an epoch's last one that is for its closing."""
        self.progress.step += 1
        self.progress.validated = False
        if self.around.sync is not None and self.optimizer.num_steps % self.around.sync[1] == 0:
            self.around.sync[0]()
        self._temperature = output.temperature
        self.interval.add(output.loss_sum, _counts(batch, output))
        self.tracker.advance()
        if self.around.watch is not None:
            self.around.watch(batch)
        if self.optimizer.num_steps % self.config.log_every == 0:
            self._record()
        if last:
            return
        due = self._asked()
        if due or self.saver.due_at(self.optimizer.num_steps):
            self._save()

    def _asked(self) -> bool:
        """Whether a rank's clock asks for a save.

        Raises:
            StopAgreed: When a rank was asked to stop.
        """
        stop, due = self.agreement.ask(self.signals.received is not None, self.saver.due)
        if stop:
            raise StopAgreed
        return due

    def _record(self) -> None:
        """End an interval: its accounting line, on all ranks together."""
        step = self.optimizer.num_steps
        metrics = self.interval.close()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"loss={metrics['loss']} at step {step}: lower optimizer.learning_rate or "
                "optimizer.tables.learning_rate, or look for extreme values in the data with `prepare --check`."
            )
        metrics |= {
            "epoch": self.progress.epoch,
            "time_s": time.perf_counter() - self.begin,
            "learning_rate": self.optimizer.learning_rate,
            "grad_norm": float(self.optimizer.grad_norm),
            "temperature": float(self._temperature),
        }
        self.tracker.record("train", step, metrics, train_line(step, metrics))

    def _close_epoch(self) -> None:
        """Validate when it is time, go to the next epoch, and save what must not be lost."""
        progress = self.progress
        whole = progress.step >= self.loader.order(progress.epoch).num_steps
        done = self._finished() or (whole and progress.epoch + 1 == self.config.epochs)
        if done and self.interval.steps:
            self._record()
        better = False
        if done or (progress.epoch + 1) % self.config.validate_every == 0:
            better = self._validate()
        progress.validated = True
        if whole:
            progress.epoch, progress.step, progress.validated = progress.epoch + 1, 0, False
        if better:
            progress.best["checkpoint"] = self.saver.name(self.optimizer.num_steps)
            self._save(name=progress.best["checkpoint"])
        due = self._asked() or self.saver.due_at(self.optimizer.num_steps)
        if due and self._saved_at != self._place():
            self._save()

    def _validate(self) -> bool:
        """Validate; returns whether it is the best so far."""
        self.pipeline.detach()
        self._sync()
        self.model.eval()
        begin = time.perf_counter()
        metrics = self.validate(self._asked_only)
        if self.config.monitor not in metrics:
            raise ValueError(
                f"trainer.monitor={self.config.monitor!r}: validation gives {', '.join(metrics)}; choose one of them."
            )
        self.saver.wait()
        self._mend_best()
        self.interval.begin += time.perf_counter() - begin
        epoch, step, best = self.progress.epoch, self.optimizer.num_steps, self.progress.best
        line = " · ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        record = {"epoch": epoch, "time_s": time.perf_counter() - self.begin, **metrics}
        self.tracker.record("validation", step, record, f"epoch {epoch:3d} validation · {line}")
        if best and metrics[self.config.monitor] <= best[self.config.monitor]:
            self.progress.poor += 1
            return False
        self._best_before = best
        self.progress.best, self.progress.poor = {**metrics, "step": step, "epoch": epoch}, 0
        return True

    def _mend_best(self, coming: str | None = None) -> None:
        """When the best checkpoint could not be written: the coming one of its step is it, else the best before."""
        best = self.progress.best
        if self.saver.lost is None or self.saver.lost != best.get("checkpoint"):
            return
        if coming is not None and best["step"] == self.optimizer.num_steps:
            best["checkpoint"] = coming
            return
        if self.around.exchange.rank == 0:
            logger.error("the best validation, at step %d, was not saved: the best one before counts", best["step"])
        self.progress.best = self._best_before

    def _asked_only(self) -> None:
        """Stop within a validation; a save can wait for its end."""
        self._asked()

    def _sync(self) -> None:
        """Make the groups' tables equal before they are judged or saved."""
        if self.around.sync is not None and self.optimizer.num_steps % self.around.sync[1]:
            self.around.sync[0]()

    def _tensors(self) -> dict[str, Any]:
        return {"model": model_state(self.model, self.around.frozen), "optimizer": self.optimizer.tensors()}

    def _save(self, *, name: str | None = None, wait: bool = False) -> None:
        begin = time.perf_counter()
        self._sync()
        step, exchange = self.optimizer.num_steps, self.around.exchange
        name = name or self.saver.name(step)
        self._mend_best(name)
        self.progress.seconds = begin - self.begin
        tensors, facts = history(self.model, exchange)
        state = run_state(
            self.progress,
            self.loader.state(self.progress.epoch, self.progress.step),
            seed=self.around.seed,
            intervals=exchange.objects(self.interval.state()),
            metrics_bytes=exchange.objects(self.tracker.position)[0],
        )
        if facts:
            state["ids"] = facts
        tensors = self._tensors() | ({"ids": tensors} if tensors else {})
        self.saver.save(Manifest(name=name, step=step, state=state, about={}), tensors, wait=wait)
        self._saved_at = self._place()
        self.interval.begin += time.perf_counter() - begin


def _counts(batch: StepBatch, output: StepOutput) -> StepCounts:
    return StepCounts(
        targets=batch.num_targets,
        rows=batch.num_rows,
        readings=batch.num_readings,
        events=batch.num_events,
        places=output.num_places,
        asked=batch.num_asked,
        items=batch.num_items,
    )
