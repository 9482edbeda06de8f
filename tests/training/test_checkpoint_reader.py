"""Checkpoints are read without trust in their metadata, and tables by the rows that are wanted."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig
from mufasa_rec.training.checkpoint import model_state
from mufasa_rec.training.checkpoint_reader import open_reader, read_metadata
from mufasa_rec.training.checkpoint_tensors import CheckpointTensors, read_rows
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config
from torchx_apps import assembly

ITEM = "model.sparse.ids.embeddings.t_item.weight"


def save(env: DistributedEnv, config: RunConfig, folder: str) -> None:
    data = assembly.open_dataset(config)
    retriever = assembly.build_retriever(config, data, RankExchange())
    model = assembly.shard_retriever(config, data, retriever, env.device)
    dcp.save({"model": model_state(model, assembly.content_tables(data))}, checkpoint_id=folder)


@pytest.fixture(scope="module", params=["row_wise", "table_wise"])
def saved(request: pytest.FixtureRequest, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that two ranks saved."""
    config = replace(small_config(dataset), sharding=ShardingConfig(types=(request.param,)))
    folder = tmp_path_factory.mktemp("saved") / request.param
    run_ranks(save, 2, config, str(folder))
    return folder


def whole(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as torch loads it."""
    metadata = read_metadata(f"{folder}/.metadata")
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
    }
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, storage_reader=open_reader(folder))
    return state


def test_rows_are_read_as_torch_loads_them(saved: Path) -> None:
    tensors, expected = CheckpointTensors(saved), whole(saved)
    assert tensors.names("model.") == sorted(expected)
    for name, value in expected.items():
        if ".embeddings." in name:
            rows = np.flatnonzero(np.arange(len(value)) % 3 != 1)
            reader = tensors.rows(name)
            assert torch.equal(reader.read(rows), value[rows]), name
            assert reader.bytes_read == len(rows) * value.shape[1] * 4
        else:
            assert torch.equal(tensors.tensor(name), value), name
            assert tensors.shape(name) == tuple(value.shape)


def test_shards_without_a_wanted_row_are_not_touched(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    tensors = CheckpointTensors(copy)
    reader = tensors.rows(ITEM)
    files = sorted({block.file for block in reader.blocks})
    if saved.name == "table_wise":
        assert len(files) == 1
        return
    assert len(files) == 2
    os.unlink(reader.blocks[1].file)
    assert torch.equal(reader.read(np.arange(45)), whole(saved)[ITEM][:45])
    with pytest.raises(ValueError, match=r"__1_0\.distcp: no such file"):
        reader.read(np.array([1, 46]))


def test_checkpoint_in_an_object_store_is_read_alike(saved: Path) -> None:
    store = fsspec.filesystem("memory")
    url = f"memory://reader-{saved.name}"
    for file in saved.iterdir():
        store.pipe_file(f"/reader-{saved.name}/{file.name}", file.read_bytes())
    expected, found = whole(saved), whole(url)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = np.array([0, 7, 50, 51])
    assert torch.equal(read_rows(url, ITEM, rows), expected[ITEM][rows])


@pytest.mark.parametrize("rows", [[-1, 2], [3, 2], [0, 1 << 40]])
def test_rows_that_are_not_there_are_refused(saved: Path, rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"t_item\.weight: rows .* asked for; give ascending rows of 0 to \d+"):
        read_rows(saved, ITEM, np.array(rows))


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def hidden(value: Any) -> Metadata:
    """Good metadata with something in one of its corners."""
    return Metadata(state_dict_metadata={}, planner_data={"deep": [{"er": (value,)}]}, storage_data={})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_metadata_runs_nothing(tmp_path: Path, nested: bool) -> None:
    file, mark = tmp_path / ".metadata", tmp_path / "was here"
    hostile = Hostile(mark)
    file.write_bytes(pickle.dumps(hidden(hostile) if nested else hostile))
    for read in (lambda: read_metadata(file), lambda: open_reader(tmp_path).read_metadata()):
        with pytest.raises(ValueError, match=r"\.metadata: asks for (posix|nt)\.system.*nothing of it was run"):
            read()
    with pytest.raises((ValueError, dcp.api.CheckpointException)):
        dcp.load({"x": torch.zeros(1)}, storage_reader=open_reader(tmp_path), no_dist=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'true'\ntR.",
        b"ccollections\nOrderedDict\n)R.",
        b"cno_such_module\nThing\n)R.",
    ],
)
def test_class_that_no_checkpoint_of_tensors_holds_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(ValueError, match=rf"asks for {text.split(chr(10).encode())[0][1:].decode()}\."):
        read_metadata(tmp_path / ".metadata")


def test_entry_of_bytes_is_refused(tmp_path: Path) -> None:
    metadata = Metadata(state_dict_metadata={"state.x": BytesStorageMetadata()}, storage_data={})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"entry 'state\.x' is no tensor but bytes"):
        open_reader(tmp_path).read_metadata()


@pytest.mark.parametrize("name", ["../other/file", "/etc/passwd", "", ".metadata"])
def test_file_outside_of_the_folder_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    metadata = dcp.FileSystemReader(saved).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = name
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not at one of its folder"):
        CheckpointTensors(tmp_path)


@pytest.mark.parametrize("text", [b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(hidden(1))[:-20]])
def test_damaged_metadata_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(ValueError, match=r"\.metadata: (not the metadata of|holds dict, not) a checkpoint"):
        read_metadata(tmp_path / ".metadata")


def test_hostile_tensor_file_runs_nothing(saved: Path, tmp_path: Path) -> None:
    copy, mark = tmp_path / "copy", tmp_path / "was here"
    shutil.copytree(saved, copy)
    metadata = read_metadata(copy / ".metadata")
    hostile = tmp_path / "hostile"
    torch.save(Hostile(mark), hostile)
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = "hostile", 0, hostile.stat().st_size
    shutil.copy(hostile, copy / "hostile")
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"hostile: holds no readable tensor for model\.sparse"):
        read_rows(copy, ITEM, np.array([0]))
    assert not mark.exists()
