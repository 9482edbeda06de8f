"""Exported tables: written by all ranks each its share, complete or not there, read by rows, damage named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mufasa_rec.data.row_ids import RowIds
from mufasa_rec.data.row_reader import npy_rows
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.training import table_files
from mufasa_rec.training.table_files import TABLES_FILE, ExportedTables, write_tables
from mufasa_rec.training.table_sources import open_source
from tests.helpers.ranks import run_ranks

ITEM_IDS = np.array([-5, 3, 1 << 60, 9, 12, 70], dtype=np.int64)
VALUES = ("tv", "phone", "été")


def matrices(folder: Path) -> dict[str, Path]:
    """Two tables as `.npy` files, one in half precision."""
    rng = np.random.default_rng(0)
    files = {name: folder / f"{name}.npy" for name in ("item", "event.device")}
    np.save(files["item"], rng.normal(size=(7, 5)).astype(np.float32))
    np.save(files["event.device"], rng.normal(size=(4, 3)).astype(np.float16))
    return files


def write(env: DistributedEnv, files: dict[str, Path], output: str, fail_on: int | None = None) -> tuple[dict, str]:
    """Export; returns the bytes that this rank read of each table, and what was refused."""
    tables = {name: npy_rows(file) for name, file in files.items()}
    ids = {"item": RowIds("t_item", ITEM_IDS), "event.device": RowIds.of_values("t_event_device", VALUES)}
    table_files._CHUNK_BYTES = 40  # two rows of `item` at a time
    if env.rank == fail_on:
        block = tables["item"].blocks[0]
        tables["item"].blocks[0] = replace(block, file=str(files["item"].with_name("gone.npy")))
    weights = {"dense.head.weight": torch.arange(6.0).reshape(2, 3), "dense.scale": torch.tensor(2.5)}
    try:
        write_tables(output, {n: (tables[n], ids[n]) for n in tables}, weights, {"step": 3}, RankExchange())
    except (ValueError, OSError) as error:
        return {}, str(error)
    return {name: rows.bytes_read for name, rows in tables.items()}, ""


@pytest.fixture(params=[1, 3])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """An export of one or three ranks."""
    results = run_ranks(write, request.param, matrices(tmp_path), str(tmp_path / "out"))
    read = [bytes_read["item"] for bytes_read, said in results if not said]
    assert sum(read) == 7 * 5 * 4
    assert max(read) <= -(-7 // request.param) * 5 * 4
    return tmp_path / "out", request.param


def test_export_holds_every_row_once_and_what_it_stands_for(exported: tuple[Path, int]) -> None:
    folder, world = exported
    found = ExportedTables(folder)
    assert found.tables() == ["event.device", "item"]
    for name, rows in (("item", [0, 2, 3, 6]), ("event.device", [1, 3])):
        reader, matrix = found.rows(name), np.load(folder.parent / f"{name}.npy")
        assert np.array_equal(reader.read(np.array(rows)).numpy(), matrix[rows])
        assert reader.bytes_read == matrix[rows].nbytes
    item, device = found.ids("item"), found.ids("event.device")
    assert item is not None and item.parameter == "t_item" and np.array_equal(item.ids, ITEM_IDS)
    assert device is not None and device.values == VALUES
    assert found.modules() == {"dense.head.weight": (2, 3), "dense.scale": ()}
    assert torch.equal(found.module("dense.head.weight"), torch.arange(6.0).reshape(2, 3))
    parts = [load_file(file)["embedding"] for file in sorted((folder / "item").iterdir())]
    assert len(parts) == world
    assert np.array_equal(torch.cat(parts).numpy(), np.load(folder.parent / "item.npy"))
    assert not [path for path in folder.parent.iterdir() if path.name.endswith(".tmp")]


def test_export_reaches_an_object_store(tmp_path: Path) -> None:
    url = "memory://exported/here"
    assert run_ranks(write_remote, 1, matrices(tmp_path), url) == [[0, 6]]


def write_remote(env: DistributedEnv, files: dict[str, Path], url: str) -> list[int]:
    _, said = write(env, files, url)
    assert not said, said
    assert fsspec.filesystem("memory").exists(f"/exported/here/{TABLES_FILE}")
    source = open_source(url, RankExchange())
    rows = np.array([0, 6])
    assert np.array_equal(source.rows("item").read(rows).numpy(), np.load(files["item"])[rows])
    assert source.modules()["dense.scale"] == ()
    return rows.tolist()


def test_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for _, said in run_ranks(write, 2, matrices(tmp_path), str(tmp_path / "out")):
        assert said.endswith("out: already exists; choose another folder, or remove that one.")
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_failure_of_one_rank_is_one_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    for _, said in run_ranks(write, 2, matrices(tmp_path), str(tmp_path / "out"), 1):
        assert "gone.npy: no such file" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["event.device.npy", "item.npy"]


def opened(env: DistributedEnv, folder: str) -> str:
    try:
        open_source(folder, RankExchange())
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def test_damage_is_named_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(write, 2, matrices(tmp_path), str(tmp_path / "out"))
    shard = tmp_path / "out" / "item" / "00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for said in run_ranks(opened, 2, str(tmp_path / "out")):
        assert said.endswith("00001-of-00002.safetensors: not as it was written (size or checksum); copy it again, or "
                             "export it again.")  # fmt: skip
    os.unlink(shard)
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors: no such file"):
        ExportedTables(tmp_path / "out").rows("item")


def change(folder: Path, **fields: object) -> Path:
    file = folder / TABLES_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_manifest_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    run_ranks(write, 1, matrices(tmp_path), str(tmp_path / "out"))
    folder = tmp_path / "out"
    good = json.loads((folder / TABLES_FILE).read_text())
    with pytest.raises(ValueError, match="format_version=9, this version reads 1"):
        ExportedTables(change(folder, format_version=9))
    shapes = {**good["tables"], "item": {**good["tables"]["item"], "dim": 6}}
    with pytest.raises(ValueError, match=r"holds 7 rows of 5, tables\.json says 7 of 6; export it again"):
        ExportedTables(change(folder, **{**good, "tables": shapes})).rows("item")
    facts = {"table": "item", "first": 0, "rows": 7, "bytes": 1, "xxh3_128": "0"}
    with pytest.raises(ValueError, match=r"points at the file '\.\./x', not at one of its folder"):
        ExportedTables(change(folder, files={"../x": facts}))
    (folder / TABLES_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"tables\.json: damaged"):
        ExportedTables(folder)
    os.unlink(folder / TABLES_FILE)
    with pytest.raises(ValueError, match=r"holds no complete export \(tables.json is missing\)"):
        ExportedTables(folder)
