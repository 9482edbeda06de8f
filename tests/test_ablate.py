"""The grid runner fills what is missing, names what cannot be, and keeps cells apart by what makes a result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.presets import PRESETS, preset
from tests.helpers.impressions import prepare_impressions
from torchx_apps import ablate, ablate_fusion
from torchx_apps.ablate import config_hash, main, parse
from torchx_apps.local_job import Job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that were asked for; each writes what the real one would."""
    started: list[Job] = []

    def run(job: Job, log_dir: Path, threads: int = 1) -> float:
        started.append(job)
        given = list(job.program_args)
        options = {flag: given[place + 1] for place, flag in enumerate(given[:-1]) if flag.startswith("--")}
        if job.component != "evaluate":
            Path(options["--run"]).mkdir(parents=True)
            (Path(options["--run"]) / "summary.json").write_text(json.dumps({"best": {"ndcg@10": 0.5}}))
            return 1.0
        folder = Path(options["--output"])
        folder.mkdir(parents=True)
        row = {"row": "model", "seconds": 60.0, "ndcg@10": 0.5}
        (folder / "evaluation.json").write_text(json.dumps({"rows": [row]}))
        users = np.arange(20)
        ranks = {"user": users, "target_row": users, "history_length": users, "rank.model": 1.0 + users}
        ranks |= {"target_events": users, "cold_rank.model": np.where(users, np.nan, 2.0), "cold_items": np.array([30])}
        save_file(ranks, folder / "ranks.safetensors")
        return 1.0

    monkeypatch.setattr(ablate, "run_job", run)
    monkeypatch.setattr(ablate_fusion, "run_job", run)
    return started


def arguments(dataset: str, output: Path, *more: str) -> list[str]:
    return ["attention", "--output", str(output), "--data.dataset", dataset, "--data.min-count", "2", *more]


def test_missing_cells_are_run_once_and_the_table_has_a_row_for_each(
    dataset: str, tmp_path: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path, "--variants", "sal,full", "--seeds", "0,1")) == 0
    assert [job.component for job in jobs] == ["train", "evaluate"] * 4
    assert "--model.attention full" in " ".join(jobs[2].program_args)
    assert "| full | 2 |" in (tmp_path / "table.md").read_text()
    jobs.clear()
    assert main(arguments(dataset, tmp_path, "--variants", "full,no_block,sal", "--seeds", "0", "--versus", "sal")) == 0
    assert [job.component for job in jobs] == ["train", "evaluate"]
    cells = sorted(json.loads(file.read_text())["variant"] for file in (tmp_path / "cells").glob("*.json"))
    assert cells == ["full", "full", "no_block", "sal", "sal"]
    assert "difference to sal" in capsys.readouterr().out


def test_a_cell_is_another_one_when_its_result_could_be(dataset: str, tmp_path: Path) -> None:
    grid = parse(arguments(dataset, tmp_path))
    config, hashes = grid.configs["sal"], {config_hash(c, "split") for c in grid.configs.values()}
    assert len(hashes) == len(grid.configs)
    assert config_hash(config, "other split") not in hashes
    longer = replace(config, trainer=replace(config.trainer, epochs=99))
    elsewhere = replace(config, seed=5, threads=3, data=replace(config.data, dataset="elsewhere", prefetch=0))
    assert config_hash(longer, "split") not in hashes
    assert config_hash(elsewhere, "split") == config_hash(config, "split")
    slower = replace(config, optimizer=replace(config.optimizer, fusion_share=0.5))
    assert config_hash(slower, "split") == config_hash(config, "split")  # nothing learns at it
    inside = replace(config, model=replace(config.model, fusion_source="fusion"))
    slower = replace(inside, optimizer=slower.optimizer)
    assert len({config_hash(c, "split") for c in (config, inside, slower)}) == 3


def test_fused_cell_is_another_one_when_its_vectors_could_be(dataset: str, tmp_path: Path) -> None:
    common = ["fusion", "--output", str(tmp_path), "--data.dataset", dataset]
    grid, other = parse(common), parse([*common, "--fuse", "--layer.width 32"])
    stems = {grid.stem(variant, 0) for variant in grid.configs}
    assert len(stems) == 6
    assert not stems & {other.stem(variant, 0) for variant in other.configs}
    assert parse([*common, "--fuse", "--threads 2"]).stem("all", 0) == grid.stem("all", 0)


def test_unknown_preset_of_fuse_is_refused(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["fusion", "--output", str(tmp_path), "--data.dataset", dataset]
    assert main([*common, "--fuse-preset", "tiny"]) == 2
    assert "preset='tiny': unknown; choose one of default, demo, short" in capsys.readouterr().err


def test_variant_that_fuses_what_the_data_lacks_is_left_out(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["content", "--output", str(tmp_path), "--data.dataset", dataset]
    grid = parse([*common, "--fuse", "--layer.anchor plot", "--versus", "raw"])
    assert list(grid.configs) == ["raw", "title"]
    assert "fused: left out: fuse: data set" in capsys.readouterr().out


def test_variant_that_the_data_has_nothing_for_is_named_and_left_out(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ablate.DatasetManifest.load
    monkeypatch.setattr(
        ablate.DatasetManifest, "load", lambda url: replace(load(url), time=replace(load(url).time, absolute=False))
    )
    grid = parse(arguments(dataset, tmp_path))
    assert "timegap" not in grid.configs
    assert "coherence" in grid.configs
    assert "timegap: left out: model.extractor.pattern.segmentation='timegap'" in capsys.readouterr().out


def test_variants_that_fuse_share_one_fusion_of_a_seed_in_a_view_of_the_data_set(
    dataset: str, tmp_path: Path, jobs: list[Job]
) -> None:
    before = (Path(dataset) / "dataset.json").read_bytes()
    shared = ["--output", str(tmp_path), "--data.dataset", dataset, "--seeds", "0", "--fuse", "--trainer.epochs 2"]
    assert main(["content", *shared, "--processes", "1"]) == 0
    assert main(["rare", *shared, "--data.min-count", "2"]) == 0
    assert [job.component for job in jobs] == ["fuse", *["train", "evaluate"] * 6]
    assert {job.processes for job in jobs[:7]} == {1}
    flags = [" ".join(job.program_args) for job in jobs if job.component == "train"]
    for text, place in (("fused", 0), ("image title", 1), ("title", 2), ("fused", 3), ("image title", 5)):
        assert f"--data.modalities {text} --" in flags[place]
    assert "--model.use-content False" in flags[4]
    fuse, train = (next(job for job in jobs if job.component == name) for name in ("fuse", "train"))
    assert "--trainer.epochs 2" in " ".join(fuse.program_args)
    table = (tmp_path / "table.md").read_text()
    assert "ranked among the 30 items without a training event; a random order hits 0.3333 (1)" in table
    view = Path(fuse.program_args[fuse.program_args.index("--dataset") + 1])
    assert train.program_args.count("--data.dataset") == 1
    assert train.program_args[train.program_args.index("--data.dataset") + 1] == str(view)
    assert sorted(link.name for link in (view / "content").iterdir()) == ["image", "title"]
    assert DatasetManifest.load(view).splits == DatasetManifest.load(dataset).splits
    assert (Path(dataset) / "dataset.json").read_bytes() == before


def test_every_preset_can_be_made() -> None:
    assert {name for name in PRESETS if preset(name).trainer.epochs >= 1} == set(PRESETS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "sall"], "--variants sall: unknown"),
        (["--versus", "full", "--variants", "sal"], "--versus full: not among the variants sal"),
        (["--preset", "tiny"], "preset='tiny': unknown"),
        (["--processes", "0"], "--processes 0: choose 1 or more"),
    ],
)
def test_wrong_argument_is_refused_before_anything_runs(
    more: list[str], message: str, dataset: str, tmp_path: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path / "grid", *more)) == 2
    assert message in capsys.readouterr().err
    assert not jobs
    assert not (tmp_path / "grid").exists()


def test_rankers_are_compared_by_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = prepare_impressions(tmp_path / "data")

    def run(job: Job, log_dir: Path, threads: int = 1) -> float:
        given = list(job.program_args)
        options = {flag: given[place + 1] for place, flag in enumerate(given[:-1]) if flag.startswith("--")}
        folder = Path(options["--run"] if job.component == "train" else options["--output"])
        folder.mkdir(parents=True)
        if job.component == "train":
            (folder / "summary.json").write_text(json.dumps({"best": {"auc": 0.5}}))
            return 1.0
        (folder / "evaluation.json").write_text(json.dumps({"rows": [{"row": "model", "seconds": 60.0}]}))
        users = np.arange(40)
        label, good = (users % 2).astype(np.uint8), "dmae" in options["--run"]
        logit = (label if good else 1 - label).astype(np.float32)
        scores = {
            "row": users,
            "user": users,
            "item_count": users % 3,
            "label.click": label,
            "logit.model.click": logit,
        }
        save_file(scores, folder / "scores.safetensors")
        return 1.0

    monkeypatch.setattr(ablate, "run_job", run)
    asked = ["ranking", "--output", str(tmp_path / "out"), "--data.dataset", dataset, "--variants", "dmae,din"]
    assert main([*asked, "--seeds", "0"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| dmae | 1 | 1.0000 |" in table and "| din | 1 | 0.0000 |" in table and "-1.0000 [-1.0000" in table
