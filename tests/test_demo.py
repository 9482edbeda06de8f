"""The demo's driver: arguments, run folder, table, and real jobs with tiny programs in place of the apps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchx_apps import demo, local_job
from torchx_apps.demo import (
    MARKER,
    OUTPUTS,
    DemoOptions,
    claim_run_folder,
    format_table,
    fuse_job,
    main,
    prepare_job,
    train_jobs,
)
from torchx_apps.local_job import Job, JobFailedError, Output, readable, run_job

COMPONENTS = Path(__file__).resolve().parent.parent / "components"
# Stands for each app: writes what the demo reads of it.
PROGRAM = """
import json, logging, os, pathlib, sys, time
rank = os.environ["RANK"]
logging.basicConfig(format=f"%(asctime)s [{rank}] %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
logging.warning("heard %s", sys.argv[1:])
if os.environ.get("FAKE_WAIT"):
    pathlib.Path(os.environ["FAKE_WAIT"], rank).write_text(str(os.getpid()))
    time.sleep(300)
if options.get("--preset") == "ml-1m" and rank == "1":
    raise ValueError("preset is 'broken': give another")
if rank == "0":
    if "--input" in options:
        folder = pathlib.Path(options["--output"])
        folder.mkdir()
        (folder / "dataset.json").write_text(json.dumps({"content": {"title": {}}, "features": {}}))
    elif "--output" in options:
        rows = [{"row": "model", "hr@10": 0.25, "users": 7}, {"row": "popularity", "hr@10": 0.125, "users": 7}]
        (pathlib.Path(options["--output"]) / "summary.json").write_text(json.dumps(rows))
"""


@pytest.fixture
def tiny_apps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Components as they are, but with a tiny program in place of each app; the working folder is theirs."""
    (tmp_path / "components").mkdir()
    for file in COMPONENTS.glob("*.py"):
        text = file.read_text().replace('"torchx_apps.', '"tiny_')
        (tmp_path / "components" / file.name).write_text(text)
        (tmp_path / f"tiny_{file.stem}.py").write_text(PROGRAM)
    monkeypatch.setattr(local_job, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "ctr"], "task is 'ctr': the tasks that exist are retrieval, ranking; give TASK=retrieval"),
        (["--seed", "x"], "seed is 'x': give a whole number"),
        (["--seed", "-1"], "seed is -1"),
        (["--data", "nowhere"], "data is 'nowhere': no such folder"),
        (["--run", "a,b"], "run is 'a,b': TorchX takes no log folder"),
    ],
)
def test_wrong_argument_names_field_value_and_remedy(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_empty_arguments_of_make_are_the_defaults() -> None:
    assert demo.parse_options(["--data", "", "--run", "", "--preset", "", "--task", "", "--seed", ""]) == DemoOptions()


def test_data_inside_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "dataset").mkdir(parents=True)
    with pytest.raises(ValueError, match="inside the run folder"):
        DemoOptions(data=str(tmp_path / "run" / "dataset"), run=tmp_path / "run")


def test_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(
        ValueError, match=r"run is .*: the folder holds model, which no demo wrote; give another with RUN="
    ):
        claim_run_folder(DemoOptions(run=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_marker_is_not_taken_for_ours(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"created_by": "someone"}'):
        (tmp_path / MARKER).write_text(text)
        with pytest.raises(ValueError, match="no demo wrote"):
            claim_run_folder(DemoOptions(run=tmp_path))


def test_earlier_demo_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    claim_run_folder(DemoOptions(run=tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").touch()
    (tmp_path / "summary.json").touch()
    (tmp_path / "notes.txt").touch()
    claim_run_folder(DemoOptions(run=tmp_path, seed=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "notes.txt"]
    assert json.loads((tmp_path / MARKER).read_text())["data"] == "synthetic:3"
    assert "notes.txt" not in OUTPUTS


def test_table_orders_rows_and_dashes_what_is_missing() -> None:
    rows = [
        {"row": "oracle", "hr@10": 0.5, "users": 1234},
        {"row": "popularity", "hr@10": 0.1, "ndcg@10": 0.05, "cold_hr@10": None, "mrr": float("nan"), "users": 1234},
        {"row": "another", "hr@10": 0.3, "users": 1234},
    ]
    lines = format_table(rows).splitlines()
    assert lines[0].startswith("1,234 users")
    assert [line.split()[0] for line in lines[1:4]] == ["popularity", "oracle", "another"]
    assert lines[1].split() == ["popularity", "0.1000", "0.0500", "–", "–", "–", "–"]


def test_log_line_loses_its_decoration_but_not_its_level() -> None:
    assert readable("12:00:01 [0] I mufasa_rec.data: 5 users") == "5 users"
    assert readable("12:00:01 [0] W mufasa_rec.data: odd") == "warning: odd"
    assert readable("  a table line") == "  a table line"


def test_last_words_are_the_errors_of_any_process() -> None:
    output = Output()
    for line in ("train/0 [0]:fine", "train/0 [1]:[rank1]: ValueError: x is 3: give 4", "train/0 Traceback"):
        output.take(line)
    assert output.last_words() == "  rank 1: ValueError: x is 3: give 4"


def test_last_words_without_an_error_are_the_last_lines() -> None:
    output = Output()
    output.take("torchx ERROR no such component")
    assert output.last_words() == "  torchx ERROR no such component"
    output.take("train/0 [0]:usage: ...")
    assert output.last_words() == "  usage: ..."


@pytest.mark.slow
def test_demo_runs_its_jobs_and_prints_the_table(tiny_apps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", "run"]) == 0
    printed = capsys.readouterr().out
    expected = ["--preset", "demo", "--data.dataset", "run/dataset", "--run", "run/model_without_content"]
    assert f"warning: heard {[*expected, '--model.use_content', 'False']}" in printed
    assert "model_without_content=run/model_without_content" in printed
    assert "'--data.modalities', 'fused', '--run', 'run/model'" in printed
    assert printed.count("heard") == 5  # One process of each job is shown.
    assert [line.split()[:2] for line in printed.splitlines() if "0.2500" in line] == [["model", "0.2500"]]
    assert sorted(path.name for path in (tiny_apps / "run" / "logs").iterdir()) == [
        *("evaluate", "fuse", "prepare", "train", "train_without_content"),
    ]


def test_demo_of_data_without_content_leaves_fuse_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def run(job: Job, log_dir: Path, threads: int) -> float:
        jobs.append(job)
        if job.name == "prepare":
            (tmp_path / "run" / "dataset").mkdir()
            (tmp_path / "run" / "dataset" / "dataset.json").write_text('{"content": {}, "features": {}}')
        if job.name == "evaluate":
            (tmp_path / "run" / "summary.json").write_text('[{"row": "model", "hr@10": 0.25}]')
        return 1.0

    monkeypatch.setattr(demo, "run_job", run)
    assert main(["--run", str(tmp_path / "run")]) == 0
    assert "fuse is left out: the data has no content vectors" in capsys.readouterr().out
    assert [job.name for job in jobs] == ["prepare", "train", "evaluate"]
    assert "--data.modalities" not in jobs[1].program_args
    assert "--compare" not in jobs[2].program_args


def test_fuse_takes_what_the_data_has() -> None:
    genres = {"genres": {"level": "item"}, "device": {"level": "event"}}
    job = fuse_job(DemoOptions(), {"content": {"title": {}, "image": {}}, "features": genres})
    assert job is not None
    common = ["--dataset", "runs/demo/dataset", "--run", "runs/demo/fusion"]
    assert job.program_args == ["--preset", "demo", *common]
    other = fuse_job(DemoOptions(preset="ml-1m"), {"content": {"sound": {}, "image": {}}, "features": {}})
    assert other is not None
    assert other.program_args == ["--preset", "default", *common, "--layer.anchor", "image", "--genre", "none"]
    assert fuse_job(DemoOptions(), {"content": {}, "features": genres}) is None


def test_model_reads_the_fused_vectors_alone_and_its_rival_no_content() -> None:
    model, rival = (job.program_args for job in train_jobs(DemoOptions(), with_content=True))
    assert model[model.index("--data.modalities") + 1 :][:2] == ["fused", "--run"]
    assert rival[-2:] == ["--model.use_content", "False"]
    assert "--data.modalities" not in [*rival, *train_jobs(DemoOptions(), with_content=False)[0].program_args]


@pytest.mark.slow
def test_failing_job_ends_the_demo_with_its_name_its_log_and_its_error(
    tiny_apps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", "run", "--preset", "ml-1m"]) == 1
    message = capsys.readouterr().err
    assert "job 'train' failed" in message
    assert f"its logs: {Path('run', 'logs', 'train')}" in message
    assert "rank 1: ValueError: preset is 'broken': give another" in message
    assert not (tiny_apps / "run" / "summary.json").exists()


def test_unknown_component_is_a_failed_job(tiny_apps: Path) -> None:
    with pytest.raises(JobFailedError, match=r"job 'x' failed[\s\S]*nothing"):
        run_job(Job(name="x", component="nothing", program_args=[]), tiny_apps / "logs")


@pytest.mark.slow
def test_interrupted_demo_leaves_no_process_behind(tiny_apps: Path) -> None:
    (tiny_apps / "pids").mkdir()
    program = (
        "import pathlib, sys; from torchx_apps import demo, local_job; "
        "local_job.ROOT = pathlib.Path.cwd(); sys.exit(demo.main([]))"
    )
    root = str(COMPONENTS.parent)
    environment = {**os.environ, "FAKE_WAIT": str(tiny_apps / "pids"), "PYTHONPATH": root}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tiny_apps / "pids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert (process.returncode, "interrupted" in message) == (130, True)
    pids = [int(path.read_text()) for path in (tiny_apps / "pids").iterdir()]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_unknown_preset_is_refused_before_any_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--run", str(tmp_path / "run"), "--preset", "fast"]) == 2
    assert "preset='fast': unknown; choose one of default, demo, ml-1m" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_rows_hold_no_more_targets_than_the_preset_reads() -> None:
    arguments = prepare_job(DemoOptions(preset="ml-1m")).program_args
    assert arguments[arguments.index("--split.targets-per-row") + 1] == "200"


def test_columns_without_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns is 'c.json' without data"):
        DemoOptions(columns="c.json")
