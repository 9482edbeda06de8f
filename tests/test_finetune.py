"""A retriever that holds a fusion layer: frozen or tuned, continued, evaluated, exported, refused where it must be."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mufasa_rec.config import CONFIG_FILE, RunConfig, save_config
from mufasa_rec.data.batch import Batch
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.modules.fusion import FusionConfig
from mufasa_rec.training.fusion_file import LAYER_FILE, TrainedLayer
from mufasa_rec.training.fusion_trainer import NoTables
from mufasa_rec.training.fusion_trainer_config import FusionTrainerConfig
from mufasa_rec.training.optim import OptimizerConfig, TrainOptimizer
from mufasa_rec.training.preemption import EXIT_CODE, Preempted
from mufasa_rec.training.saver import CheckpointConfig
from tests.helpers.broken_data import copy_of, with_other_content
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import doctor, evaluate, export
from torchx_apps.fuse import fuse
from torchx_apps.fuse_config import FuseConfig
from torchx_apps.fusion_tuning import START_FILE
from torchx_apps.train import train

LAYER = "model.dense.fusion.layer."


def fuse_in(env: DistributedEnv, config: FuseConfig, folder: Path) -> None:
    fuse(config, folder, env)


@pytest.fixture(scope="module")
def source(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a data set that was fused, and the run that did it."""
    folder = tmp_path_factory.mktemp("finetune")
    shutil.copytree(dataset, folder / "dataset")
    config = FuseConfig(
        dataset=str(folder / "dataset"),
        layer=FusionConfig(width=16, num_heads=2),
        trainer=FusionTrainerConfig(batch_size=32, max_steps=4),
        report=False,
    )
    run_ranks(fuse_in, 1, config, folder / "fusion")
    yield folder


def config_of(source: Path, *, tune: bool, **trainer: Any) -> RunConfig:
    config = small_config(str(source / "dataset"), **{"max_steps": 4, **trainer})
    model = replace(config.model, fusion_source=str(source / "fusion"), finetune_fusion=tune)
    return replace(config, model=model, checkpoint=CheckpointConfig(keep_last=9, every_minutes=None))


def layer_of(run: Path, which: str = "newest") -> dict[str, torch.Tensor]:
    found = {name.split(LAYER)[-1]: value for name, value in weights_of(run, which).items() if LAYER in name}
    return {name: value for name, value in found.items() if not name.endswith(("exp_avg", "exp_avg_sq", "step"))}


def test_frozen_layer_stays_and_gives_what_the_store_holds(source: Path, tmp_path: Path) -> None:
    own = config_of(source, tune=False)
    stored = replace(own, model=replace(own.model, fusion_source=""), data=replace(own.data, modalities=("fused",)))
    run_ranks(train_in, 1, own, tmp_path / "own")
    run_ranks(train_in, 1, stored, tmp_path / "stored")
    begun = TrainedLayer.load(source / "fusion" / LAYER_FILE).weights
    now = layer_of(tmp_path / "own")
    assert now.keys() == begun.keys()
    assert [name for name in now if not torch.equal(now[name], begun[name])] == []
    mine, theirs = ([line["loss"] for line in metrics_of(tmp_path / name, "train")] for name in ("own", "stored"))
    assert mine == pytest.approx(theirs, rel=2e-3)  # the store rounds to 16 bits
    assert mine[0] != mine[-1]


def test_tuned_layer_learns_is_validated_evaluated_and_exported_as_it_is(source: Path, tmp_path: Path) -> None:
    config, run = config_of(source, tune=True, validate_every=1), tmp_path / "run"
    moved = tmp_path / "gone"
    shutil.copytree(source / "fusion", moved)
    config = replace(config, model=replace(config.model, fusion_source=str(moved)))
    run_ranks(train_in, 2, config, run)
    begun, now = load_file(run / START_FILE), layer_of(run, "best")
    assert now.keys() == begun.keys()
    same = {name for name in now if torch.equal(now[name], begun[name])}
    assert same <= {"no_title", "attention.key_value.bias"}  # every item has a title; that bias has no gradient
    shutil.rmtree(moved)  # from here on the run stands alone
    best = json.loads((run / "summary.json").read_text())["best"]
    (rows,) = run_ranks(evaluate_in, 1, run, tmp_path / "results")
    model = next(row for row in rows if row["row"] == "model")
    assert model["ndcg@10"] == pytest.approx(best["ndcg@10"], abs=1e-6)
    run_ranks(export_in, 1, run, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "modules.safetensors")
    names = {name.split(".fusion.layer.")[-1]: name for name in exported if ".fusion.layer." in f".{name}"}
    assert all(torch.equal(exported[names[name]], value) for name, value in now.items())


def evaluate_in(env: DistributedEnv, run: Path, output: Path) -> list[dict[str, Any]]:
    return evaluate.evaluate({"model": str(run)}, output, "validation", env)


def export_in(env: DistributedEnv, run: Path, output: Path) -> None:
    export.export(str(run), str(output), RankExchange())


def attempt(env: DistributedEnv, config: RunConfig, folder: Path, kill_at: int | None = None) -> str:
    steps = 0

    def watch(batch: Batch) -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, folder, env, watch)
    except Preempted as end:
        return f"exit {end.code}"
    return "done"


def test_interrupted_tuning_ends_bit_for_bit_as_if_it_had_not_been(source: Path, tmp_path: Path) -> None:
    config = config_of(source, tune=True, max_steps=6)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_ranks(attempt, 1, config, whole) == ["done"]
    assert run_ranks(attempt, 1, config, broken, 2) == [f"exit {EXIT_CODE}"]
    assert run_ranks(attempt, 1, config, broken) == ["done"]
    one, two = weights_of(whole), weights_of(broken)
    assert any(name.startswith("optimizer.dense") and ".fusion.layer." in name for name in one)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_layer_learns_at_its_share_of_the_learning_rate() -> None:
    fast, slow = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, fusion_share=0.1)
    optimizer = TrainOptimizer({"fast": fast, "slow": slow}, NoTables(), config, 10, slow=["slow"])
    fast.grad, slow.grad = torch.ones(3, 3), torch.ones(3, 3)
    optimizer.step()
    torch.testing.assert_close((1 - slow) / (1 - fast), torch.full((3, 3), 0.1))
    rates = [group["lr"] for group in optimizer.dense.param_groups if group["params"]]
    assert rates[1] == pytest.approx(0.1 * rates[0])


def test_layer_of_another_split_or_of_other_vectors_is_refused(source: Path, tmp_path: Path) -> None:
    config = config_of(source, tune=True)
    with pytest.raises(AssertionError, match=r"trained on split leave_one_out@.* but this run uses time@"):
        run_ranks(train_in, 1, replace(config, data=replace(config.data, split="time")), tmp_path / "split")
    with pytest.raises(AssertionError, match=r"data.modalities=\['title'\]: the layer of .* \['image', 'title'\]"):
        run_ranks(train_in, 1, replace(config, data=replace(config.data, modalities=("title",))), tmp_path / "less")
    layer = TrainedLayer.load(source / "fusion" / LAYER_FILE)
    wrong = {
        "reads 'title' of width 7, generation 1, but the data set": replace(layer, widths={**layer.widths, "title": 7}),
        "generation 9, but .* generation 1": replace(layer, dataset={**layer.dataset, "content.image": "9@0"}),
        "knows 77 codes of 'genres'": replace(layer, num_genres=77),
    }
    (tmp_path / "other").mkdir()
    other = replace(config, model=replace(config.model, fusion_source=str(tmp_path / "other")))
    for message, changed in wrong.items():
        changed.save(tmp_path / "other" / LAYER_FILE)
        with pytest.raises(AssertionError, match=message):
            run_ranks(train_in, 1, other, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_source_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"finetune_fusion=True: give model\.fusion_source"):
        RetrieverConfig(finetune_fusion=True)
    with pytest.raises(ValueError, match="use_content=False reads no content"):
        RetrieverConfig(fusion_source="x", use_content=False)
    with pytest.raises(ValueError, match="missing; `fuse` writes it at the end of a run"):
        TrainedLayer.load(tmp_path / LAYER_FILE)
    save_file({"x": torch.zeros(1)}, tmp_path / LAYER_FILE)
    with pytest.raises(ValueError, match="holds no fusion layer"):
        TrainedLayer.load(tmp_path / LAYER_FILE)


def test_doctor_finds_a_retriever_with_a_layer_healthy(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(config_of(source, tune=True), tmp_path)
    doctor.main(["--config", str(tmp_path / CONFIG_FILE), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"]
    assert said["steps"] == 2


def test_doctor_names_content_of_another_width_than_the_layer_was_trained_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(source, tune=True)
    folder = copy_of(str(source / "dataset"), tmp_path)
    before = with_other_content(folder, "title", 12)
    save_config(replace(config, data=replace(config.data, dataset=str(folder))), tmp_path)
    with pytest.raises(SystemExit, match="1"):
        doctor.main(["--config", str(tmp_path / CONFIG_FILE), "--json"])
    (fault,) = json.loads(capsys.readouterr().out)["findings"]
    assert fault["where"].startswith("content.title (")
    assert f"width 12, the model is made for {before}, as the fusion layer of" in fault["what"]
