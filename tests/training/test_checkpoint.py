"""Checkpoints load bit-equal on any number of ranks, and a failed one harms nothing."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.training.checkpoint import MANIFEST, load_manifest, load_model, model_state, save_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import assembly

Pieces = dict[str, list[tuple[list[int], torch.Tensor]]]


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two ranks and ten steps."""
    config = small_config(dataset, max_steps=10)
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train_in, 2, config, folder)
    return config, folder


def loaded(env: DistributedEnv, config: RunConfig, folder: Path) -> tuple[Pieces, dict[str, float]]:
    """Load a checkpoint; returns this rank's pieces of every tensor and the validation metrics."""
    exchange = RankExchange()
    data = assembly.open_dataset(config, assembly.load_vocabulary(str(folder)))
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), env.device)
    frozen = assembly.content_tables(data)
    load_model(folder / "checkpoint", model, frozen)
    pieces: Pieces = {}
    for name, value in model_state(model, frozen).items():
        if isinstance(value, ShardedTensor):
            pieces[name] = [(s.metadata.shard_offsets, s.tensor.clone()) for s in value.local_shards()]
        else:
            pieces[name] = [([0] * value.ndim, value.detach().clone())]
    model.eval()
    evaluator = assembly.make_evaluator(config, data, "validation", env, exchange)
    return pieces, evaluator.metrics(assembly.make_scorer(config, data, model, env, exchange))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_checkpoint_of_two_ranks_loads_bit_equal(trained: tuple[RunConfig, Path], world: int) -> None:
    config, folder = trained
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
    rows = sum(len(tensor) for pieces, _ in results for _, tensor in pieces["sparse.ids.embeddings.t_item.weight"])
    assert rows == len(saved["sparse.ids.embeddings.t_item.weight"])


def test_manifest_says_what_the_checkpoint_is_of(trained: tuple[RunConfig, Path]) -> None:
    _, folder = trained
    manifest = load_manifest(folder / "checkpoint")
    assert manifest["world_size"] == 2
    assert manifest["split"].startswith("leave_one_out@")
    assert manifest["best"]["step"] == 10


def test_folder_without_a_complete_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no complete checkpoint \(checkpoint.json is missing\); train the run"):
        load_manifest(tmp_path / "checkpoint")
    (tmp_path / "checkpoint.old").mkdir()
    (tmp_path / "checkpoint.old" / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"rename checkpoint\.old to checkpoint"):
        load_manifest(tmp_path / "checkpoint")


def test_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 9}))
    with pytest.raises(ValueError, match=r"format_version=9, this version reads 1"):
        load_manifest(tmp_path)


def saved_twice(env: DistributedEnv, folder: Path, fail: bool) -> tuple[str, float]:
    """Save, then save again (on a disk that is full for rank 1 if `fail`); returns the error and what is there."""
    save_checkpoint(folder, {"x": torch.ones(3)}, {"number": 1})
    real = dcp.FileSystemWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if env.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, plan, planner)

    said = ""
    if fail:
        dcp.FileSystemWriter.write_data = full  # type: ignore[method-assign]
    try:
        save_checkpoint(folder, {"x": torch.full((3,), 2.0)}, {"number": 2})
    except OSError as error:
        said = str(error)
    state = {"x": torch.zeros(3)}
    dcp.load(state, checkpoint_id=str(folder))
    assert state["x"][0] == load_manifest(folder)["number"]
    return said, float(state["x"][0])


def test_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    assert run_ranks(saved_twice, 2, tmp_path / "checkpoint", False) == [("", 2.0)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_full_disk_of_one_rank_is_an_error_on_all_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    for said, value in run_ranks(saved_twice, 2, tmp_path / "checkpoint", True):
        assert "the disk is full" in said
        assert "nothing that was there before was changed" in said
        assert value == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
