"""All programs in one job of two processes, from an empty folder, by a user who has installed the package alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.datasets import write_source
from tests.helpers.installed import torchx
from torchx_apps.chain_steps import PLACES, STEPS


@pytest.mark.slow
def test_whole_chain_runs_as_one_job_of_two_processes(site: Path, tmp_path: Path) -> None:
    source, folder = write_source(tmp_path / "source"), tmp_path / "empty"
    folder.mkdir()
    told = ["--input", str(source), "--run", "run", "--preset", "demo"]
    told += ["prepare:", "--columns.item-categoricals", "genres", "fuse:", "--trainer.epochs", "1", "--report", "False"]
    told += ["train:", "--trainer.max-steps", "2", "--model.width", "16", "export:", "--tables", "item"]
    job = ("run", "-s", "local_cwd", "-cfg", "log_dir=logs", "components.chain:chain", "-j", "1x2", "--", *told)
    ran = torchx(site, *job, cwd=folder, timeout_s=600)
    assert ran.returncode == 0, ran.stderr
    for step, (place, file) in PLACES.items():
        assert (folder / "run" / place / file).exists(), step
        assert f"step {step} done in" in ran.stderr
    rows = json.loads((folder / "run" / "evaluation" / "summary.json").read_text())
    assert {"model", "popularity"} <= {row["row"] for row in rows}
    assert "fused" in json.loads((folder / "run" / "dataset" / "dataset.json").read_text())["content"]
    by_hand = [sys.executable, "-m", "torchx_apps.chain", *told]  # without a launcher
    env = {**os.environ, "PYTHONPATH": str(site)}
    again = subprocess.run(by_hand, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is done already") == len(STEPS)
