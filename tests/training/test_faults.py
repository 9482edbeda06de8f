"""Runs by real torchrun that are killed and started again end as if nothing had been; a process that cannot save ends.

Times are upper bounds of a hang only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from mufasa_rec.config import RunConfig, save_config
from mufasa_rec.data.batch import Batch
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.retrieval import Evaluator
from mufasa_rec.training import saver
from mufasa_rec.training.checkpoint import find_checkpoint, list_checkpoints
from mufasa_rec.training.checkpoint_manifest import damage, read_manifest
from mufasa_rec.training.preemption import EXIT_CODE, Preempted
from mufasa_rec.training.saver import CheckpointConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config
from torchx_apps.benchmark import main as benchmark
from torchx_apps.benchmarks._attack import Fault, Run, run_to_end
from torchx_apps.benchmarks._same_run import differences, differences_of_checkpoints, rows_that_count
from torchx_apps.local_job import ROOT
from torchx_apps.train import train

STEPS = 120
TIMEOUT_S = 90


def config_of(dataset: str, **checkpoint: object) -> RunConfig:
    """A run with dropout, sampled negatives and a validation every second epoch of eight steps."""
    config = small_config(dataset, softmax="sampled", max_steps=STEPS, validate_every=2, log_every=3)
    extractor = replace(config.model.extractor, dropout=0.2)
    kept = CheckpointConfig(every_steps=5, every_minutes=None)
    return replace(
        config,
        model=replace(config.model, id_dropout=0.3, extractor=extractor),
        checkpoint=replace(kept, **checkpoint),  # type: ignore[arg-type]
    )


def saved_config(folder: Path, config: RunConfig) -> list[str]:
    save_config(config, folder)
    return ["--config", str(folder / "config.yaml")]


FAULTS = [  # every signal once, in every phase, in the order of the run's steps
    Fault(signal="SIGTERM", victim=0, phase="start", step=0, delay_s=0.1),
    Fault(signal="SIGKILL", victim=1, phase="step", step=12, delay_s=0.01),
    Fault(signal="SIGTERM", victim=None, phase="validation", step=20, delay_s=0.0),
    Fault(signal="SIGKILL", victim=None, phase="save", step=50, delay_s=0.0),
    Fault(signal="SIGTERM", victim=1, phase="save", step=70, delay_s=0.0),
    Fault(signal="SIGUSR1", victim=None, phase="step", step=90, delay_s=0.02),
]


@pytest.mark.slow
def test_run_that_is_attacked_by_every_signal_in_every_phase_equals_the_undisturbed_one(
    dataset: str, tmp_path: Path
) -> None:
    arguments = saved_config(tmp_path, config_of(dataset))
    undisturbed, run = Run(tmp_path / "undisturbed", arguments), Run(tmp_path / "attacked", arguments)
    run_to_end(undisturbed)
    for fault in FAULTS:
        attempt = run.start()
        try:
            assert attempt.strike(fault), f"the run was done before {fault}"
            said = attempt.ended()
        finally:
            attempt.end()
        if fault.signal != "SIGKILL" and fault.phase != "start":
            assert attempt.codes == {0: EXIT_CODE, 1: EXIT_CODE}, f"{fault}: {said}"
            assert run.saved_step() == attempt.done_steps, f"{fault}: {said}"
        assert run.saved_step() >= attempt.done_steps - 2 * 5, f"{fault}: {said}"  # that of five steps may be writing
    run_to_end(run)
    assert differences(run.folder, undisturbed.folder) == []
    assert len(rows_that_count(run.folder, ".rank-1")) == STEPS
    check_that_differences_are_found(run.folder, undisturbed.folder)


@pytest.mark.slow
def test_lost_rank_restarts_the_group_from_the_newest_checkpoint_and_the_run_equals_the_undisturbed_one(
    dataset: str, tmp_path: Path
) -> None:
    config = config_of(dataset)
    arguments = saved_config(tmp_path, replace(config, trainer=replace(config.trainer, max_steps=60)))
    undisturbed = Run(tmp_path / "undisturbed", arguments)
    run = Run(tmp_path / "attacked", arguments, max_restarts=1)
    run_to_end(undisturbed)
    attempt = run.start()
    try:
        assert attempt.strike(Fault(signal="SIGKILL", victim=1, phase="step", step=23, delay_s=0.0))
        said = attempt.ended()
    finally:
        attempt.end()
    assert attempt.process.returncode == 0, said
    assert run.attempts == 1
    assert differences(run.folder, undisturbed.folder) == []


def check_that_differences_are_found(run: Path, undisturbed: Path) -> None:
    location = run / "run/checkpoints"
    said = differences_of_checkpoints(*(str(location / name) for name in list_checkpoints(location)[-2:]))
    assert any(one.endswith("t_item.weight") for one in said)
    assert any(one.endswith("exp_avg") for one in said)
    assert any(one.endswith(": data") for one in said)
    for file, what in ((run / "run/metrics.jsonl", "metrics.jsonl"), (run / "journal-0007.rank-0", "rows")):
        file.write_text("")
        assert any(what in one for one in differences(run, undisturbed))


def test_kills_are_counted_from_one() -> None:
    with pytest.raises(SystemExit, match="--kills 0: choose 1 or more"):
        benchmark(["faults", "--kills", "0"])


def test_rows_that_were_lost_and_trained_again_count_once(tmp_path: Path) -> None:
    lines = '{"epoch": 0, "step": %d, "rows": [[%d, 1]]}\n'
    (tmp_path / "journal-0001.rank-0").write_text('{"pid": 1}\n' + lines % (0, 7) + lines % (1, 8) + lines % (2, 9))
    (tmp_path / "journal-0002.rank-0").write_text('{"pid": 2}\n')
    (tmp_path / "journal-0003.rank-0").write_text(lines % (1, 8) + lines % (2, 5) + '{"epoch": 0, "st')
    assert rows_that_count(tmp_path, ".rank-0") == [((0, 0), [[7, 1]]), ((0, 1), [[8, 1]]), ((0, 2), [[5, 1]])]


def train_with_failing_saves(
    env: DistributedEnv, config: RunConfig, folder: Path, scores: list[float], failing: tuple[int, ...], stop: int
) -> str:
    """Train with validations of given scores, on a disk that is full at some steps, and stop after one."""
    left, real = iter(scores), saver.write_checkpoint

    def full(location: Any, manifest: Any, *rest: Any) -> Any:
        if manifest.step in failing:
            raise OSError("the disk is full")
        return real(location, manifest, *rest)

    def watch(batch: Batch) -> None:
        if (batch.epoch, batch.step) == divmod(stop, 8):
            os.kill(os.getpid(), signal.SIGTERM)

    saver.write_checkpoint = full  # type: ignore[assignment]
    Evaluator.metrics = lambda *_: dict.fromkeys(("hr@10", "ndcg@10", "mrr"), next(left))  # type: ignore[method-assign]
    try:
        train(config, folder, env, watch)
    except Preempted as end:
        return f"exit {end.code}"
    return "done"


def test_best_checkpoint_that_cannot_be_written_leaves_the_best_one_before(dataset: str, tmp_path: Path) -> None:
    config = config_of(dataset, keep_last=1)
    config = replace(config, trainer=replace(config.trainer, max_steps=36, validate_every=1))
    scores = [0.1, 0.3, 0.2, 0.15, 0.0]  # after 8, 16, 24, 32 and 36 steps
    assert run_ranks(train_with_failing_saves, 2, config, tmp_path, scores, (16,), -1) == ["done", "done"]
    assert list_checkpoints(tmp_path / "checkpoints") == ["step-00000024", "step-00000036"]
    assert find_checkpoint(tmp_path / "checkpoints", "best").endswith("step-00000024")


def test_run_that_is_asked_to_stop_on_a_full_disk_ends_with_its_code_and_goes_on_later(
    dataset: str, tmp_path: Path
) -> None:
    config = config_of(dataset)
    config = replace(config, trainer=replace(config.trainer, max_steps=12, validate_every=9))
    arguments = (config, tmp_path, [0.1, 0.1])
    ends = run_ranks(train_with_failing_saves, 2, *arguments, tuple(range(6, 12)), 7)
    assert ends == [f"exit {EXIT_CODE}"] * 2
    assert list_checkpoints(tmp_path / "checkpoints") == ["step-00000005"]
    assert run_ranks(train_with_failing_saves, 2, *arguments, (), -1) == ["done", "done"]
    assert read_manifest(find_checkpoint(tmp_path / "checkpoints", "newest")).step == 12


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program of this repository; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **options: IO[str]) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", *arguments]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_run_that_cannot_save_in_time_ends_with_its_code_and_the_checkpoint_before_stands(
    dataset: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    config = config_of(dataset, grace_s=2.0)
    config = replace(config, trainer=replace(config.trainer, max_steps=12, validate_every=9))
    arguments = [*saved_config(tmp_path, config), "--run", str(tmp_path / "run")]
    with (tmp_path / "log").open("w") as log:
        process = start("tests.helpers.stuck", "save", *arguments, stderr=log)
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == EXIT_CODE
    assert "SIGTERM: not saved within 2 s; the last complete checkpoint stands" in (tmp_path / "log").read_text()
    location = tmp_path / "run/checkpoints"
    assert list_checkpoints(location) == ["step-00000005"]
    manifest = read_manifest(find_checkpoint(location, "newest"))
    assert damage(location / manifest.name, manifest, manifest.files) is None
    assert start("torchx_apps.train", *arguments).wait(TIMEOUT_S) == 0
    assert read_manifest(find_checkpoint(location, "newest")).step == 12


def test_rank_whose_peer_hangs_ends_in_time_although_a_collective_holds_it(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    ranks = [start("tests.helpers.stuck", "collective", str(tmp_path / "store"), str(rank), "1") for rank in (0, 1)]
    assert ranks[0].stdout is not None
    assert ranks[0].stdout.readline() == "stuck\n"
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(TIMEOUT_S) == EXIT_CODE
    assert ranks[1].poll() is None


def test_run_of_one_process_alone_saves_and_ends_with_the_code(
    dataset: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = [*saved_config(tmp_path, config_of(dataset)), "--run", str(tmp_path / "run")]
    log = (tmp_path / "log").open("w+")
    process = start("torchx_apps.train", *arguments, stderr=log)
    while "step      3" not in (tmp_path / "log").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == EXIT_CODE
    log.close()
    assert "asked to stop (SIGTERM): saved at step" in (tmp_path / "log").read_text()
