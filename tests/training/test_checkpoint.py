"""Checkpoints load bit-equal on any ranks and plan; a failed one harms nothing, a damaged one is set aside."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig
from mufasa_rec.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_model,
    load_tensors,
    model_state,
    newest_intact,
)
from mufasa_rec.training.checkpoint_manifest import MANIFEST, DamagedCheckpointError, Manifest, read_manifest
from mufasa_rec.training.checkpoint_writer import write_checkpoint
from mufasa_rec.training.saver import CheckpointConfig
from tests.helpers import object_store
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import assembly

Pieces = dict[str, list[tuple[list[int], torch.Tensor]]]


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two ranks and ten steps, saved at 4, 8 and 10."""
    config = replace(small_config(dataset, max_steps=10), checkpoint=CheckpointConfig(every_steps=4, keep_last=3))
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train_in, 2, config, folder)
    return config, folder


def loaded(env: DistributedEnv, config: RunConfig, folder: Path) -> tuple[Pieces, dict[str, float]]:
    """Load a checkpoint; returns this rank's pieces of every tensor and the validation metrics."""
    exchange = RankExchange()
    data = assembly.open_dataset(config, assembly.load_vocabulary(str(folder)))
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), env.device)
    frozen = assembly.content_tables(data)
    load_model(find_checkpoint(folder / "checkpoints"), model, frozen)
    pieces: Pieces = {}
    for name, value in model_state(model, frozen).items():
        if isinstance(value, ShardedTensor):
            pieces[name] = [(s.metadata.shard_offsets, s.tensor.clone()) for s in value.local_shards()]
        else:
            pieces[name] = [([0] * value.ndim, value.detach().clone())]
    model.eval()
    evaluator = assembly.make_evaluator(config, data, "validation", env, exchange)
    return pieces, evaluator.metrics(assembly.make_scorer(config, data, model, env, exchange))


@pytest.mark.parametrize(
    ("world", "sharding"), [(1, "row_wise"), (2, "table_wise"), (3, "row_wise"), (2, "column_wise")]
)
def test_checkpoint_of_two_ranks_loads_bit_equal(trained: tuple[RunConfig, Path], world: int, sharding: Any) -> None:
    config, folder = trained
    config = replace(config, sharding=ShardingConfig(types=(sharding,), min_columns=8))
    saved = {name.removeprefix("model."): w for name, w in weights_of(folder).items() if name.startswith("model.")}
    results = run_ranks(loaded, world, config, folder)
    assert not [name for name in saved if "content.width" in name]
    for pieces, metrics in results:
        assert pieces.keys() == saved.keys()
        for name, parts in pieces.items():
            for offsets, tensor in parts:
                place = tuple(slice(o, o + size) for o, size in zip(offsets, tensor.shape, strict=True))
                assert torch.equal(saved[name][place], tensor), name
        (line,) = metrics_of(folder, "validation")
        assert metrics == pytest.approx({name: line[name] for name in metrics}, abs=1e-6)
    held = sum(tensor.numel() for pieces, _ in results for _, tensor in pieces["sparse.ids.embeddings.t_item.weight"])
    assert held == saved["sparse.ids.embeddings.t_item.weight"].numel()


def test_manifest_says_what_the_checkpoint_is_of(trained: tuple[RunConfig, Path]) -> None:
    config, folder = trained
    assert list_checkpoints(folder / "checkpoints") == ["step-00000004", "step-00000008", "step-00000010"]
    manifest = read_manifest(folder / "checkpoints/step-00000008")
    assert (manifest.step, manifest.world_size) == (8, 2)
    assert manifest.about["dataset"]["split"].startswith("leave_one_out@")
    assert manifest.about["config"]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert any("t_item: row_wise, fused, ranks 0-1" in line for line in manifest.about["plan"])
    assert manifest.about["versions"].keys() >= {"python", "torch", "torchrec"}
    assert manifest.state["progress"]["step"] == 0  # eight steps are an epoch
    assert len(manifest.state["data"]["readers"]) == 8
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert read_manifest(find_checkpoint(folder / "checkpoints")).state["progress"]["best"]["step"] == 10


def test_checkpoint_that_is_not_there_is_named_with_those_that_are(trained: tuple[RunConfig, Path]) -> None:
    location = trained[1] / "checkpoints"
    assert find_checkpoint(location, "8").endswith("step-00000008")
    with pytest.raises(ValueError, match=r"no checkpoint '9'; there are step-00000004, step-00000008, step-00000010"):
        find_checkpoint(location, "9")
    with pytest.raises(ValueError, match="holds no checkpoint; train the run until it has saved one"):
        find_checkpoint(location / "nothing")


def test_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 9}))
    with pytest.raises(ValueError, match=r"format_version=9, this version reads 2") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)


def manifest_of(step: int) -> Manifest:
    return Manifest(name=f"step-{step:08d}", step=step, state={"progress": {"best": {}}}, about={})


def flip(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-7])


def change_manifest(folder: Path) -> None:
    file = folder / MANIFEST
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (flip, r"__1_0\.distcp does not have the checksum"),
    "length": (cut, r"__0_0\.distcp has [\d,]+ bytes, [\d,]+ were written"),
    "file": (lambda folder: (folder / "__1_0.distcp").unlink(), r"__1_0\.distcp cannot be read"),
    "metadata": (lambda folder: (folder / ".metadata").write_bytes(b"x"), r"\.metadata has 1 bytes"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"checkpoint\.json: missing"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"format_'), "damaged, it is no manifest"),
    "manifest": (change_manifest, "does not have the checksum that it states"),
}


def recover(env: DistributedEnv, location: str, damaged: str, times: int) -> tuple[int | None, float, str]:
    """Save two checkpoints, damage the newest `times`, load the newest whole one; returns step, content, log."""
    said: list[str] = []
    exchange = RankExchange()
    for step in (1, 2):
        own = {f"of rank {env.rank}": torch.arange(100.0)}
        write_checkpoint(location, manifest_of(step), {"x": torch.full((3,), float(step)), **own}, exchange)
    if env.is_main:
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("mufasa_rec.training.checkpoint").addHandler(handler)
        for name in list_checkpoints(location)[-times:]:
            DAMAGES[damaged][0](Path(location.removeprefix("bucket://")) / name)
    exchange.objects(None)
    try:
        manifest = newest_intact(location, exchange)
    except ValueError as error:
        return None, 0.0, str(error)
    assert manifest is not None
    state = {"x": torch.zeros(3)}
    load_tensors(f"{location}/{manifest.name}", state)
    return manifest.step, float(state["x"][0]), "; ".join(said)


@pytest.mark.parametrize("damaged", list(DAMAGES))
def test_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(tmp_path: Path, damaged: str) -> None:
    (step, value, said), (other, same, _) = run_ranks(recover, 2, str(tmp_path), damaged, 1)
    assert (step, value) == (other, same) == (1, 1.0)
    (message,) = said.split("; it is set aside, the one before is used")[:-1]
    assert message.startswith("checkpoint step-00000002 is damaged: ")
    assert re.search(DAMAGES[damaged][1], message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]


def test_only_damaged_checkpoints_stop_the_run_instead_of_beginning_it_anew(tmp_path: Path) -> None:
    for step, _, said in run_ranks(recover, 2, str(tmp_path), "bit", 2):
        assert step is None
        assert "all 2 checkpoints are damaged, see above; mend or remove them" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000001", "damaged-step-00000002"]


def test_object_store_keeps_the_rules_too(tmp_path: Path) -> None:
    location = f"{object_store.BucketFileSystem.protocol[0]}://{tmp_path}/store"
    assert run_ranks(recover, 2, location, "bit", 1)[0][:2] == (1, 1.0)
    assert list_checkpoints(location) == ["step-00000001"]
    assert (tmp_path / "store/damaged-step-00000002").is_dir()
    shutil.rmtree(tmp_path / "store")
    assert run_ranks(recover, 2, location, "no manifest", 1)[0][:2] == (1, 1.0)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["step-00000001"]  # half an upload is removed


def written_to_a_full_disk(env: DistributedEnv, folder: Path) -> tuple[str, float]:
    """Save, then save on a disk that is full for rank 1; returns the error and what is there."""
    exchange = RankExchange()
    write_checkpoint(folder, manifest_of(1), {"x": torch.ones(3)}, exchange)
    real = dcp.FileSystemWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if env.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, plan, planner)

    dcp.FileSystemWriter.write_data = full  # type: ignore[method-assign]
    said = ""
    try:
        write_checkpoint(folder, manifest_of(2), {"x": torch.full((3,), 2.0)}, exchange)
    except OSError as error:
        said = str(error)
    state = {"x": torch.zeros(3)}
    load_tensors(find_checkpoint(folder, "newest"), state)
    return said, float(state["x"][0])


def test_full_disk_of_one_rank_is_an_error_on_all_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    for said, value in run_ranks(written_to_a_full_disk, 2, tmp_path):
        assert "rank 1 cannot write the checkpoint" in said
        assert "the disk is full" in said
        assert "nothing that was there before was changed" in said
        assert value == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
