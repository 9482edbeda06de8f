"""A run starts from another run or an export: rows by their ids, each rank its own; what does not fit is named."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mufasa_rec.config import RunConfig
from mufasa_rec.data.row_ids import RowIds, load_row_ids
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig, local_shards
from mufasa_rec.training.checkpoint import find_checkpoint
from mufasa_rec.training.table_files import ExportedTables, write_tables
from mufasa_rec.training.table_sources import open_source
from mufasa_rec.training.warm_start import warm_start
from mufasa_rec.training.warm_start_plan import WarmStartConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config, train_in, weights_of
from torchx_apps import assembly, tables
from torchx_apps.export import export, main

TABLE = "model.sparse.ids.embeddings.{}.weight"
PARAMETERS = {
    "item": "t_item",
    "item.genres": "t_item_genres",
    "item.kind": "t_item_kind",
    "event.device": "t_event_device",
}


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two ranks and ten steps; items with fewer than twenty training events share a row."""
    config = small_config(dataset, max_steps=10)
    config = replace(config, data=replace(config.data, min_count=20))
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train_in, 2, config, folder)
    if not load_row_ids(folder):
        tables.save_row_ids(tables.row_ids(config, assembly.open_dataset(config)), folder)
    return config, folder


def shards(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    return {name: (part.weight.clone(), part.first) for name, (part,) in local_shards(model).items()}


def start(
    env: DistributedEnv,
    config: RunConfig,
    warm: WarmStartConfig,
    ids: dict[str, RowIds] | None = None,
    split: str | None = None,
) -> dict:
    """Start a model of `config`; returns its weights before and after, what was said, and the bytes read."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mufasa_rec.training.warm_start")
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), env.device)
    found: dict[str, Any] = {"before": shards(model), "error": "", "bytes": {}}
    try:
        found["bytes"] = warm_start(model, warm, {**tables.row_ids(config, data), **(ids or {})}, exchange, split=split)
    except (ValueError, OSError) as error:
        found["error"] = str(error)
    weights = {n: v.clone() for n, v in model.state_dict().items() if not isinstance(v, ShardedTensor)}
    return {**found, "after": shards(model), "modules": weights, "said": said}


def whole(results: list[dict], when: str, table: str) -> torch.Tensor:
    """A table put together from the ranks' shards."""
    parts = [r[when][PARAMETERS[table]] for r in results if PARAMETERS[table] in r[when]]
    return torch.cat([weight for weight, _ in sorted(parts, key=lambda part: part[1])])


def minimum(config: RunConfig, count: int) -> RunConfig:
    return replace(config, data=replace(config.data, min_count=count))


@pytest.mark.parametrize(("world", "kind"), [(1, "row_wise"), (2, "row_wise"), (2, "table_wise")])
def test_same_ids_give_the_same_weights(trained: tuple[RunConfig, Path], world: int, kind: Any) -> None:
    config, folder = trained
    saved = weights_of(folder, "best")
    config = replace(config, sharding=ShardingConfig(types=(kind,)))
    results = run_ranks(start, world, config, WarmStartConfig(source=str(folder)))
    assert [r["error"] for r in results] == [""] * world
    for table, parameter in PARAMETERS.items():
        assert torch.equal(whole(results, "after", table), saved[TABLE.format(parameter)]), table
        assert not torch.equal(whole(results, "before", table), saved[TABLE.format(parameter)]), table
    for result in results:
        for name, weight in result["modules"].items():
            assert torch.equal(weight, saved[f"model.{name}"]), name
    rows = len(whole(results, "after", "item"))
    where = find_checkpoint(folder / "checkpoints", "best")
    assert (
        f"table item: {rows - 1} of {rows - 1} rows taken from {where}, 0 keep their initial weights"
        in (results[0]["said"])
    )
    read = [sum(r["bytes"].values()) for r in results]
    held = [
        sum(weight.nbytes for name, (weight, _) in r["after"].items() if name in PARAMETERS.values()) for r in results
    ]
    assert read == held


@pytest.mark.parametrize("count", [15, 30])
def test_fewer_and_more_items_are_matched_by_their_ids(trained: tuple[RunConfig, Path], count: int) -> None:
    config, folder = trained
    old = assembly.open_dataset(config).catalog.vocabulary
    new = assembly.open_dataset(minimum(config, count)).catalog.vocabulary
    assert new.size > old.size if count == 15 else new.size < old.size
    results = run_ranks(start, 2, minimum(config, count), WarmStartConfig(source=str(folder)))
    assert [r["error"] for r in results] == ["", ""]
    saved = weights_of(folder, "best")[TABLE.format("t_item")]
    expected = whole(results, "before", "item")
    expected[0] = saved[0]
    places = old.keys_of(new.ids)
    expected[1:][places > 0] = saved[places[places > 0]]
    assert torch.equal(whole(results, "after", "item"), expected)
    known = int((places > 0).sum())
    text = f"table item: {known} of {new.size - 1} rows taken from "
    (line,) = [line for line in results[0]["said"] if line.startswith(text)]
    assert line.endswith(f", {new.size - 1 - known} keep their initial weights")
    assert sum(r["bytes"]["item"] for r in results) == (known + 1) * 16 * 4


def test_categoricals_are_matched_by_their_values(trained: tuple[RunConfig, Path]) -> None:
    config, folder = trained
    ids = {"event.device": RowIds.of_values("t_event_device", ("watch", "tv", "phone"))}
    results = run_ranks(start, 2, config, WarmStartConfig(source=str(folder), modules=()), ids)
    saved = weights_of(folder, "best")[TABLE.format("t_event_device")]  # phone, tablet, tv
    before, after = whole(results, "before", "event.device"), whole(results, "after", "event.device")
    assert torch.equal(after, torch.stack([saved[0], before[1], saved[3], saved[1]]))


def unchanged(results: list[dict]) -> bool:
    return all(
        torch.equal(weight, r["after"][name][0]) for r in results for name, (weight, _) in r["before"].items()
    )  # fmt: skip


def test_all_that_does_not_fit_is_named_at_once_and_nothing_changes(trained: tuple[RunConfig, Path]) -> None:
    config, folder = trained
    narrow = replace(config, model=replace(config.model, width=8, num_gap_buckets=0))
    warm = WarmStartConfig(source=str(folder), rename=("item.kind=item.color", "nothing=x"))
    results = run_ranks(start, 2, narrow, warm)
    for result in results:
        said = result["error"].splitlines()
        assert said[0].startswith(f"warm_start: cannot start from {folder}/checkpoints/step-")
        assert "- table item: has dim 16 there, 8 here; train with a width of 16, or leave it out." in said
        assert (
            "- table item.color: not there, it has event.device, item, item.genres, item.kind; name the one to take by "
            "warm_start.rename item.kind=NAME, or leave item.kind out of warm_start.tables."
        ) in said
        assert "- module dense.extractor.norm.weight: has shape (16,) there, (8,) here" in said
        assert "- modules: name them by warm_start.rename, or list in warm_start.modules what is to be taken" in said
        (extra,) = [line for line in said if "dense.extractor.embedding.gap.weight" in line]
        assert "is there with shape" in extra and "but not in this model" in extra
        assert "- rename nothing=x: nothing that is taken is called nothing; write NAME-HERE=NAME-THERE." in said
    assert unchanged(results)
    assert not results[0]["said"]


def refusals(env: DistributedEnv, config: RunConfig, cases: list[tuple[WarmStartConfig, int]]) -> list[str]:
    """What is refused of each case, whose number is added to this model's item ids; the model stays as it was."""
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), env.device)
    before, ids, said = shards(model), tables.row_ids(config, data), []
    for warm, added in cases:
        other = {**ids, "item": RowIds("t_item", ids["item"].ids + added)}
        with pytest.raises(ValueError) as refused:
            warm_start(model, warm, other, exchange)
        said.append(str(refused.value))
    assert all(torch.equal(part.weight, before[name][0]) for name, (part,) in local_shards(model).items())
    return said


def test_names_that_are_nowhere_are_refused(trained: tuple[RunConfig, Path]) -> None:
    config, folder = trained
    size = len(tables.row_ids(config, assembly.open_dataset(config))["item"].ids)
    warm = WarmStartConfig(source=str(folder))
    cases = [
        (
            replace(warm, tables=("goods",)),
            0,
            "table goods: not in this model, which has item, item.genres, item.kind,",
        ),
        (
            replace(warm, modules=("dense.tow",)),
            0,
            "module dense.tow: not in this model; its weights begin with dense.",
        ),
        (
            replace(warm, rename=("dense.tower=dense.x",)),
            0,
            "dense.tower.head.out.bias: dense.x.head.out.bias is not th",
        ),
        (replace(warm, matrices=("goods=x.npy",)), 0, "table goods: not in this model, which has item, item.genres"),
        (replace(warm, checkpoint="7"), 0, "no checkpoint '7'; there are step-"),
        (
            replace(warm, source="nowhere"),
            0,
            "nowhere: no such folder; give a run folder, or one that the export wrote.",
        ),
        (replace(warm, source=str(folder.parent)), 0, "holds no checkpoint"),
        (warm, 1 << 40, f"table item: none of its {size} ids is among the {size} there; was it trained on other items"),
    ]
    for said in run_ranks(refusals, 2, config, [(warm, added) for warm, added, _ in cases]):
        for text, (_, _, message) in zip(said, cases, strict=True):
            assert message in text


def test_damaged_checkpoint_is_refused_before_its_metadata_is_read(
    trained: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob(f"{Path(find_checkpoint(folder / 'checkpoints')).name}/.metadata")
    file.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for result in run_ranks(start, 2, config, WarmStartConfig(source=str(tmp_path / "run"))):
        assert "is damaged" in result["error"] and "asks for" not in result["error"]


def exported(env: DistributedEnv, run: str, output: str, chosen: tuple[str, ...] | None = None) -> None:
    export(run, output, RankExchange(), tables=chosen)


@pytest.mark.parametrize(("writers", "readers", "kind"), [(1, 2, "table_wise"), (2, 1, "row_wise")])
def test_export_gives_back_the_same_tables(
    trained: tuple[RunConfig, Path], tmp_path: Path, writers: int, readers: int, kind: Any
) -> None:
    config, folder = trained
    run_ranks(exported, writers, str(folder), str(tmp_path / "out"))
    saved = weights_of(folder, "best")
    config = replace(config, sharding=ShardingConfig(types=(kind,)))
    results = run_ranks(start, readers, config, WarmStartConfig(source=str(tmp_path / "out")))
    assert [r["error"] for r in results] == [""] * readers
    for table, parameter in PARAMETERS.items():
        assert torch.equal(whole(results, "after", table), saved[TABLE.format(parameter)]), table
    for name, weight in results[-1]["modules"].items():
        assert torch.equal(weight, saved[f"model.{name}"]), name


def rename_table(env: DistributedEnv, run: str, output: str) -> None:
    exchange = RankExchange()
    source = open_source(run, exchange)
    write_tables(output, {"goods": (source.rows("item"), source.ids("item"))}, {}, {}, exchange)


def test_renamed_table_is_named_and_then_found(trained: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, folder = trained
    out = str(tmp_path / "out")
    run_ranks(rename_table, 2, str(folder), out)
    warm = WarmStartConfig(source=out, tables=("item",), modules=())
    for said in run_ranks(refusals, 1, config, [(warm, 0)]):
        assert "table item: not there, it has goods; name the one to take by warm_start.rename item=NAME" in said[0]
    results = run_ranks(start, 2, config, replace(warm, rename=("item=goods",)))
    assert torch.equal(whole(results, "after", "item"), weights_of(folder, "best")[TABLE.format("t_item")])
    assert torch.equal(whole(results, "after", "item.kind"), whole(results, "before", "item.kind"))


def test_export_program_writes_what_is_asked_for(trained: tuple[RunConfig, Path], tmp_path: Path) -> None:
    _, folder = trained
    results = run_ranks(exported, 2, str(folder), str(tmp_path / "some"), ("item.kind", "item"))
    assert results == [None, None]
    found = ExportedTables(tmp_path / "some")
    assert (found.tables(), found.modules()) == (["item", "item.kind"], {})
    for arguments, message in [
        (["--tables", "item,color"], "--tables item,color: no color; there are event.device, item, item.genres"),
        (["--tables", ""], "--tables : no table; there are"),
        (["--checkpoint", "123"], "no checkpoint '123'; there are step-"),
    ]:
        with pytest.raises(SystemExit, match=f"export: .*{message}"):
            main(["--run", str(folder), "--output", str(tmp_path / "out"), *arguments])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rename": ("item",), "source": "x"}, "warm_start.rename='item': write NAME=VALUE"),
        ({"matrices": ("item=a", "item=b")}, "warm_start.matrices='item=a': write NAME=VALUE, each name once"),
        ({"tables": ("item",)}, "warm_start.source: missing"),
    ],
)
def test_configuration_that_cannot_be_meant_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmStartConfig(**options)
    assert not WarmStartConfig().wanted
    assert np.array([WarmStartConfig(source="x").wanted, WarmStartConfig(matrices=("a=b",)).wanted]).all()


def test_source_of_another_split_is_refused_unless_that_is_allowed(trained: tuple[RunConfig, Path]) -> None:
    config, folder = trained
    warm = WarmStartConfig(source=str(folder), tables=("item",), modules=())
    (result,) = run_ranks(start, 1, config, warm, None, "time@another")
    assert "was trained on split leave_one_out@" in result["error"]
    assert "this run is on time@another" in result["error"]
    assert torch.equal(result["before"]["t_item"][0], result["after"]["t_item"][0])
    (result,) = run_ranks(start, 1, config, replace(warm, allow_other_split=True), None, "time@another")
    assert not result["error"]
    assert not torch.equal(result["before"]["t_item"][0], result["after"]["t_item"][0])
