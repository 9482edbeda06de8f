"""The grid runner fills what is missing, names what cannot be, and keeps cells apart by what makes a result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from torchx_apps import ablate
from torchx_apps.ablate import config_hash, main, parse
from torchx_apps.local_job import Job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that were asked for; each writes what the real one would."""
    started: list[Job] = []

    def run(job: Job, log_dir: Path, threads: int = 1) -> float:
        started.append(job)
        options = dict(zip(job.program_args[::2], job.program_args[1::2]))
        if job.component == "train":
            Path(options["--run"]).mkdir(parents=True)
            (Path(options["--run"]) / "summary.json").write_text(json.dumps({"best": {"ndcg@10": 0.5}}))
            return 1.0
        folder = Path(options["--output"])
        folder.mkdir(parents=True)
        row = {"row": "model", "seconds": 60.0, "ndcg@10": 0.5}
        (folder / "evaluation.json").write_text(json.dumps({"rows": [row]}))
        users = np.arange(20)
        ranks = {"user": users, "target_row": users, "history_length": users, "rank.model": 1.0 + users}
        save_file(ranks, folder / "ranks.safetensors")
        return 1.0

    monkeypatch.setattr(ablate, "run_job", run)
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "sall"], "--variants sall: unknown"),
        (["--versus", "full", "--variants", "sal"], "--versus full: not among the variants sal"),
        (["--preset", "tiny"], "preset='tiny': unknown"),
    ],
)
def test_wrong_argument_is_refused_before_anything_runs(
    more: list[str], message: str, dataset: str, tmp_path: Path, jobs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path / "grid", *more)) == 2
    assert message in capsys.readouterr().err
    assert not jobs
    assert not (tmp_path / "grid").exists()
