"""A matrix of one's own becomes a sharded table: each rank reads its rows and no others, in bounded memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from mufasa_rec.data.row_ids import RowIds
from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig, TableOptimizerConfig, local_shards
from mufasa_rec.training.warm_start import warm_start
from mufasa_rec.training.warm_start_plan import WarmStartConfig
from tests.helpers.ranks import run_ranks

MIB = 1 << 20
LARGE_ROWS, LARGE_DIM = 100_000, 512


def make_model(env: DistributedEnv, rows: int, dim: int, kind: Any = "row_wise") -> nn.Module:
    config = EmbeddingConfig(name="t_item", feature_names=["item"], num_embeddings=rows, embedding_dim=dim)
    model = nn.Module()
    model.ids = ids = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    sharding.fuse_optimizer(ids, TableOptimizerConfig(name="sgd"))
    plan = sharding.make_plan(model, env.device, ShardingConfig(types=(kind,)))
    sharded = sharding.shard(model, plan, env.device)
    for ((weight, *_),) in local_shards(sharded).values():
        weight.fill_(0.5)
    return sharded


def start(env: DistributedEnv, ids: np.ndarray, dim: int, file: str, kind: Any = "row_wise") -> dict[str, Any]:
    """Import a file; returns this rank's shard, the bytes it read and what was refused."""
    model = make_model(env, len(ids) + 1, dim, kind)
    error, read = "", {"item": 0}
    try:
        read = warm_start(
            model, WarmStartConfig(matrices=(f"item={file}",)), {"item": RowIds("t_item", ids)}, RankExchange()
        )
    except ValueError as refused:
        error = str(refused)
    weight, first = torch.empty(0, dim), 0
    for part in local_shards(model).get("t_item", ()):
        weight, first = part.weight, part.first
    return {"weight": weight.clone(), "first": first, "bytes": read["item"], "error": error}


def peak_mib() -> float:
    """Largest memory of this process since the last reset, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def start_large(env: DistributedEnv, file: str) -> tuple[int, int, float, bool]:
    """Import the large matrix; returns bytes read, bytes of the shard, growth of memory in MiB, and if all is right."""
    model, exchange = make_model(env, LARGE_ROWS, LARGE_DIM), RankExchange()
    ids = {"item": RowIds("t_item", np.arange(1, LARGE_ROWS))}
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    read = warm_start(model, WarmStartConfig(matrices=(f"item={file}",)), ids, exchange)
    growth = peak_mib() - before
    (((weight, first, *_),),) = local_shards(model).values()
    expected = torch.arange(first, first + len(weight), dtype=torch.float32)
    return read["item"], weight.nbytes, growth, bool((weight == expected[:, None]).all())


def test_matrix_larger_than_a_rank_holds_is_read_in_parts(tmp_path: Path) -> None:
    file = tmp_path / "large.npy"
    matrix = np.lib.format.open_memmap(file, "w+", np.float32, (LARGE_ROWS, LARGE_DIM))
    matrix[:] = np.arange(LARGE_ROWS, dtype=np.float32)[:, None]
    matrix.flush()
    results = run_ranks(start_large, 2, str(file))
    assert [read for read, *_ in results] == [size for _, size, *_ in results]
    assert sum(read for read, *_ in results) == matrix.nbytes
    for read, _, growth, right in results:
        assert right
        assert read == matrix.nbytes // 2
        # Chunks of 4 MiB, and a few numbers for each of 100,000 ids; the matrix has 195 MiB, a rank's share 98.
        assert growth < 70, f"{growth} MiB beside the table"


IDS = np.array([11, 13, 17, 19, 23, 29, 31, 37, 41], dtype=np.int64)


def write(folder: Path, suffix: str, ids: np.ndarray, vectors: np.ndarray) -> str:
    """Write ids and vectors in one of the formats."""
    file = folder / f"matrix{suffix}"
    if suffix == ".npy":
        np.save(file, vectors)
        np.save(folder / "matrix.ids.npy", ids)
    elif suffix == ".npz":
        np.savez(file, item_id=ids, embedding=vectors)
    elif suffix == ".parquet":
        pq.write_table(pa.table({"id": ids, "vector": pa.array(list(vectors))}), file, row_group_size=3)
    else:
        save_file({"item_id": torch.from_numpy(ids), "embedding": torch.from_numpy(vectors)}, file)
    return str(file)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".npy", "row_wise"), (".npz", "table_wise"), (".parquet", "row_wise"), (".safetensors", "row_wise")],
)
def test_rows_are_matched_by_id_in_any_order(tmp_path: Path, suffix: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    there = rng.permutation(np.concatenate([IDS[[0, 2, 3, 4, 6, 8]], [5, 12, 99]]))  # some unknown here, some not there
    vectors = rng.normal(size=(9, 8)).astype(np.float32)
    results = run_ranks(start, 2, IDS, 8, write(tmp_path, suffix, there, vectors), kind)
    assert [r["error"] for r in results] == ["", ""]
    expected = torch.full((10, 8), 0.5)
    for row, value in enumerate(IDS.tolist(), start=1):
        if value in there:
            expected[row] = torch.from_numpy(vectors[there == value][0])
    found = torch.cat([r["weight"] for r in sorted(results, key=lambda r: (r["first"], len(r["weight"])))])
    assert torch.equal(found, expected)
    assert sum(r["bytes"] for r in results) == 6 * 8 * 4


def test_half_precision_and_a_name_of_its_own_are_taken(tmp_path: Path) -> None:
    vectors = torch.randn(10, 8).bfloat16()
    save_file({"weights of mine": vectors}, tmp_path / "m.safetensors")
    (result,) = run_ranks(start, 1, IDS, 8, str(tmp_path / "m.safetensors"))
    assert torch.equal(result["weight"], vectors.float())


def refusals(env: DistributedEnv, files: list[str]) -> list[str]:
    """What is refused of each file; the table stays as it was."""
    results = [start(env, IDS, 8, file) for file in files]
    assert all((result["weight"] == 0.5).all() for result in results)
    return [result["error"] for result in results]


def test_matrices_that_do_not_fit_are_named(tmp_path: Path) -> None:
    cases: list[tuple[Any, np.ndarray, str]] = [
        (IDS, np.zeros((9, 4), np.float32), "table item: has dim 4 there, 8 here; train with a width of 4"),
        (None, np.zeros((9, 8), np.float32), "has 9 rows and no ids, the table has 10; give ids, or one row for every"),
        (IDS + 1000, np.zeros((9, 8), np.float32), "none of its 9 ids is among the 9 there"),
        (IDS[:8], np.zeros((9, 8), np.float32), "8 ids but 9 vectors; give exactly one id for each vector"),
        (IDS[[0] * 9], np.zeros((9, 8), np.float32), "8 ids appear twice; give each id once"),
        (IDS, np.zeros((9, 8), np.int64), "holds torch.int64; embeddings are float16"),
        (IDS, np.zeros(9, np.float32), "has shape (9,); give one row per id, [n, dim]"),
        (IDS, np.zeros((8, 9), np.float32).T, "no .npy file of numbers by rows (float32 by columns)"),
        (IDS, np.full((9, 8), np.nan, np.float32), "9 of 9 rows read from"),
        (IDS, np.array([object()]), "no .npy file of numbers by rows"),
    ]
    files = [str(tmp_path / f"{number}.npy") for number in range(len(cases))]
    for file, (ids, vectors, _) in zip(files, cases, strict=True):
        np.save(file, vectors, allow_pickle=True)
        if ids is not None:
            np.save(file.replace(".npy", ".ids.npy"), ids)
    (errors,) = run_ranks(refusals, 1, files)
    for error, (_, _, message) in zip(errors, cases, strict=True):
        assert message in error


def test_file_that_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.ones((10, 8), np.float32))
    data = (tmp_path / "m.npy").read_bytes()
    (tmp_path / "m.npy").write_bytes(data[:-40])
    (errors,) = run_ranks(refusals, 1, [str(tmp_path / "none.npy"), str(tmp_path / "m.npy")])
    assert "table item: " in errors[0] and "none.npy: no such file" in errors[0]
    assert "m.npy: ends in the middle of" in errors[1]
