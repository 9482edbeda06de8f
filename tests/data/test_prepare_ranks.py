"""Two processes: the modalities are shared, the result is that of one, and one rank's error ends both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.ranks import Ranks
from mufasa_rec.data.schema import DatasetManifest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    pq.write_table(pa.table({"user": [1, 1, 1], "item": [1, 2, 3], "position": [0, 1, 2]}), folder / "events.parquet")
    for name in ("a", "b", "c"):
        np.savez(folder / f"{name}.npz", item_id=np.array([1, 2]), vector=np.eye(2, dtype=np.float32))
    return folder


def _two_ranks(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    program = ["-m", "torchx_apps.prepare", "--input", str(source), "--output", str(output)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *program], capture_output=True, text=True, timeout=120, check=False
    )


def test_two_ranks_write_what_one_writes(source: Path, tmp_path: Path) -> None:
    alone = prepare(PrepareConfig(input=str(source), output=str(tmp_path / "alone")))
    done = _two_ranks(source, tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    assert DatasetManifest.load(tmp_path / "shared") == alone
    assert sorted(alone.content) == ["a", "b", "c"]
    assert done.stdout.count("Data set source") == 1
    assert "[1] I mufasa_rec.data.prepare: content a" in done.stderr


def test_an_error_of_rank_one_ends_both_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    np.savez(source / "a.npz", item_id=np.array([1, 2]), vector=np.array([[1.0, np.nan], [0.0, 1.0]], np.float32))
    done = _two_ranks(source, tmp_path / "set")
    assert done.returncode != 0
    assert "modality `a`" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_world_of_one_shares_with_itself() -> None:
    ranks = Ranks()
    assert ranks.together(lambda: 3) == [3]
    assert ranks.first(lambda: "x") == "x"
    with pytest.raises(ValueError, match="mine"):
        ranks.first(_fail)


def _fail() -> None:
    raise ValueError("mine")
