"""Whole runs as a user starts them: quiet, in bf16 too, and ended by one rank's error."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mufasa_rec.config import CONFIG_FILE, save_config
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in
from torchx_apps.train import main


def test_run_under_torchrun_logs_its_own_lines_only(dataset: str, tmp_path: Path) -> None:
    save_config(small_config(dataset, max_steps=4, log_every=2), tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--", "torchx_apps.train"]
    program = ["--config", str(tmp_path / CONFIG_FILE), "--run", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *program], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "max_history=12: rows have targets further back" in done.stderr  # the one warning that is ours
    told = ("torchx_apps", "mufasa_rec", "__main__")
    strange = [line for line in done.stderr.splitlines() if line.strip() and not any(name in line for name in told)]
    assert not strange
    assert [line["step"] for line in metrics_of(tmp_path / "run", "train")] == [2, 4]
    assert len(metrics_of(tmp_path / "run", "validation")) == 1


def test_checkpoints_that_could_not_be_written_are_refused_before_the_first_step(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = ["--preset", "demo", "--data.dataset", dataset, "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"checkpoint.folder='.*/file/here': cannot be written, .*/file: no folder"):
        main([*told, "--checkpoint.folder", str(tmp_path / "file" / "here")])
    assert list((tmp_path / "run").iterdir()) == []


def test_bf16_run_learns(dataset: str, tmp_path: Path) -> None:
    run_ranks(train_in, 2, small_config(dataset, max_steps=24, bf16=True), tmp_path / "run")
    losses = [line["loss"] for line in metrics_of(tmp_path / "run", "train")]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_error_in_one_ranks_loader_thread_ends_the_run(dataset: str, tmp_path: Path) -> None:
    """The last row group, which only one rank reads in the first steps, is broken."""
    folder = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    file = folder / "events/base/bucket-00000.parquet"
    table = pq.ParquetFile(file)
    groups = [table.read_row_group(index) for index in range(table.num_row_groups)]
    last = groups[-1].to_pydict()
    last["item"] = [[999_999] * len(items) for items in last["item"]]
    groups[-1] = type(groups[-1]).from_pydict(last, schema=groups[-1].schema)
    with pq.ParquetWriter(file, table.schema_arrow) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, group.num_rows))
    config = small_config(str(folder), max_steps=30)
    with pytest.raises(AssertionError, match=r"rank \d of 2 failed(.|\n)*ids of the events are not in the item store"):
        run_ranks(train_in, 2, replace(config, data=replace(config.data, prefetch=2)), tmp_path / "run", timeout_s=60)
