"""The loop: early stopping, accounting, refusals, and the errors of a run's folder."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.config import RunConfig
from mufasa_rec.data.batch import Batch
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.models.retriever import Retriever
from mufasa_rec.training import accounting
from mufasa_rec.training.accounting import Interval, StepCounts, Waiting
from mufasa_rec.training.optim import OptimizerConfig, TrainOptimizer
from mufasa_rec.training.saver import Saver
from mufasa_rec.training.tracker import Tracker
from mufasa_rec.training.trainer import Surroundings, Trainer
from mufasa_rec.training.trainer_config import TrainerConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import assembly


class Alone:
    """The exchange of one rank."""

    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x


class TwoRanks:
    """Adds what another rank would say."""

    world_size = 2

    def __init__(self, other: list[float]) -> None:
        self.other = torch.tensor(other, dtype=torch.float64)

    def sum(self, x: Tensor) -> Tensor:
        return x + self.other


def scripted(env: DistributedEnv, config: RunConfig, folder: Path, scores: list[float]) -> dict[str, Any]:
    """Train with validation scores from a list."""
    folder.mkdir(exist_ok=True)
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), env.device)
    dense = {n: p for n, p in model.named_parameters() if "sparse" not in n}
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, 1000)
    script = iter(scores)
    saver = Saver(str(folder / "checkpoints"), config.checkpoint, {})
    tracker = Tracker(folder if env.is_main else None, 1000)
    trainer = Trainer(
        model,
        optimizer,
        assembly.make_loader(config, data, "train", env),
        lambda _: {"ndcg@10": next(script), "weight": float(next(iter(dense.values())).detach().double().sum())},
        config.trainer,
        Surroundings(tracker, exchange, saver, frozen=assembly.content_tables(data)),
    )
    first = next(iter(dense))
    return {**trainer.fit(), "first": first}


def test_early_stopping_keeps_the_best_weights(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, epochs=10, validate_every=1, patience=2)
    (result,) = run_ranks(scripted, 1, config, tmp_path, [0.1, 0.3, 0.2, 0.25, 0.9])
    assert result["best"]["epoch"] == 1
    assert result["best"]["ndcg@10"] == 0.3
    assert result["steps"] == 4 * 8
    assert [line["ndcg@10"] for line in metrics_of(tmp_path, "validation")] == [0.1, 0.3, 0.2, 0.25]
    kept = next(
        w for name, w in weights_of(tmp_path, "best").items() if name.endswith(result["first"]) and "model." in name
    )
    assert float(kept.double().sum()) == result["best"]["weight"]


def test_monitor_that_validation_does_not_give_is_named(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, epochs=1, monitor="mrr")
    with pytest.raises(AssertionError, match=r"trainer\.monitor='mrr': validation gives ndcg@10, weight"):
        run_ranks(scripted, 1, config, tmp_path, [0.1])


def rebuilt(self: Retriever, batch: Batch) -> tuple[Tensor, Any]:
    """A forward that changes the KeyedJaggedTensor above the sharded module."""
    old = batch.features
    features = KeyedJaggedTensor(
        keys=["item"], values=old["item"].values() + 0, lengths=torch.diff(old["item"].offsets()), stride=1
    )
    return self.dense(self.merge(self.sparse(features), batch.content), batch)


def train_rebuilt(env: DistributedEnv, config: RunConfig, folder: Path) -> None:
    Retriever.forward = rebuilt  # type: ignore[method-assign]
    data_free = replace(config, model=replace(config.model, use_content=False, use_categoricals=False))
    train_in(env, data_free, folder)


def test_sharded_module_outside_the_pipeline_stops_the_run(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, max_steps=4)
    with pytest.raises(AssertionError, match=r"1 sharded modules are not pipelined: .*sparse\.ids.*in collate"):
        run_ranks(train_rebuilt, 1, config, tmp_path / "run")


def test_run_with_more_ranks_than_rows_of_a_batch_trains_and_validates(dataset: str, tmp_path: Path) -> None:
    """Four readers of one row each per step on three ranks: in the last steps some ranks have no row left."""
    config = small_config(dataset, epochs=1)
    config = replace(config, data=replace(config.data, num_readers=7, batch_size=28, prefetch=1))
    for world in (1, 3):
        run_ranks(train_in, world, config, tmp_path / str(world))
    one, three = ([metrics_of(tmp_path / str(w), kind) for kind in ("train", "validation")] for w in (1, 3))
    assert [line["loss"] for line in one[0]] == pytest.approx([line["loss"] for line in three[0]], rel=1e-4)
    for name in ("hr@10", "ndcg@10", "mrr"):
        assert one[1][0][name] == pytest.approx(three[1][0][name], abs=0.02)


def test_run_folder_that_holds_another_run_is_refused_and_left_alone(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    with pytest.raises(AssertionError, match=r"already holds a run with other settings: data\.batch_size is 128 there"):
        run_ranks(train_in, 2, small_config(dataset, max_steps=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_more_ranks_than_readers_are_refused_with_the_remedy(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, max_steps=2)
    config = replace(config, data=replace(config.data, num_readers=2))
    with pytest.raises(AssertionError, match=r"data\.num_readers=2: fewer than the 3 ranks.*raise data\.num_readers"):
        run_ranks(train_in, 3, config, tmp_path / "run")


def test_interval_adds_ranks_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(accounting.time, "perf_counter", lambda: now[0])
    waiting = Waiting()
    # Of the other rank: loss, seconds waited, squared events; targets, rows, readings, events, places, asked, items.
    interval = Interval(TwoRanks([10.0, 0.5, 3600, 5, 4, 12, 60, 100, 70, 20]), waiting, torch.device("cpu"))
    counts = StepCounts(targets=5, rows=2, readings=6, events=20, places=50, asked=35, items=15)
    for _ in range(2):
        interval.add(torch.tensor(3.0), counts)
    waiting.seconds = 0.3
    now[0] += 2.0
    metrics = interval.close()
    assert metrics["loss"] == pytest.approx(16 / 15)
    assert metrics["samples_per_s"] == pytest.approx(8 / 2)
    assert metrics["events_per_s"] == pytest.approx(100 / 2)
    assert metrics["padding_share"] == pytest.approx(1 - 100 / 200)
    assert metrics["rank_imbalance"] == pytest.approx(10 / 50)  # 40 and 60 events: deviation 10 of a mean of 50
    assert metrics["data_wait_share"] == pytest.approx(0.8 / 2 / 2)
    assert metrics["step_ms"] == pytest.approx(1000)
    assert metrics["dedup_ratio"] == pytest.approx(140 / 50)
    assert metrics["history_ratio"] == pytest.approx(24 / 8)
    assert (interval.steps, waiting.seconds, interval.begin) == (0, 0.0, 102.0)
    assert not any(interval.counts.values())


def test_wait_for_batches_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(accounting.time, "perf_counter", lambda: now[0])

    def slow() -> Iterator[int]:
        for number in range(3):
            now[0] += 0.25
            yield number

    waiting = Waiting()
    for _ in waiting.timed(slow()):
        now[0] += 10.0  # the caller's own work
    assert waiting.seconds == pytest.approx(0.75)


def test_learning_rate_warms_up_and_falls_for_tables_too() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    peaks = {"usual": 0.5, "its own": 3.0, "frozen": 0.0}
    tables = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": peak} for peak in peaks.values()])
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, final_share=0.1)
    optimizer = TrainOptimizer({"w": weight}, tables, config, total_steps=14)
    rates = []
    for _ in range(15):
        rates.append(optimizer.learning_rate)
        share = rates[-1] / config.learning_rate
        assert [group["lr"] for group in tables.param_groups] == pytest.approx([p * share for p in peaks.values()])
        weight.grad = torch.full((2, 2), 100.0)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(200.0)
        assert torch.linalg.norm(weight.grad) == pytest.approx(1.0, rel=1e-4)
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[9] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))
    assert rates[14] == pytest.approx(0.01)


def test_metrics_that_cannot_be_written_name_file_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path, 10)
    tracker.record("train", 1, {"loss": 2.0}, "line")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "step": 1, "loss": 2.0}

    def full(_: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker._file, "write", full, raising=False)
    with pytest.raises(OSError, match=r"metrics\.jsonl: metrics cannot be written \(No space left on device\); free"):
        tracker.record("train", 2, {"loss": 2.0}, "line")


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("log_every", 0), ("validate_every", 0), ("max_steps", 0), ("monitor", "hits"), ("patience", -1)],
)
def test_configuration_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{field}={value!r}"):
        TrainerConfig(**{field: value})  # type: ignore[arg-type]
