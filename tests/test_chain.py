"""The chain: what each step is told, what is done again and what is not; tests/schedulers/test_chain_run.py runs it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from torchx_apps import chain
from torchx_apps.chain_steps import PLACES, STEPS, ChainOptions, arguments_of, parse, refuse_wrong


class OneProcess:
    """An exchange without peers."""

    rank = 0

    def objects(self, value: Any) -> list[Any]:
        return [value]


class Programs(chain.StepRunner):
    """Writes what a step's program would write last, or fails."""

    def __init__(self, root: Path, fails: str = "", content: bool = True) -> None:
        super().__init__()
        self.root, self.fails, self.content, self.told = root, fails, content, []

    def run(self, step: str, arguments: list[str], port: int) -> int:
        self.told.append((step, arguments))
        if step == self.fails:
            return 3
        folder, file = PLACES[step]
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        manifest = {"content": {"picture": {}} if self.content else {}, "features": {}}
        (self.root / folder / file).write_text(json.dumps(manifest))
        return 0


@pytest.fixture
def options(tmp_path: Path) -> ChainOptions:
    return ChainOptions(run=str(tmp_path), input="shop", preset="demo", more={"train": ["--trainer.epochs", "3"]})


def run(options: ChainOptions, **programs: Any) -> dict[str, list[str]]:
    """Run a chain; returns what was told to the steps that were done."""
    runner = Programs(Path(options.run), **programs)
    try:
        chain.run_chain(options, runner, OneProcess())  # pyrefly: ignore[bad-argument-type]
    finally:
        restore_signals()
    return dict(runner.told)


def restore_signals() -> None:
    for number in chain.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_steps_are_told_their_folders_and_what_is_meant_for_them(options: ChainOptions, tmp_path: Path) -> None:
    told = run(options)
    dataset, model = f"{tmp_path}/dataset", f"{tmp_path}/model"
    assert list(told) == list(STEPS)
    assert told["prepare"] == ["--input", "shop", "--output", dataset, "--split.targets-per-row", "64"]
    assert told["fuse"][:6] == ["--preset", "demo", "--dataset", dataset, "--run", f"{tmp_path}/fusion"]
    assert told["fuse"][6:] == ["--layer.anchor", "picture", "--genre", "none"]
    places = ["--data.dataset", dataset, "--run", model]
    assert told["train"] == ["--preset", "demo", *places, "--data.modalities", "fused", "--trainer.epochs", "3"]
    assert told["evaluate"] == ["--run", model, "--output", f"{tmp_path}/evaluation"]
    assert told["export"] == ["--run", model, "--output", f"{tmp_path}/tables"]


def test_done_steps_are_not_done_again(options: ChainOptions) -> None:
    run(options)
    assert run(options) == {}


def test_failed_step_ends_the_chain_which_goes_on_with_it(options: ChainOptions) -> None:
    with pytest.raises(SystemExit, match=r"chain: step train failed \(exit code 3\)"):
        run(options, fails="train")
    assert list(run(options)) == ["train", "evaluate", "export"]


def test_process_whose_step_has_failed_does_not_wait_for_its_peers(options: ChainOptions) -> None:
    class Peers(OneProcess):
        asked = 0

        def objects(self, value: Any) -> list[Any]:
            self.asked += 1
            return [value]

    peers = Peers()
    try:
        with pytest.raises(SystemExit, match="step prepare failed"):
            chain.run_chain(options, Programs(Path(options.run), fails="prepare"), peers)  # pyrefly: ignore
    finally:
        restore_signals()
    assert peers.asked == 1  # what to do


def test_step_with_other_arguments_and_those_behind_it_are_done_again(options: ChainOptions, tmp_path: Path) -> None:
    run(options)
    (tmp_path / "tables" / "old").touch()
    longer = ChainOptions(run=options.run, input="shop", preset="demo", more={"train": ["--trainer.epochs", "4"]})
    assert list(run(longer)) == ["train", "evaluate", "export"]
    assert not (tmp_path / "tables" / "old").exists()


def test_step_whose_result_is_gone_is_done_again(options: ChainOptions, tmp_path: Path) -> None:
    run(options)
    (tmp_path / "evaluation" / "summary.json").unlink()
    assert list(run(options)) == ["evaluate", "export"]


def test_nothing_is_fused_where_there_is_no_content(options: ChainOptions) -> None:
    told = run(options, content=False)
    assert "fuse" not in told
    assert "--data.modalities" not in told["train"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--input: missing; give what prepare reads"),
        (["--input", "i", "--steps", "prepare,polish"], "step 'polish': unknown; the steps are prepare, fuse, train"),
        (["--input", "i", "polish:", "--x"], "step 'polish': unknown"),
        (["--input", "i", "--steps", "prepare", "train:", "--x"], "train: has arguments, but --steps leaves it out"),
        (["--input", "i", "train:", "--data.dataset", "D"], "train: --data.dataset is given by the chain itself"),
        (["--input", "i", "prepare:", "--output=D"], "prepare: --output=D is given by the chain itself"),
        (["--input", "i", "stray"], "'stray': belongs to no step"),
    ],
)
def test_wrong_command_line_names_what_is_wrong(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(["--run", "r", *argv], None)


@pytest.mark.parametrize("step", STEPS)
def test_arguments_of_a_step_are_read_by_its_own_parser_before_any_begins(
    step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(["--run", "r", "--input", "i", "--preset", "demo", f"{step}:", "--no-such", "1"], None)
    with pytest.raises(SystemExit):
        refuse_wrong(options)
    assert "--no-such" in capsys.readouterr().err
    refuse_wrong(parse(["--run", "r", "--input", "i", "--preset", "demo"], None))


def test_targets_of_a_row_follow_the_history_that_the_training_is_told() -> None:
    options = parse(["--run", "r", "--input", "i", "train:", "--data.max-history", "17"], None)
    assert arguments_of("prepare", options, with_content=True)[-2:] == ["--split.targets-per-row", "17"]


STEP = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit(75)))
pathlib.Path("begun").write_text(os.environ["MASTER_PORT"] + " " + os.environ["LAUNCHER_PID"])
time.sleep(60)
"""


def test_signal_reaches_the_step_and_no_other_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "train.py").write_text(STEP)
    monkeypatch.chdir(tmp_path)
    runner = chain.StepRunner("steps")

    def stop() -> None:
        while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        threading.Thread(target=stop, daemon=True).start()
        assert runner.run("train", [], 1234) == chain.EXIT_CODE
        assert runner.run("evaluate", [], 1234) == chain.EXIT_CODE
    finally:
        restore_signals()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "begun").read_text() == f"1234 {os.getpid()}"
