"""Rankers through the programs: trained, continued, evaluated beside each other and the oracle; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from mufasa_rec.config import RunConfig, load_config, save_config
from mufasa_rec.data.importers import generated
from mufasa_rec.data.loader import DataConfig, RequestsConfig
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.ranking_batch import RankingBatch
from mufasa_rec.data.row_ids import load_row_ids
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.content_config import ContentConfig
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import TableOptimizerConfig
from mufasa_rec.models.ranker_config import RankerConfig, comparator
from mufasa_rec.modules.similarity_interest import SimilarityInterestConfig
from mufasa_rec.training.checkpoint import find_checkpoint, load_model
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.trainer_config import TrainerConfig
from tests.helpers.impressions import SMALL, prepare_impressions, write_source
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, weights_of
from torchx_apps import assembly, ranking
from torchx_apps import evaluate as evaluate_app
from torchx_apps import train as train_app
from torchx_apps.ablate_cells import config_hash
from torchx_apps.evaluate import evaluate
from torchx_apps.train import train


@pytest.fixture(scope="module")
def impressions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_impressions(tmp_path_factory.mktemp("ranking"))


def ranking_config(dataset: str, **trainer: Any) -> RunConfig:
    """A small ranker with all of DMAE, two tasks and some dropout."""
    dmae = SimilarityInterestConfig(width=8, num_heads=1, num_buckets=5, num_bins=4, dropout=0.1)
    told = {"epochs": 9, "max_steps": 8, "log_every": 2, "validate_every": 1, "patience": 0, "monitor": "auc"}
    return RunConfig(
        task="ranking",
        data=DataConfig(
            dataset=dataset, split="impressions", batch_size=32, num_readers=8, max_history=10, min_count=2
        ),
        ranker=RankerConfig(width=8, dmae=dmae, hidden=(16,), dropout=0.1),
        optimizer=OptimizerConfig(warmup_steps=2, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.05)),
        trainer=TrainerConfig(**(told | trainer)),  # type: ignore[arg-type]
    )


def train_all(env: DistributedEnv, runs: dict[str, RunConfig]) -> list[list[int]]:
    """Train runs one after another; returns the impressions that each trained on this rank."""
    seen: list[list[int]] = []

    def watch(batch: RankingBatch) -> None:
        seen[-1].extend(batch.impression.tolist())

    for folder, config in runs.items():
        seen.append([])
        train(config, Path(folder), env, watch)  # type: ignore[arg-type]
    return seen


@pytest.fixture(scope="module")
def trained(impressions: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run with DMAE and one without content, trained on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    config = ranking_config(impressions)
    runs = {"dmae": config, "din": replace(config, ranker=comparator(config.ranker, "din"))}
    run_ranks(train_all, 2, {str(folder / name): run for name, run in runs.items()}, timeout_s=120)
    return {name: str(folder / name) for name in runs}


def test_run_learns_and_validates_by_auc(trained: dict[str, str], impressions: str) -> None:
    folder = Path(trained["dmae"])
    assert [line["step"] for line in metrics_of(folder, "train")] == [2, 4, 6, 8]
    for line in metrics_of(folder, "train"):
        assert line["history_ratio"] == SMALL.candidates
        assert line["dedup_ratio"] > 1.2
    validation = metrics_of(folder, "validation")[-1]
    assert {"auc", "gauc", "logloss", "ne", "calibration", "like.auc"} <= validation.keys()
    assert json.loads((folder / "summary.json").read_text())["best"]["auc"] > 0
    assert load_config(folder / "config.yaml").data.modalities == ("audio", "image", "title")
    assert load_config(Path(trained["din"]) / "config.yaml").data.modalities is None
    manifest, rows = DatasetManifest.load(impressions), load_row_ids(folder)
    assert manifest.impressions is not None and set(rows) == {"item", "user", "context.surface"}
    assert rows["context.surface"].values == ("gallery", "search")
    assert 0 < len(rows["user"].ids) <= manifest.impressions.users


def test_interrupted_run_ends_as_if_it_had_not_been(impressions: str, tmp_path: Path) -> None:
    """Eight steps at once, and four, then four more: the same weights bit for bit, every impression in its turn."""
    whole, first = ranking_config(impressions), ranking_config(impressions, max_steps=4)
    runs = {str(tmp_path / "whole"): whole, str(tmp_path / "parts"): replace(first, trainer=replace(first.trainer))}
    # What may be told apart by the planned number of steps is the learning rate: keep it constant.
    flat = {name: replace(run, optimizer=replace(run.optimizer, final_share=1.0)) for name, run in runs.items()}
    [seen_whole, seen_first] = run_ranks(train_all, 1, flat)[0]
    again = {str(tmp_path / "parts"): replace(flat[str(tmp_path / "whole")])}
    [[seen_rest]] = run_ranks(train_all, 1, again)
    assert seen_first + seen_rest == seen_whole
    one, other = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def test_content_that_travels_with_the_batch_trains_the_same_ranker_bit_for_bit(
    impressions: str, tmp_path: Path
) -> None:
    config = ranking_config(impressions, max_steps=4)
    placements = {"sharded": ContentConfig(), "host": ContentConfig(placement="host")}
    run_ranks(train_all, 2, {str(tmp_path / name): replace(config, content=one) for name, one in placements.items()})
    one, other = (weights_of(tmp_path / name) for name in placements)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
    lines = [metrics_of(tmp_path / name, "validation")[-1] for name in placements]
    assert [lines[0][figure] for figure in ("auc", "logloss")] == [lines[1][figure] for figure in ("auc", "logloss")]


def evaluate_on(env: DistributedEnv, runs: dict[str, str], output: Path) -> list[dict[str, Any]]:
    return evaluate(runs, output, "test", env)


def test_evaluation_puts_runs_side_by_side_on_the_same_impressions(trained: dict[str, str], tmp_path: Path) -> None:
    one, two = (run_ranks(evaluate_on, world, trained, tmp_path / str(world))[0] for world in (1, 2))
    assert [row["row"] for row in one] == ["dmae", "din"]
    for alone, together in zip(one, two, strict=True):
        for name in ("auc", "gauc", "logloss", "ne", "calibration"):
            assert alone[name] == pytest.approx(together[name], rel=1e-5)
    assert {"row", "auc", "gauc", "logloss", "ne", "cold_auc"} <= one[0].keys()
    evaluation = json.loads((tmp_path / "1" / "evaluation.json").read_text())
    assert {(pair["pair"], pair["task"]) for pair in evaluation["pairs"]} == {
        ("dmae - din", "click"),
        ("dmae - din", "like"),
    }
    slices = evaluation["rows"][0]["slices"]["click"]
    assert slices["new item"]["impressions"] > 0 and "item without audio" in slices
    scores = load_file(tmp_path / "2" / "scores.safetensors")
    assert len(scores["row"]) == len(scores["logit.din.like"]) == one[0]["impressions"]


def test_generated_impressions_come_with_an_oracle_row(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "ClicksConfig", lambda: SMALL)
        dataset = str(tmp_path / "dataset")
        prepare(PrepareConfig(input="synthetic:clicks:3", output=dataset))
    assert "oracle" in Path(dataset, "report.txt").read_text()
    config = ranking_config(dataset, max_steps=2)
    run_ranks(train_all, 1, {str(tmp_path / "run"): config})
    rows = run_ranks(evaluate_on, 1, {"dmae": str(tmp_path / "run")}, tmp_path / "out")[0]
    assert [row["row"] for row in rows] == ["dmae", "oracle"]
    assert rows[1]["auc"] > 0.7 and rows[1]["calibration"] == pytest.approx(1.0, abs=0.3)


def test_own_histories_without_times_train_as_well(tmp_path: Path) -> None:
    past = pa.array([[1, 2, 3][: row % 4] for row in range(960)], pa.list_(pa.int64()))
    source = write_source(tmp_path / "source", events=False, past=past)
    config = ranking_config(prepare_impressions(tmp_path, source, history_item="past"), max_steps=3)
    run_ranks(train_all, 1, {str(tmp_path / "run"): config})
    assert metrics_of(tmp_path / "run", "validation")[-1]["auc"] > 0


def logits_of(env: DistributedEnv, run: str, config: RunConfig) -> dict[int, list[float]]:
    """Logits of every impression of the test part by the best checkpoint of a run."""
    exchange = RankExchange()
    data = assembly.open_dataset(config, assembly.load_vocabulary(run))
    model = ranking.shard_ranker(config, data, ranking.build_ranker(config, data, exchange), env.device)
    load_model(find_checkpoint(f"{run}/checkpoints", "best"), model, assembly.content_tables(data))
    model.eval()
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch in ranking.make_loader(config, data, "test", env).batches(0):
            found |= dict(zip(batch.impression.tolist(), model(batch)[1].logits.tolist(), strict=True))
    return found


def test_requests_and_single_impressions_get_the_same_logits(trained: dict[str, str]) -> None:
    config = load_config(Path(trained["dmae"]) / "config.yaml")
    apart = replace(config, data=replace(config.data, requests=RequestsConfig(per_request=False)))
    one, other = (run_ranks(logits_of, 1, trained["dmae"], each)[0] for each in (config, apart))
    assert one.keys() == other.keys()
    torch.testing.assert_close(
        torch.tensor([one[row] for row in sorted(one)]), torch.tensor([other[row] for row in sorted(one)])
    )


def refused(main: Any, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "leave_one_out"}, "split 'leave_one_out' is not in data set"),
        ({"modalities": ("title", "sound")}, "data.modalities: 'sound' is not in data set 'source'"),
    ],
)
def test_what_the_data_set_lacks_is_named_and_nothing_is_written(
    impressions: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = ranking_config(impressions)
    save_config(replace(config, data=replace(config.data, **change)), tmp_path)
    told = refused(train_app.main, ["--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")])
    assert message in told
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_content_is_wanted_and_there_is_none(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    for file in source.glob("*.npz"):
        file.unlink()
    save_config(ranking_config(prepare_impressions(tmp_path, source)), tmp_path)
    told = refused(train_app.main, ["--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")])
    assert "ranker.content_interest='dmae': the data has no content that is used" in told


def test_data_without_impressions_is_refused(dataset: str, tmp_path: Path) -> None:
    config = ranking_config(dataset)
    save_config(replace(config, data=replace(config.data, split="leave_one_out")), tmp_path)
    told = refused(train_app.main, ["--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")])
    assert "has no impressions; prepare a source that has some" in told


def test_retriever_on_requests_is_refused(impressions: str, tmp_path: Path) -> None:
    save_config(RunConfig(data=DataConfig(dataset=impressions, split="impressions")), tmp_path)
    told = refused(train_app.main, ["--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")])
    assert "data.split='impressions': holds requests" in told


def test_monitor_must_be_one_of_the_task(impressions: str) -> None:
    with pytest.raises(ValueError, match="task 'ranking' is judged by auc, gauc"):
        ranking_config(impressions, monitor="hr@10")
    with pytest.raises(ValueError, match="task='rank': choose one of retrieval, ranking"):
        RunConfig(task="rank")  # type: ignore[arg-type]


def test_task_weights_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ranker: {task_weights: {click: 1.0, like: 0.5}}")
    config = load_config(tmp_path / "a.yaml")
    save_config(config, tmp_path)
    assert load_config(tmp_path / "config.yaml").ranker.task_weights == {"click": 1.0, "like": 0.5}


def test_what_a_task_does_not_read_makes_no_other_cell(impressions: str) -> None:
    retriever, ranker = RunConfig(), ranking_config(impressions)
    wide = RankerConfig(width=64)
    assert config_hash(retriever, "s") == config_hash(replace(retriever, ranker=wide), "s")
    assert config_hash(ranker, "s") != config_hash(replace(ranker, ranker=wide), "s")
    assert config_hash(ranker, "s") == config_hash(replace(ranker, model=replace(ranker.model, width=16)), "s")


def test_rows_of_one_table_are_of_one_task(trained: dict[str, str], dataset: str, tmp_path: Path) -> None:
    save_config(RunConfig(data=DataConfig(dataset=dataset)), tmp_path)
    with pytest.raises(SystemExit, match="runs of different tasks"):
        evaluate_app.main(
            ["--run", trained["dmae"], "--compare", f"other={tmp_path}", "--output", str(tmp_path / "out")]
        )
