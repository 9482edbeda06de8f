"""An interrupted run ends as if it had not been: on the same ranks bit for bit, on others with every row seen once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mufasa_rec.config import RunConfig, load_config
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.content_writer import write_content
from mufasa_rec.data.items import ItemStore
from mufasa_rec.data.schema import ContentRef, DatasetManifest
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig
from mufasa_rec.evaluation.retrieval import Evaluator
from mufasa_rec.training import saver as saver_module
from mufasa_rec.training.checkpoint import list_checkpoints
from mufasa_rec.training.checkpoint_manifest import read_manifest
from mufasa_rec.training.preemption import EXIT_CODE, Preempted
from mufasa_rec.training.saver import CheckpointConfig
from tests.helpers import object_store
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, weights_of
from torchx_apps.evaluate import evaluate
from torchx_apps.train import train

STEPS = 20  # two epochs and a half
Rows = list[tuple[int, int, int, int]]  # epoch, step in it, user, end of its history


def config_of(dataset: str, **checkpoint: Any) -> RunConfig:
    """A run with dropout, sampled negatives, and a validation per epoch."""
    config = small_config(dataset, softmax="sampled", max_steps=STEPS, epochs=9, validate_every=1, log_every=3)
    extractor = replace(config.model.extractor, dropout=0.2)
    return replace(
        config,
        model=replace(config.model, id_dropout=0.3, extractor=extractor),
        checkpoint=replace(CheckpointConfig(keep_last=50, every_minutes=None), **checkpoint),
    )


def rows_of(batch: Batch) -> Rows:
    ends = (batch.start_position + torch.diff(batch.offsets)).tolist()
    rows = [(batch.epoch, batch.step, user, end) for user, end in zip(batch.user.tolist(), ends, strict=True)]
    return rows[: batch.num_rows]


def attempt(
    env: DistributedEnv, config: RunConfig, folder: Path, kill_at: int | None = None, where: str = "step"
) -> tuple[str, Rows]:
    """Train until the end, or until the last rank gets SIGTERM; returns how it ended and the rows trained."""
    rows: Rows = []
    steps = 0
    victim = env.rank == min(1, env.world_size - 1)

    def watch(batch: Batch) -> None:
        nonlocal steps
        steps += 1
        rows.extend(rows_of(batch))
        if where == "step" and steps == kill_at and victim:
            os.kill(os.getpid(), signal.SIGTERM)

    if where == "validation" and victim:
        kill_in(Evaluator, "metrics", kill_at, before=True)
    if where == "save" and victim:
        kill_in(saver_module, "write_checkpoint", kill_at, before=True)
    try:
        train(config, folder, env, watch)
    except Preempted as end:
        return f"exit {end.code}", rows
    return "done", rows


def kill_in(owner: Any, name: str, call: int | None, *, before: bool) -> None:
    """Send SIGTERM to this process in the given call of a function."""
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


@pytest.fixture(scope="module")
def undisturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rows]]:
    """The run on two ranks that nobody interrupted, with its rows."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    results = run_ranks(attempt, 2, config_of(dataset), folder)
    assert [end for end, _ in results] == ["done", "done"]
    return folder, [rows for _, rows in results]


def check_equal(run: Path, undisturbed: Path) -> None:
    """Weights, optimizer state, metrics and result are those of the undisturbed run, bit for bit."""
    wanted, found = weights_of(undisturbed), weights_of(run)
    assert found.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(value, found[name])]
    assert any(name.endswith("momentum1") for name in wanted)
    assert any(name.endswith("exp_avg_sq") for name in wanted)
    numbers = {"train": ("step", "epoch", "loss", "grad_norm", "learning_rate"), "validation": ("step", "ndcg@10")}
    for kind, names in numbers.items():
        lines = [[[line[name] for name in names] for line in metrics_of(x, kind)] for x in (run, undisturbed)]
        assert lines[0] == lines[1]
    results = [json.loads((x / "summary.json").read_text()) for x in (run, undisturbed)]
    for result in results:  # a second checkpoint of one step has another name
        del result["seconds"], result["best"]["checkpoint"]
    assert results[0] == results[1]


INTERRUPTIONS = [("step", 2), ("step", 7), ("step", 8), ("step", 13), ("validation", 1), ("validation", 3), ("save", 2)]


@pytest.mark.parametrize(("where", "number"), INTERRUPTIONS)
def test_run_that_was_asked_to_stop_continues_bit_identically(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]], where: str, number: int
) -> None:
    config = config_of(dataset, every_steps=5 if where == "save" else None)
    first = run_ranks(attempt, 2, config, tmp_path, number, where)
    assert [end for end, _ in first] == [f"exit {EXIT_CODE}"] * 2
    second = run_ranks(attempt, 2, config, tmp_path)
    assert [end for end, _ in second] == ["done", "done"]
    for rank, wanted in enumerate(undisturbed[1]):
        assert first[rank][1] + second[rank][1] == wanted
    assert second[0][1] or (where, number) == ("validation", 3)  # the last one: only it is left
    check_equal(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_three_ranks_continue_bit_identically_too(dataset: str, tmp_path: Path) -> None:
    """Sums over three ranks depend on their order, which must not depend on when the process began."""
    config = config_of(dataset)
    run_ranks(attempt, 3, config, tmp_path / "whole")
    run_ranks(attempt, 3, config, tmp_path / "changed", 5)
    run_ranks(attempt, 3, config, tmp_path / "changed")
    check_equal(tmp_path / "changed", tmp_path / "whole")


def test_run_continues_from_any_of_its_checkpoints_bit_identically(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    config = config_of(dataset, every_steps=3)
    run_ranks(attempt, 2, config, tmp_path / "whole")
    names = list_checkpoints(tmp_path / "whole/checkpoints")
    assert {read_manifest(tmp_path / "whole/checkpoints" / name).step for name in names} >= {3, 6, 8, 9, 12, 15, 18, 20}
    for name in (names[1], names[-3], names[-1]):
        run = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        for later in names[names.index(name) + 1 :]:
            shutil.rmtree(run / "checkpoints" / later)
        run_ranks(attempt, 2, config, run)
        check_equal(run, undisturbed[0])


def test_run_that_died_before_its_first_checkpoint_begins_anew(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    run = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    run_ranks(attempt, 2, config_of(dataset), run)
    check_equal(run, undisturbed[0])


def test_checkpoints_in_an_object_store_are_continued_from(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    location = f"{object_store.BucketFileSystem.protocol[0]}://{tmp_path}/store"
    config = config_of(dataset, folder=location, keep_last=1)
    assert run_ranks(attempt, 2, config, tmp_path / "run", 11)[0][0] == f"exit {EXIT_CODE}"
    assert run_ranks(attempt, 2, config, tmp_path / "run")[0][0] == "done"
    names = list_checkpoints(location)
    assert names[-1] == "step-00000020"
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "store")
    check_equal(tmp_path / "run", undisturbed[0])


@pytest.mark.parametrize("worlds", [(2, 1, 2), pytest.param((1, 3, 4), marks=pytest.mark.slow)])
def test_other_ranks_and_plan_see_every_remaining_row_once(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]], worlds: tuple[int, ...]
) -> None:
    config = config_of(dataset)
    plans = (("row_wise",), ("column_wise",), ("table_wise",))
    seen: Rows = []
    for world, types, kill_at in zip(worlds, plans, (6, 7, None), strict=True):
        changed = replace(config, sharding=ShardingConfig(types=types, min_columns=8))  # type: ignore[arg-type]
        for _, rows in run_ranks(attempt, world, changed, tmp_path, kill_at):
            seen.extend(rows)
    wanted = [row for rows in undisturbed[1] for row in rows]
    assert Counter(seen) == Counter(wanted)
    assert max(Counter((epoch, user, end) for epoch, _, user, end in seen).values()) == 1
    manifest = read_manifest(tmp_path / "checkpoints" / list_checkpoints(tmp_path / "checkpoints")[-1])
    assert manifest.world_size == worlds[-1]
    assert any("table_wise" in line for line in manifest.about["plan"])


def test_losses_after_a_change_of_ranks_are_those_of_the_undisturbed_run(dataset: str, tmp_path: Path) -> None:
    """Without dropout, whose draws belong to a rank, the same numbers to float error."""
    config = replace(small_config(dataset, max_steps=16), checkpoint=CheckpointConfig())
    run_ranks(attempt, 2, config, tmp_path / "whole")
    for world, kill_at in ((2, 5), (1, 5), (2, None)):
        run_ranks(attempt, world, config, tmp_path / "changed", kill_at)
    losses = [[line["loss"] for line in metrics_of(tmp_path / run, "train")] for run in ("whole", "changed")]
    assert len(losses[0]) == 16
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_run_that_is_done_is_left_as_it_is(dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]) -> None:
    run = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    ((end, rows), *_) = run_ranks(attempt, 2, config_of(dataset), run)
    assert (end, rows) == ("done", [])
    assert list_checkpoints(run / "checkpoints") == list_checkpoints(undisturbed[0] / "checkpoints")
    check_equal(run, undisturbed[0])


def test_run_that_is_done_goes_on_with_more_steps(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    run = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    config = config_of(dataset)
    longer = replace(config, trainer=replace(config.trainer, max_steps=STEPS + 6))
    results = run_ranks(attempt, 2, longer, run)
    assert {(epoch, step) for _, rows in results for epoch, step, _, _ in rows} == {
        *((2, step) for step in range(4, 8)), (3, 0), (3, 1),
    }  # fmt: skip
    assert load_config(run / "config.yaml").trainer.max_steps == STEPS + 6


def test_other_settings_and_other_data_are_refused_and_nothing_is_changed(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    run = Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    config = config_of(dataset)
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(
        AssertionError, match=r"optimizer\.learning_rate is 0\.003 there and 0\.5 now.*give --run alone"
    ):
        run_ranks(attempt, 1, other, run)
    manifest = next((run / "checkpoints").glob("step-00000020/checkpoint.json"))
    about = read_manifest(manifest.parent)
    changed = replace(about, about={**about.about, "dataset": {**about.about["dataset"], "items": "another"}})
    manifest.write_text(changed.to_json())
    with pytest.raises(AssertionError, match="written on data whose items is another, but the data set"):
        run_ranks(attempt, 1, config, run)
    manifest.write_text(about.to_json())
    run_ranks(attempt, 2, config, run)
    check_equal(run, undisturbed[0])


def test_checkpoint_folder_of_another_run_is_refused(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    config = config_of(dataset, folder=str(undisturbed[0] / "checkpoints"))
    with pytest.raises(AssertionError, match="holds checkpoints of another run; choose a folder of its own"):
        run_ranks(attempt, 1, config, tmp_path / "run")
    assert not (tmp_path / "run/config.yaml").exists()


def test_only_the_last_and_the_best_checkpoints_are_kept(dataset: str, tmp_path: Path) -> None:
    config = replace(
        small_config(dataset, epochs=4, validate_every=1), checkpoint=CheckpointConfig(every_steps=3, keep_last=2)
    )
    run_ranks(attempt, 1, config, tmp_path)
    names = list_checkpoints(tmp_path / "checkpoints")
    best = read_manifest(tmp_path / "checkpoints" / names[-1]).state["progress"]["best"]["checkpoint"]
    assert len({*names[-2:], best}) == len(names)
    assert [read_manifest(tmp_path / "checkpoints" / name).step for name in names[-2:]] == [30, 32]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(names)


def failing_saves(env: DistributedEnv, config: RunConfig, folder: Path) -> list[str]:
    """Train with a disk that is full in the second save; returns what was logged as an error."""
    import logging

    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mufasa_rec").addHandler(handler)
    real: Callable[..., Any] = saver_module.write_checkpoint

    def full(location: str, manifest: Any, *rest: Any) -> Any:
        if manifest.step == 6:
            raise OSError("rank 0 cannot write the checkpoint: the disk is full")
        return real(location, manifest, *rest)

    saver_module.write_checkpoint = full  # type: ignore[assignment]
    train(config, folder, env)
    return said


def test_clock_of_any_rank_saves_all_of_them(
    dataset: str, tmp_path: Path, undisturbed: tuple[Path, list[Rows]]
) -> None:
    config = config_of(dataset, every_minutes=1e-5)
    run_ranks(attempt, 2, config, tmp_path)
    steps = {read_manifest(tmp_path / "checkpoints" / name).step for name in list_checkpoints(tmp_path / "checkpoints")}
    assert steps - {8, 16, 20}  # those are of validations
    check_equal(tmp_path, undisturbed[0])


def test_save_that_fails_is_said_and_training_goes_on(dataset: str, tmp_path: Path) -> None:
    config = replace(small_config(dataset, max_steps=12), checkpoint=CheckpointConfig(every_steps=3, keep_last=9))
    (said,) = run_ranks(failing_saves, 1, config, tmp_path)
    assert said == ["checkpoint of step 6 was not saved: rank 0 cannot write the checkpoint: the disk is full"]
    steps = [read_manifest(tmp_path / "checkpoints" / name).step for name in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == [3, 9, 12]


def hold_and_train(env: DistributedEnv, config: RunConfig, folder: Path, leave_after_s: float) -> str:
    """Have another process hold the run folder for a while, and train in it."""
    code = f"""
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep({leave_after_s})
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    try:
        train(config, folder, env)
    except ValueError as error:
        return str(error)
    finally:
        other.kill()
        other.wait()
    return "done"


@pytest.mark.parametrize(("leave_after_s", "end"), [(60, "is in use by another process; end that job"), (1, "done")])
def test_run_folder_of_a_job_that_still_runs_is_not_touched(
    dataset: str, tmp_path: Path, leave_after_s: float, end: str
) -> None:
    config = replace(small_config(dataset, max_steps=2), checkpoint=CheckpointConfig(grace_s=0.1))
    folder = tmp_path / "run"
    folder.mkdir()
    (said,) = run_ranks(hold_and_train, 1, config, folder, leave_after_s)
    assert end in said
    assert (folder / "config.yaml").exists() == (said == "done")


def test_modality_that_joins_the_data_set_later_leaves_a_run_as_it_is(dataset: str, tmp_path: Path) -> None:
    folder = str(shutil.copytree(dataset, tmp_path / "dataset"))
    config = replace(small_config(folder, max_steps=9), checkpoint=CheckpointConfig(keep_last=9))
    run_ranks(attempt, 1, config, tmp_path / "run", 4)
    assert load_config(tmp_path / "run/config.yaml").data.modalities == ("image", "title")
    manifest = DatasetManifest.load(folder)
    ids = np.asarray(ItemStore.open(folder, manifest.items.generation).ids)
    vectors = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32)
    written = write_content(folder, "later", ids, vectors, encoder="x", encoder_version="1")
    ref = ContentRef(generation=written.generation, width=8, dtype="float16", rows=len(ids), checksum=written.checksum)
    replace(manifest, content={**manifest.content, "later": ref}).save(folder)
    assert run_ranks(attempt, 1, config, tmp_path / "run")[0][0] == "done"
    run_ranks(evaluate_run, 1, tmp_path / "run", tmp_path / "evaluated")
    assert (tmp_path / "evaluated/summary.json").exists()


def evaluate_run(env: DistributedEnv, run: Path, output: Path) -> None:
    evaluate({"model": str(run)}, output, "validation", env)
