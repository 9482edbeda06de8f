"""Sharded tables: the same weights on any number of ranks, content read by its own shard, plans without noise."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import TableOptimizerConfig
from mufasa_rec.training.checkpoint import model_state
from mufasa_rec.training.optim import OptimizerConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config, train_in
from torchx_apps import assembly

Shards = dict[str, tuple[torch.Tensor, int]]


def sharded(env: DistributedEnv, config: RunConfig) -> tuple[assembly.OpenDataset, nn.Module]:
    data = assembly.open_dataset(config)
    retriever = assembly.build_retriever(config, data, RankExchange())
    return data, assembly.shard_retriever(config, data, retriever, env.device)


def shards_of(env: DistributedEnv, config: RunConfig) -> Shards:
    _, model = sharded(env, config)
    return {name: (part.weight.clone(), part.first) for name, (part,) in sharding.local_shards(model).items()}


def whole(parts: list[Shards]) -> dict[str, torch.Tensor]:
    """Put the ranks' shards together."""
    return {
        name: torch.cat([part[name][0] for part in sorted((p for p in parts if name in p), key=lambda p: p[name][1])])
        for name in parts[0]
    }


@pytest.fixture(scope="module")
def by_world(dataset: str) -> dict[int, list[Shards]]:
    return {world: run_ranks(shards_of, world, small_config(dataset)) for world in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
def test_initial_weights_do_not_depend_on_the_number_of_ranks(by_world: dict[int, list[Shards]], world: int) -> None:
    alone, together = whole(by_world[1]), whole(by_world[world])
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        assert torch.equal(weight, together[name]), name
    assert not alone["t_item"][0].any()
    assert alone["t_item"][1:].std() == pytest.approx(0.02, rel=0.15)


def test_seed_changes_the_initial_weights(dataset: str, by_world: dict[int, list[Shards]]) -> None:
    config = small_config(dataset)
    other = run_ranks(shards_of, 1, replace(config, seed=1))
    assert not torch.equal(other[0]["t_item"][0], by_world[1][0]["t_item"][0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_content_tables_hold_their_stores(dataset: str, by_world: dict[int, list[Shards]], world: int) -> None:
    stores = assembly.open_dataset(small_config(dataset)).catalog.stores
    found = whole(by_world[world])
    for name, store in stores.items():
        table = found[f"t_content_{name}"]
        assert table.dtype == torch.float16
        assert torch.equal(table[:, : store.width], store.read(0, store.rows))


def rows_read(env: DistributedEnv, config: RunConfig) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Load a table once more with a reader that writes down what it is asked for."""
    data, model = sharded(env, config)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return data.catalog.stores["title"].read(start, stop)

    sharding.load_rows(model, {"t_content_title": read}, chunk_rows=7)
    ((weight, first, *_),) = sharding.local_shards(model)["t_content_title"]
    return asked, (first, first + len(weight))


def test_content_is_read_by_the_rank_that_holds_it_in_chunks(dataset: str) -> None:
    shards = []
    for asked, (first, last) in run_ranks(rows_read, 2, small_config(dataset)):
        assert [start for start, _ in asked] == list(range(first, last, 7))
        assert [stop for _, stop in asked] == [*range(first + 7, last, 7), last]
        shards.append((first, last))
    assert shards == [(0, 45), (45, 90)]


def what_is_said(env: DistributedEnv, config: RunConfig) -> list[str]:
    """Warnings and log records of planning and sharding."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger().addHandler(Listener(logging.WARNING))
    with warnings.catch_warnings(record=True) as caught:
        _, model = sharded(env, config)
        model_state(model, ())
    return said + [str(warning.message) for warning in caught]


def test_planning_and_sharding_warn_of_nothing(dataset: str) -> None:
    assert run_ranks(what_is_said, 2, small_config(dataset)) == [[], []]


def refused(env: DistributedEnv, config: RunConfig, folder: Path) -> str:
    try:
        train_in(env, config, folder)
    except ValueError as error:
        return str(error)
    return ""


def test_adam_is_refused_on_a_cpu_before_anything_is_written(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset)
    optimizer = OptimizerConfig(tables=TableOptimizerConfig(name="adam"))
    (said,) = run_ranks(refused, 1, replace(config, optimizer=optimizer), tmp_path / "run")
    assert "optimizer.tables.name='adam'" in said
    assert "row_wise_adagrad" in said
    assert not (tmp_path / "run").exists()
