"""The training loop: pipelined steps, one accounting line per interval, validation, early stopping, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

from mufasa_rec.data.batch import Batch
from mufasa_rec.data.loader import Loader
from mufasa_rec.training.accounting import Interval, RankSum, Waiting
from mufasa_rec.training.checkpoint import model_state, save_checkpoint
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.tracker import Tracker

logger = logging.getLogger(__name__)
MONITORS = ("hr@10", "ndcg@10", "mrr")  # validation metrics, all better when larger


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, and with what care.

    Attributes:
        epochs: Most epochs.
        max_steps: Most steps; None for no bound.
        log_every: Steps between accounting lines.
        validate_every: Epochs between validations.
        patience: Validations without a better metric before training stops; 0 never stops early.
        monitor: Validation metric that decides which weights are kept.
        bf16: Run the data-parallel part under bf16 autocast.
    """

    epochs: int = 10
    max_steps: int | None = None
    log_every: int = 50
    validate_every: int = 1
    patience: int = 5
    monitor: str = "ndcg@10"
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: choose 1 or more.")
        if self.monitor not in MONITORS:
            raise ValueError(f"trainer.monitor={self.monitor!r}: choose one of {', '.join(MONITORS)}.")
        if self.patience < 0:
            raise ValueError(f"trainer.patience={self.patience}: choose 0 (never stop early) or more.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"trainer.max_steps={self.max_steps}: choose 1 or more, or None for no bound.")


class StepOutput(Protocol):
    """What the trainer reads of a model's output."""

    loss_sum: Tensor
    num_places: int
    temperature: Tensor


class Trainer:
    """Trains a sharded model.

    Args:
        model: The sharded model; its forward takes a batch and returns (loss, output).
        optimizer: Updates the weights.
        loader: Training batches of this rank.
        validate: Evaluates the model in evaluation mode on all ranks and returns metrics.
        config: How long, and with what care.
        tracker: Where metrics go.
        exchange: Reaches the other ranks.
        checkpoint: Folder of the checkpoint.
        frozen: Tables that are not saved.
        manifest: What the checkpoint's manifest says beside step and metrics.
    """

    def __init__(  # noqa: PLR0913  it is handed everything, and imports no model
        self,
        model: nn.Module,
        optimizer: TrainOptimizer,
        loader: Loader,
        validate: Callable[[], dict[str, float]],
        config: TrainerConfig,
        *,
        tracker: Tracker,
        exchange: RankSum,
        checkpoint: Path,
        frozen: tuple[str, ...] = (),
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.loader, self.validate, self.config = model, optimizer, loader, validate, config
        self.tracker, self.exchange, self.checkpoint = tracker, exchange, checkpoint
        self.frozen, self.manifest = frozen, manifest or {}
        self.device = next(iter(optimizer.parameters.values())).device
        self.pipeline = TrainPipelineSparseDist(
            model=model,
            optimizer=optimizer,
            device=self.device,
            execute_all_batches=True,
            custom_model_fwd=self._forward,
        )
        self.waiting = Waiting()
        self.interval = Interval(exchange, self.waiting, self.device)
        self.begin = time.perf_counter()
        self._batches: list[Batch] = []
        self._temperature = torch.zeros(())

    def _forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bf16):
            return self.model(batch)

    def fit(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The best validation metrics, the step they were reached at, steps and seconds in all.
        """
        try:
            best = self._fit()
        finally:
            self.tracker.close()
        seconds = time.perf_counter() - self.begin
        return {"best": best, "steps": self.optimizer.num_steps, "seconds": seconds}

    def _fit(self) -> dict[str, Any]:
        """Run epochs with their validations; returns the best one's metrics."""
        best: dict[str, Any] = {}
        poor = 0
        for epoch in range(self.config.epochs):
            self._epoch(epoch)
            done = epoch + 1 == self.config.epochs or self._finished()
            if done and self.interval.steps:
                self._record(epoch)
            if (epoch + 1) % self.config.validate_every == 0 or done:
                metrics = self._validate(epoch)
                if self.config.monitor not in metrics:
                    raise ValueError(
                        f"trainer.monitor={self.config.monitor!r}: validation gives {', '.join(metrics)}; "
                        "choose one of them."
                    )
                if not best or metrics[self.config.monitor] > best[self.config.monitor]:
                    best, poor = {**metrics, "step": self.optimizer.num_steps, "epoch": epoch}, 0
                    self._save(best)
                else:
                    poor += 1
            if done or (self.config.patience and poor >= self.config.patience):
                break
        return best

    def _finished(self) -> bool:
        return self.config.max_steps is not None and self.optimizer.num_steps >= self.config.max_steps

    def _epoch(self, epoch: int) -> None:
        """Run the steps of one epoch; the pipeline is empty again at its end."""
        self.model.train()
        limit = None if self.config.max_steps is None else self.config.max_steps - self.optimizer.num_steps
        batches = self.waiting.timed(self._remembered(self.loader.batches(epoch, num_steps=limit)))
        while True:
            try:
                output = self.pipeline.progress(batches)
            except StopIteration:
                return
            if self.optimizer.num_steps == 1:
                check_pipelined(self.model, self.pipeline)
            self._account(epoch, self._batches.pop(0), output)

    def _remembered(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Keep the batches that the pipeline holds, to account for each when its step is done."""
        for batch in batches:
            self._batches.append(batch)
            yield batch

    def _account(self, epoch: int, batch: Batch, output: StepOutput) -> None:
        self._temperature = output.temperature
        self.interval.add(output.loss_sum, batch.num_targets, batch.num_rows, batch.num_events, output.num_places)
        self.tracker.advance()
        if self.optimizer.num_steps % self.config.log_every == 0:
            self._record(epoch)

    def _record(self, epoch: int) -> None:
        """End an interval: its accounting line, on all ranks together."""
        step = self.optimizer.num_steps
        metrics = self.interval.close()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"loss={metrics['loss']} at step {step}: lower optimizer.learning_rate or "
                "optimizer.tables.learning_rate, or look for extreme values in the data with `prepare --check`."
            )
        metrics |= {
            "epoch": epoch,
            "time_s": time.perf_counter() - self.begin,
            "learning_rate": self.optimizer.learning_rate,
            "grad_norm": float(self.optimizer.grad_norm),
            "temperature": float(self._temperature),
        }
        self.tracker.record("train", step, metrics, _train_line(step, metrics))

    def _validate(self, epoch: int) -> dict[str, float]:
        self.pipeline.detach()
        self.model.eval()
        begin = time.perf_counter()
        metrics = self.validate()
        self.interval.begin += time.perf_counter() - begin
        line = " · ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        record = {"epoch": epoch, "time_s": time.perf_counter() - self.begin, **metrics}
        self.tracker.record("validation", self.optimizer.num_steps, record, f"epoch {epoch:3d} validation · {line}")
        return metrics

    def _save(self, best: dict[str, Any]) -> None:
        begin = time.perf_counter()
        state = {"model": model_state(self.model, self.frozen), "optimizer": self.optimizer.state_dict()}
        save_checkpoint(self.checkpoint, state, {"best": best, **self.manifest})
        self.interval.begin += time.perf_counter() - begin


def _train_line(step: int, metrics: dict[str, float]) -> str:
    """The accounting line of an interval."""
    return (
        f"epoch {metrics['epoch']:3d} step {step:6d} · loss {metrics['loss']:.4f} · {metrics['step_ms']:.0f} ms/step · "
        f"{metrics['samples_per_s']:,.0f} rows/s · {metrics['events_per_s']:,.0f} events/s · "
        f"padding {metrics['padding_share']:.1%} · imbalance {metrics['rank_imbalance']:.1%} · "
        f"data wait {metrics['data_wait_share']:.1%} · lr {metrics['learning_rate']:.2g} · "
        f"|g| {metrics['grad_norm']:.2f} · τ {metrics['temperature']:.3f}"
    )


def check_pipelined(model: nn.Module, pipeline: TrainPipelineSparseDist) -> None:
    """Stop when a sharded module is looked up outside the pipeline.

    Raises:
        RuntimeError: Names the modules and says what causes it.
    """
    pipelined = {id(module) for module in pipeline._pipelined_modules}
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ShardedModule) and id(module) not in pipelined
    ]
    if left:
        raise RuntimeError(
            f"{len(left)} sharded modules are not pipelined: {', '.join(left)}. Their input is made or changed inside "
            "the model's forward; build every KeyedJaggedTensor in collate and pass it to the sharded module as it is."
        )
