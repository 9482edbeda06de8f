"""Fusion runs: batches, the number of ranks, interruptions, the generation that is written, new items."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mufasa_rec.data.coding import Vocabulary
from mufasa_rec.data.collaborative import BehaviourConfig, CollaborativeVectors
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.item_lookup import ItemVocabulary
from mufasa_rec.data.item_sampler import ItemSampler, genre_weights
from mufasa_rec.data.items import Categorical
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.modules.fusion import FusionConfig
from mufasa_rec.modules.fusion_losses import CollaborativeConfig
from mufasa_rec.modules.fusion_objective import FusionObjectiveConfig
from mufasa_rec.training import fusion_encode
from mufasa_rec.training.fusion_items import FusionItems, mine_neighbours, titles_of
from mufasa_rec.training.fusion_trainer_config import FusionTrainerConfig
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.preemption import EXIT_CODE, Preempted
from mufasa_rec.training.saver import CheckpointConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import fuse as program
from torchx_apps.fuse_assembly import genres_of, open_dataset
from torchx_apps.fuse_config import FuseConfig, load_config, save_config

STEPS = 8


@pytest.fixture
def own(dataset: str, tmp_path: Path) -> str:
    """A data set that may be written to."""
    shutil.copytree(dataset, tmp_path / "dataset")
    return str(tmp_path / "dataset")


def config_of(dataset: str, **changes: Any) -> FuseConfig:
    config = FuseConfig(
        dataset=dataset,
        layer=FusionConfig(width=8, num_heads=2, modality_dropout=0.2, dropout=0.1),
        behaviour=BehaviourConfig(width=6),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        trainer=FusionTrainerConfig(batch_size=32, epochs=99, max_steps=STEPS, log_every=3, holdout=0.15),
        checkpoint=CheckpointConfig(keep_last=50, every_minutes=None),
        report=False,
    )
    return replace(config, **changes)


def still(config: FuseConfig) -> FuseConfig:
    """Without random draws in the layer, which differ by rank."""
    return replace(config, layer=replace(config.layer, modality_dropout=0.0, dropout=0.0))


def attempt(env: DistributedEnv, config: FuseConfig, folder: Path, kill_at: int | None = None) -> str:
    def watch(step: int) -> None:
        if step == kill_at and env.rank == env.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        program.fuse(config, folder, env, watch)
    except Preempted as end:
        return f"exit {end.code}"
    return "done"


def losses_of(folder: Path) -> list[dict[str, Any]]:
    """All metrics but the clock's."""
    lines = metrics_of(folder, "train") + metrics_of(folder, "validation")
    return [{name: value for name, value in line.items() if name != "time_s"} for line in lines]


def test_batch_holds_mined_neighbours_in_half_and_each_item_once() -> None:
    pairs = np.array([[i, i + 100] for i in range(0, 100, 2)])
    sampler = ItemSampler(np.arange(200), np.ones(200), pairs, 40, seed=1)
    for step in range(20):
        batch = sampler.batch(step)
        inside = set(batch.tolist())
        assert len(inside) == len(batch) == 40
        assert sum(a in inside and b in inside for a, b in pairs.tolist()) >= 7  # of 10, less what is drawn twice


def test_genres_are_balanced() -> None:
    values = np.array([1] * 900 + [2] * 100, dtype=np.int32)
    weights = genre_weights(Categorical(values=values, offsets=None, cardinality=2), np.arange(1000))
    sampler = ItemSampler(np.arange(1000), weights, np.zeros((0, 2), np.int64), 50, seed=0)
    rare = np.mean([(sampler.batch(step) >= 900).mean() for step in range(50)])
    assert 0.4 < rare < 0.55  # a random batch holds 0.1


def test_batch_of_more_items_than_there_are_is_all_of_them() -> None:
    sampler = ItemSampler(np.array([3, 5, 9]), np.array([1.0, 1e-12, 1.0]), np.zeros((0, 2), np.int64), 64, seed=0)
    assert (sorted(sampler.batch(7).tolist()), sampler.steps_per_epoch) == ([3, 5, 9], 1)


def test_neighbours_are_those_of_a_loop(dataset: str) -> None:
    config = config_of(dataset)
    data = open_dataset(config)
    items = FusionItems(data.catalog, genres_of(config, data))
    rows, titles = titles_of(items, items.has_content(), "title", 10_000)
    unit = torch.nn.functional.normalize(titles, dim=1)
    content = items.content(rows)
    genres = [set(ids.tolist()) for ids in content.genres.split(content.genre_lengths.tolist())]
    expected = {
        (int(rows[i]), int(rows[j]))
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if unit[i] @ unit[j] > 0.2 and genres[i] and genres[j] and not genres[i] & genres[j]
    }
    assert expected
    assert set(map(tuple, mine_neighbours(items, rows, titles, 0.2).tolist())) == expected


def test_run_writes_a_generation_that_the_data_set_pins_and_new_items_are_appended(own: str, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", config_of(own, report=True)
    run_ranks(attempt, 1, config, folder)
    manifest = DatasetManifest.load(own)
    ref = manifest.content["fused"]
    store = ContentStore.open(own, "fused", ref.generation, checksum=ref.checksum)
    split = manifest.splits["leave_one_out"]
    assert store.manifest.split == {"id": split.id, "hash": split.hash}
    assert (store.manifest.encoder, store.manifest.dtype, store.width) == ("mufasa-fusion", "float16", 8)
    assert (store.rows, store.manifest.normalisation) == (manifest.items.count, "none")
    learned = CollaborativeVectors.load(folder / "collaborative.safetensors")
    assert learned.split == f"{split.id}@{split.hash}"
    report = json.loads((folder / "report.json").read_text())
    assert report["alignment"]["chosen together in training"]["fused"] < report["alignment"]["random items"]["fused"]
    assert {name for name, found in report["movement"].items() if found["mean"] > 0} == {"image", "title"}
    assert report["neighbours"][0]["item"]["genres"]
    assert "Neighbours" in (folder / "report.html").read_text()
    # The same items as new ones under other ids: the layer gives them the same vectors.
    data = open_dataset(config)
    names, items = sorted(data.catalog.stores), FusionItems(data.catalog, genres_of(config, data))
    rows = np.arange(10)
    content, columns = items.content(rows), {"item_id": pa.array(np.arange(10) + 10_000_000)}
    for name in names:
        vectors = [
            v.tolist() if has else None for v, has in zip(content.content[name], content.present[name], strict=True)
        ]
        columns[name] = pa.array(vectors, pa.list_(pa.float32()))
    values = Vocabulary.load(own, "genres").values
    columns["genres"] = pa.array(
        [[values[c - 1] for c in ids.tolist()] for ids in content.genres.split(content.genre_lengths.tolist())]
    )
    pq.write_table(pa.table(columns), tmp_path / "new.parquet")
    before = store.read(0, store.rows).clone()
    program.main(["--run", str(folder), "--items", str(tmp_path / "new.parquet")])
    now = DatasetManifest.load(own).content["fused"]
    after = ContentStore.open(own, "fused", now.generation, checksum=now.checksum)
    assert (now.generation, after.rows) == (ref.generation, store.rows + 10)
    assert torch.equal(after.read(0, store.rows), before)
    known = after.gather(after.rows_of(np.asarray(data.catalog.items.ids)[rows]))
    np.testing.assert_allclose(after.gather(after.rows_of(np.arange(10) + 10_000_000)), known, atol=2e-3)
    with pytest.raises(SystemExit, match="already in the generation"):
        program.main(["--run", str(folder), "--items", str(tmp_path / "new.parquet")])


@pytest.mark.parametrize("kind", ["vectors", "pairs"])
def test_two_ranks_train_as_one(own: str, tmp_path: Path, kind: Any) -> None:
    objective = FusionObjectiveConfig(collaborative=CollaborativeConfig(kind=kind, min_events=2))
    config = still(config_of(own, objective=objective))
    config = replace(config, trainer=replace(config.trainer, log_every=1))
    for ranks in (1, 2):
        run_ranks(attempt, ranks, config, tmp_path / f"run{ranks}")
    one, two = (losses_of(tmp_path / f"run{ranks}") for ranks in (1, 2))
    assert one[0]["collaborative"] > 0
    for a, b in zip(one, two, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    first, second = (weights_of(tmp_path / f"run{ranks}") for ranks in (1, 2))
    for name, value in first.items():
        # The bias of the keys has no gradient but rounding, which AdamW makes steps of: it moves no attention.
        if name.startswith("model.") and not name.endswith("key_value.bias"):
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


def test_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(own: str, tmp_path: Path) -> None:
    config = config_of(own)
    assert run_ranks(attempt, 2, config, tmp_path / "whole") == ["done", "done"]
    broken = tmp_path / "broken"
    assert run_ranks(attempt, 2, config, broken, 4) == [f"exit {EXIT_CODE}"] * 2
    assert run_ranks(attempt, 2, config, broken) == ["done", "done"]
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(broken)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert losses_of(tmp_path / "whole") == losses_of(broken)
    assert len(list((Path(own) / "content" / "fused").iterdir())) == 1  # the same layer's generation is found again


def test_encoding_goes_on_where_it_stopped(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_encode, "_BLOCK", 16)
    calls: list[int] = []
    real = fusion_encode.encode

    def failing(layer: Any, contents: Any, rows: np.ndarray, chunk: int) -> np.ndarray:
        calls.append(len(rows))
        if len(calls) == 4:
            raise OSError("the disk is gone")
        return real(layer, contents, rows, chunk)

    monkeypatch.setattr(fusion_encode, "encode", failing)
    arguments = ["--run", str(tmp_path / "run")]
    save_config(config_of(own), tmp_path)
    with pytest.raises(SystemExit, match="the disk is gone"):
        program.main([*arguments, "--config", str(tmp_path / "config.yaml")])
    assert "fused" not in DatasetManifest.load(own).content
    program.main(arguments)
    assert sum(calls) == DatasetManifest.load(own).items.count + 16  # only the block that failed was begun twice
    assert not list((tmp_path / "run").glob("fused-*"))


def encode_slowly(env: DistributedEnv, config: FuseConfig, folder: Path, kill_in: int | None = None) -> tuple[str, int]:
    """A run with blocks of 16 items, ended in its block `kill_in` on the last rank; and how many items it encoded."""
    done, real = [0], fusion_encode.encode

    def counting(layer: Any, contents: Any, rows: np.ndarray, chunk: int) -> np.ndarray:
        if len(rows) <= 16:
            done.append(len(rows))
            if len(done) - 1 == kill_in and env.rank == env.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(layer, contents, rows, chunk)

    fusion_encode._BLOCK, fusion_encode.encode = 16, counting
    try:
        return attempt(env, config, folder), sum(done)
    finally:
        fusion_encode.encode = real


def test_encoding_that_is_asked_to_stop_ends_with_the_code_and_goes_on(own: str, tmp_path: Path) -> None:
    config, folder = config_of(own), tmp_path / "run"
    first = run_ranks(encode_slowly, 2, config, folder, 2)
    assert [said for said, _ in first] == [f"exit {EXIT_CODE}"] * 2
    assert "fused" not in DatasetManifest.load(own).content
    assert not (folder / "summary.json").exists()
    second = run_ranks(encode_slowly, 2, config, folder)
    assert [said for said, _ in second] == ["done", "done"]
    assert first[1][1] == 32  # the block in which it was asked is finished, and no other is begun
    assert sum(number for _, number in [*first, *second]) == DatasetManifest.load(own).items.count
    assert "fused" in DatasetManifest.load(own).content


def test_run_with_other_settings_is_refused(own: str, tmp_path: Path) -> None:
    config = config_of(own)
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    with pytest.raises(SystemExit, match=r"seed is 0 there and 1 now"):
        program.main(["--run", str(tmp_path / "run"), "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "{}"], "--run: missing"),
        (["--run", "{}/r"], "dataset: missing"),
        (["--run", "{}/r", "--dataset", "{}", "--genre", "mood"], "genre='mood': items have the categoricals"),
        (
            ["--run", "{}/r", "--dataset", "{}", "--layer.anchor", "name"],
            "layer.anchor='name': not among the modalities",
        ),
        (["--run", "{}/r", "--items", "x.parquet"], "holds no trained run"),
        (["--run", "{}/r", "--preset", "tiny"], "preset='tiny': unknown; choose one of default, demo, short"),
    ],
)
def test_mistakes_are_named_before_anything_is_learned(own: str, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="(?s)" + message.replace("[", r"\[")):
        program.main([argument.format(own) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 3), ("epochs", 0), ("max_steps", 0), ("patience", -1), ("holdout", 1.0), ("max_mined", 0)],
)
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"trainer.{name}={value}: choose"):
        FusionTrainerConfig(**{name: value})


def test_id_table_of_a_retriever_is_a_source_of_vectors_unless_of_another_split(own: str, tmp_path: Path) -> None:
    small = small_config(own, max_steps=2, validate_every=1)
    run_ranks(train_in, 1, small, tmp_path / "retriever")
    config = config_of(own, behaviour=BehaviourConfig(source=str(tmp_path / "retriever")))
    run_ranks(attempt, 2, config, tmp_path / "run")
    learned = CollaborativeVectors.load(tmp_path / "run" / "collaborative.safetensors")
    vocabulary = ItemVocabulary.load(tmp_path / "retriever")
    assert learned.ids.tolist() == vocabulary.ids.tolist()
    (table,) = [v for name, v in weights_of(tmp_path / "retriever", "best").items() if name.endswith("t_item.weight")]
    assert torch.equal(torch.from_numpy(learned.vectors), table[1:])
    other = replace(config, split="time")
    with pytest.raises(AssertionError, match=r"learned on split leave_one_out@.* but this run uses time@"):
        run_ranks(attempt, 1, other, tmp_path / "other")


def test_training_stops_when_held_out_items_no_longer_gain(own: str, tmp_path: Path) -> None:
    config = config_of(own)
    config = replace(
        config,
        optimizer=replace(config.optimizer, learning_rate=1e-12),
        trainer=replace(config.trainer, max_steps=None, epochs=50, patience=2),
    )
    run_ranks(attempt, 1, config, tmp_path / "run")
    lines = metrics_of(tmp_path / "run", "validation")
    best = min(lines, key=lambda line: line["loss"])
    assert len(lines) < 50
    assert lines[-1]["epoch"] - best["epoch"] == 2


def test_vectors_of_a_file_are_used_when_they_say_the_split_of_this_run(own: str, tmp_path: Path) -> None:
    ids = np.asarray(open_dataset(config_of(own)).catalog.items.ids)[::2]
    file, split = tmp_path / "given.npz", DatasetManifest.load(own).splits["leave_one_out"]
    np.savez(file, item_id=ids, vector=np.random.default_rng(0).standard_normal((len(ids), 3), dtype=np.float32))
    config = config_of(own, behaviour=BehaviourConfig(source=str(file), split="time@0"))
    save_config(config, tmp_path)
    arguments = ["--run", str(tmp_path / "run"), "--config", str(tmp_path / "config.yaml"), "--behaviour.split"]
    with pytest.raises(SystemExit, match="learned on split time@0, but this run uses leave_one_out@"):
        program.main([*arguments, "time@0"])
    program.main([*arguments, f"{split.id}@{split.hash}"])
    learned = CollaborativeVectors.load(tmp_path / "run" / "collaborative.safetensors")
    assert (learned.ids.tolist(), learned.vectors.shape) == (ids.tolist(), (len(ids), 3))
