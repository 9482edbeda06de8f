"""What a pre-flight finds for each program; how the schedulers use it: tests/schedulers/test_planted_mistakes.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mufasa_rec.config import save_config
from tests.helpers.runs import small_config
from torchx_apps.preflight import check, main
from torchx_apps.preflight_findings import Findings, Machines


def findings_of(program: str, *arguments: str, machines: Machines | None = None) -> Findings:
    findings = Findings(machines or Machines(processes=2))
    check(f"torchx_apps.{program}", arguments, findings)
    return findings


@pytest.fixture
def run(dataset: str, tmp_path: Path) -> str:
    """A run that has not saved anything yet."""
    (tmp_path / "run").mkdir()
    save_config(small_config(dataset), tmp_path / "run")
    return str(tmp_path / "run")


def test_every_program_without_a_mistake_has_no_problem(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    new = str(tmp_path / "new")
    for told in (
        ("prepare", "--input", str(tmp_path / "raw"), "--output", new),
        ("prepare", "--check", dataset),
        ("fuse", "--dataset", dataset, "--run", new),
        ("train", "--data.dataset", dataset, "--run", new),
        ("doctor", "--preset", "demo", "--data.dataset", dataset),
        ("doctor", "--preset", "demo", "--items", "1e5"),
        ("doctor", "--factory", "shop.models:make"),
        ("plan", "--preset", "billion", "--topology", "8xH100"),
        ("plan", "--data.dataset", dataset, "--topology", "2xCPU"),
        ("chain", "--input", "synthetic:0", "--run", new),
    ):
        findings = findings_of(*told)
        assert findings.problems == [], told
    assert not Path(new).exists()


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("prepare --input gone --output new", "--input gone: there is nothing; give a folder, an events file, or"),
        ("prepare --input synthetic:0 --output new --columns-file gone", "--columns-file gone: there is nothing"),
        ("prepare --check gone", "--check gone: there is nothing"),
        ("fuse --run new", "dataset: missing; give the folder that `prepare` wrote, as `--dataset FOLDER`"),
        ("fuse --run new --dataset gone", "dataset gone: there is nothing"),
        ("fuse --dataset gone", "--run: missing; give a folder"),
        ("train --preset demi --run new", "preset='demi': unknown; choose one of default, demo"),
        ("train --run s3://b/run", "run='s3://b/run': logs are appended to while training"),
        ("evaluate --run gone --output new", "--run gone: there is nothing; give the folder that `train --run` wrote"),
        ("evaluate --run r --compare x --output new", "--compare 'x': write NAME=FOLDER"),
        ("export --run gone", "arguments of torchx_apps.export: export: error: the following arguments are required"),
        ("chain --run new", "--input: missing; give what prepare reads"),
        ("chain --run new --input i --steps train", "data.dataset new/dataset: there is nothing"),
        ("doctor --preset demo", "data.dataset: missing; give the folder that `prepare` wrote"),
        ("doctor --data.dataset gone", "data.dataset gone: there is nothing"),
        ("doctor --items 0", "items=0: choose 1 or more"),
        ("plan --preset billion", "--topology: missing; give one such as 8xH100"),
        ("plan --preset billion --topology 8xX", "topology='8xX'"),
        ("plan --topology 8xH100 --manifest gone", "--manifest gone: there is nothing"),
        ("benchmark speed", "benchmark 'speed': unknown; choose one of attention, "),
        ("nothing --x", "program torchx_apps.nothing: there is no such module"),
    ],
)
def test_mistake_is_found_with_its_remedy(
    told: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = told.split()
    assert any(problem in one for one in findings_of(program, *arguments).problems)


def test_run_without_a_checkpoint_is_none_to_judge_or_export(run: str, tmp_path: Path) -> None:
    for program in ("evaluate", "export"):
        (problem,) = findings_of(program, "--run", run, "--output", str(tmp_path / "new")).problems
        assert "holds no checkpoint; train the run until it has saved one" in problem


def test_export_is_not_written_over(run: str) -> None:
    assert any(
        f"--output {run}: already exists" in one
        for one in findings_of("export", "--run", run, "--output", run).problems
    )


def test_column_that_the_first_row_group_lacks_is_named(dataset: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset, tmp_path / "copy"))
    file = sorted((folder / "events" / "base").iterdir())[0]
    pq.write_table(pq.read_table(file).drop_columns(["device"]), file)
    (problem,) = findings_of("train", "--data.dataset", str(folder), "--run", str(tmp_path / "new")).problems
    assert problem.startswith(f"data.dataset {folder}: ")
    assert "column 'device' is missing; it has" in problem


def test_configuration_in_the_image_is_not_looked_for_here(tmp_path: Path) -> None:
    machines = Machines(nodes=2, processes=8, gpus=8, elsewhere=True, mounts=("/runs", "/data:ro"))
    told = ("--config", "shop.yaml", "--run", "/runs/a")
    findings = findings_of("train", *told, machines=machines)
    assert findings.problems == []
    assert findings.unseen[0].startswith("--config shop.yaml: lies where the job runs and on no volume")
    assert findings.unseen[1] == "--run /runs/a: lies where the job runs"


def test_store_that_this_machine_may_not_write_is_the_affair_of_a_job_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(url: str) -> None:
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr("mufasa_rec.data.paths.try_to_write", closed)
    here, elsewhere = Findings(Machines()), Findings(Machines(elsewhere=True))
    for findings in (here, elsewhere):
        findings.writable("checkpoint.folder", "memory://bucket")
    assert here.problems == [
        "checkpoint.folder memory://bucket: Access Denied; choose a folder that this user may write"
    ]
    assert (elsewhere.problems, len(elsewhere.unseen)) == ([], 1)


def test_by_hand_problems_are_errors_and_the_rest_is_shown(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--processes", "2", "--memory-mb", "8000", "--", "torchx_apps.train", "--data.dataset"]
    assert main([*told, dataset, "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "checked: plan of the tables on 1x2xCPU: fits" in said.out
    assert main([*told, "gone", "--run", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert said.err == "data.dataset gone: there is nothing; give the folder that `prepare` wrote\n"
    assert "checked: --run" in said.out
