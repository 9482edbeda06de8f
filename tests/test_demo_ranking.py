"""The demo of the ranking task: which jobs, with which flags, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from mufasa_rec.models.ranker_config import ROWS, comparator
from mufasa_rec.presets import preset
from torchx_apps import command_line, demo, demo_ranking
from torchx_apps.grids import RANKING

RUN = Path("runs/demo-ranking")


@pytest.mark.parametrize("row", ROWS)
def test_flags_of_a_row_are_the_comparator(row: str) -> None:
    flags = ["--preset", "demo-ranking", *RANKING[row].train]
    _, config = command_line.parse(command_line.parser("test", None), flags, lambda _: None)
    assert config.ranker == comparator(preset("demo-ranking").ranker, row)


def test_every_row_is_trained_and_all_are_judged_together() -> None:
    *trains, evaluate = demo_ranking.jobs("demo-ranking", RUN, has_content=True)
    assert {job.name.removeprefix("train ") for job in trains} == set(ROWS)
    assert {job.component for job in trains} == {"train"} and evaluate.component == "evaluate"
    runs = {job.program_args[job.program_args.index("--run") + 1] for job in trains}
    assert runs == {f"runs/demo-ranking/{row}" for row in ROWS}
    told = evaluate.program_args
    assert told[: told.index("--compare")] == [
        *("--run", "runs/demo-ranking/dmae", "--name", "dmae", "--output", "runs/demo-ranking"),
    ]
    compared = dict(pair.split("=") for pair in told[told.index("--compare") + 1].split(","))
    assert compared == {row: f"runs/demo-ranking/{row}" for row in ROWS if row != "dmae"}


def test_without_content_there_is_one_row() -> None:
    train, evaluate = demo_ranking.jobs("demo-ranking", RUN, has_content=False)
    assert train.name == "train din" and "--compare" not in evaluate.program_args


def test_ranking_has_a_folder_a_preset_and_a_source_of_its_own() -> None:
    options = demo.parse_options(["--task", "ranking", "--run", "", "--preset", "", "--seed", "2"])
    assert (options.run, options.preset, options.source) == (RUN, "demo-ranking", "synthetic:clicks:2")
    given = demo.parse_options(["--task", "ranking", "--run", "there", "--preset", "ranking"])
    assert (given.run, given.preset) == (Path("there"), "ranking")


def test_preset_of_another_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--task", "ranking", "--preset", "demo"]) == 2
    assert "preset is 'demo', which is for retrieval" in capsys.readouterr().err


def test_everything_that_is_written_is_replaced_by_the_next_demo() -> None:
    assert {*ROWS, "scores.safetensors"} <= set(demo.OUTPUTS)


def test_table_has_the_rows_in_order_and_dashes_for_what_cannot_be_told() -> None:
    row = {
        "auc": 0.75,
        "gauc": 0.7,
        "logloss": 0.5,
        "ne": 0.9,
        "calibration": 1.0,
        "cold_auc": None,
        "impressions": 2000,
    }
    lines = demo_ranking.format_table([{"row": name} | row for name in ("dmae", "oracle", "din")]).splitlines()
    assert lines[0].startswith("2,000 impressions") and lines[0].endswith("cold AUC")
    assert [line.split()[0] for line in lines[1:4]] == ["DIN", "DMAE", "oracle"]
    assert lines[2].split()[1:] == ["0.7500", "0.7000", "0.5000", "0.9000", "1.0000", "–"]
