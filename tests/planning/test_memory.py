"""The memory that is planned beside the memory that ranks really take."""

from __future__ import annotations

import ctypes
import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.config import RunConfig
from mufasa_rec.data.item_lookup import ItemVocabulary
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig, TableOptimizerConfig, TablesConfig
from mufasa_rec.planning.topology import Topology
from mufasa_rec.training.optim import OptimizerConfig, TrainOptimizer
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config
from torchx_apps import assembly
from torchx_apps.plan_run import plan_run

ROWS, WIDTH = 600_000, 64


def resident_bytes() -> int:
    """Memory of this process, without what its allocator only keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def open_grown(config: RunConfig, num_rows: int) -> assembly.OpenDataset:
    """The data set with at least `num_rows` rows in the items' table: ids that no event has are added."""
    known = assembly.open_dataset(config).catalog.vocabulary
    unused = int(known.ids.max()) + 1 + np.arange(max(num_rows - known.size, 0), dtype=np.int64)
    return assembly.open_dataset(
        config, ItemVocabulary(np.concatenate([known.ids, unused]), known.split, known.min_count)
    )


def train_some(env: DistributedEnv, config: RunConfig, data: assembly.OpenDataset) -> tuple[object, ...]:
    """Train three steps; returns what a run holds."""
    loader = assembly.make_loader(config, data, "train", env)
    retriever = assembly.build_retriever(config, data, RankExchange())
    model = assembly.shard_retriever(config, data, retriever, env.device)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, 10)  # type: ignore[arg-type]
    pipeline = TrainPipelineSparseDist(model=model, optimizer=optimizer, device=env.device, execute_all_batches=True)  # type: ignore[arg-type]
    batches = loader.batches(0)
    for _ in range(3):
        pipeline.progress(batches)
    return model, optimizer, pipeline, batches


def growth(env: DistributedEnv, config: RunConfig) -> int:
    """Memory that a large run takes in a process that has trained a small one before."""
    kept = [train_some(env, config, open_grown(config, 0))]
    data = open_grown(config, ROWS)
    before = resident_bytes()
    kept.append(train_some(env, config, data))
    return resident_bytes() - before


@pytest.mark.parametrize(("optimizer", "dtype"), [("adagrad", "fp32"), ("row_wise_adagrad", "fp16")])
def test_planned_bytes_are_those_that_two_ranks_take(dataset: str, optimizer: Any, dtype: Any) -> None:
    base = small_config(dataset)
    config = replace(
        base,
        model=replace(base.model, width=WIDTH),
        tables=TablesConfig(weight_dtype=dtype),
        optimizer=OptimizerConfig(tables=TableOptimizerConfig(name=optimizer)),
        sharding=ShardingConfig(types=("row_wise",)),
    )
    report = plan_run(config, DatasetManifest.load(dataset), Topology.parse("2xCPU"), item_rows=ROWS)
    measured = run_ranks(growth, 2, config)
    for rank, found in zip(report.ranks, measured):
        assert found == pytest.approx(rank.ddr_bytes, rel=0.1)
