"""Benchmarks run, check what they measure, and write rows that say where they were measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torchx_apps.benchmark import main, names_of_benchmarks
from torchx_apps.benchmarks import ranking
from torchx_apps.benchmarks._measure import Settings


def test_every_file_of_the_folder_is_a_benchmark() -> None:
    assert {"attention", "loader", "ranking", "train_step"} <= set(names_of_benchmarks())
    assert not [name for name in names_of_benchmarks() if name.startswith("_")]


@pytest.mark.parametrize("name", ["loader", "ranking", "tables", "train_step"])
def test_benchmark_prints_a_table_and_writes_rows(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    program = [sys.executable, "-m", "torchx_apps.benchmark", name, "--small", "--rounds", "2", "--json", str(file)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert len(rows) >= 4
    for row in rows:
        assert row["benchmark"] == name
        assert row["case"] in done.stdout
        assert 0 <= row["p10"] <= row["median"] <= row["p90"]
        assert {"device", "threads", "versions", "commit", "shape", "unit"} <= row.keys()
        assert row["versions"]["torch"]


def test_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "'loader'" in capsys.readouterr().err


def test_no_rounds_are_refused() -> None:
    with pytest.raises(SystemExit, match="--rounds 0: choose 1 or more"):
        main(["loader", "--rounds", "0"])


def test_attention_rows_have_the_columns_that_others_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    main(["attention", "--small", "--rounds", "1", "--json", str(file)])
    rows, printed = json.loads(file.read_text()), capsys.readouterr().out
    for row in rows:
        assert row["benchmark"] == "attention"
        assert row["case"] in printed
        assert {"device", "threads", "versions", "commit", "shape", "unit"} <= row.keys()
    columns = "budget length lengths dtype path dense ms dense_ms ratio useful_gflops peak_bytes_per_token checked"
    assert all({*columns.split(), "kv_groups", "shared_kv"} <= row.keys() for row in rows)
    lean = [row for row in rows if row["budget"] == "lean"]
    assert {row["lengths"] for row in lean} == {"uniform", "zipf"}
    assert {row["dtype"] for row in lean} == {"float32", "bfloat16"}
    assert {row["shared_kv"] for row in lean} == {True, False}
    assert all(row["checked"] and row["ratio"] > 0 and row["useful_gflops"] > 0 for row in lean)


def test_requests_of_eight_candidates_save_user_side_work() -> None:
    """Counted, not timed: at least 5.6 times less than the same impressions one by one."""
    rows = {row.case: row.median for row in ranking.counted(Settings(small=True))}
    saved = {name: value for name, value in rows.items() if name.endswith("user-side operations saved")}
    assert len(saved) == 3
    assert all(value >= 5.6 for value in saved.values()), saved


def test_large_table_is_stepped_beside_a_small_one_on_two_ranks(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    program = [sys.executable, "-m", "torchx_apps.benchmark", "large_table", "--small", "--json", str(file)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert [row["unit"] for row in rows] == ["ms", "ms", "x the time", "x"]
    assert all(row["checked"] and row["median"] > 0 and row["shape"]["ranks"] == 2 for row in rows)


def test_encoding_is_measured_beside_the_matrix_products_alone(tmp_path: Path) -> None:
    main(["encode", "--small", "--processes", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unit"] for row in rows] == ["items/s", "items/s", "x", "items/s", "GiB"]
    assert all(row["checked"] and row["median"] > 0 and row["shape"]["items"] == 3000 for row in rows)
    assert rows[2]["median"] == pytest.approx(rows[0]["median"] / rows[1]["median"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]  # the catalog is gone
