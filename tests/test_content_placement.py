"""Where content lies: the same run wherever it is, each byte of a store read once, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mufasa_rec.config import RunConfig, load_config, refuse_changes
from mufasa_rec.data.content_segment import MappedSegment
from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.content_config import ContentConfig, ContentSettings
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import ShardingConfig, TablesConfig
from mufasa_rec.modules.content_codes import pack, unpack
from mufasa_rec.planning.start_table import start_table
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of
from torchx_apps import assembly

SHARDED, HOST, INT8 = ContentConfig(), ContentConfig(placement="host"), ContentConfig(precision="int8")
MIXED = ContentConfig(each={"title": ContentSettings(precision="int8"), "image": ContentSettings(placement="host")})


def train_all(env: DistributedEnv, runs: dict[Path, RunConfig]) -> None:
    for folder, config in runs.items():
        train_in(env, config, folder)


@pytest.fixture(scope="module")
def runs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on two ranks under every placement; each ends with a validation on the whole catalog."""
    folder = tmp_path_factory.mktemp("placements")
    config = small_config(dataset, softmax="sampled", max_steps=4)
    placements = {"sharded": SHARDED, "host": HOST, "int8": INT8, "mixed": MIXED}
    found = {folder / name: replace(config, content=content) for name, content in placements.items()}
    run_ranks(train_all, 2, found, timeout_s=180)
    return {folder.name: folder for folder in found}


def test_vectors_that_travel_with_the_batch_train_the_same_weights_bit_for_bit(runs: dict[str, Path]) -> None:
    sharded, host = weights_of(runs["sharded"]), weights_of(runs["host"])
    assert sharded.keys() == host.keys()
    for name, value in sharded.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(host[name])), name


def test_evaluation_on_the_whole_catalog_is_the_same_too(runs: dict[str, Path]) -> None:
    figures = ("hr@10", "ndcg@10", "mrr")
    one, other = (metrics_of(runs[name], "validation")[-1] for name in ("sharded", "host"))
    assert [one[name] for name in figures] == [other[name] for name in figures]
    assert one["mrr"] > 0


def test_codes_change_the_run_a_little(runs: dict[str, Path]) -> None:
    sharded = metrics_of(runs["sharded"], "train")
    for name in ("int8", "mixed"):
        losses = [line["loss"] for line in metrics_of(runs[name], "train")]
        assert losses != [line["loss"] for line in sharded]
        assert losses == pytest.approx([line["loss"] for line in sharded], rel=2e-3)


def test_no_checkpoint_holds_content(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        names = weights_of(folder)
        assert any("t_item" in name for name in names)
        assert not any("t_content" in name for name in names), folder.name


def test_lines_say_how_many_items_are_looked_up_once(runs: dict[str, Path]) -> None:
    for line in metrics_of(runs["sharded"], "train"):
        assert line["dedup_ratio"] > 1.5
        assert line["history_ratio"] == 1.0


def looked_up(env: DistributedEnv, config: RunConfig) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Items of a few batches of this rank, and their content as the model sees it."""
    data = assembly.open_dataset(config)
    retriever = assembly.build_retriever(config, data, RankExchange())
    model: Any = assembly.shard_retriever(config, data, retriever, env.device).module
    found = []
    with torch.no_grad():
        for batch in assembly.make_loader(config, data, "train", env).batches(0, num_steps=3):
            values = model.merge(model.sparse(batch.features), batch.content)
            ids = np.asarray(data.catalog.items.ids)[batch.item_row.numpy()]
            widths = {name: store.width for name, store in data.catalog.stores.items()}
            content = {name: values[f"content.{name}"][:, :width].numpy() for name, width in widths.items()}
            found.append((ids, content))
    return found


@pytest.mark.parametrize("content", [SHARDED, HOST, INT8, MIXED], ids=["sharded", "host", "int8", "mixed"])
@pytest.mark.parametrize("types", [("row_wise",), ("column_wise",)], ids=["row_wise", "column_wise"])
def test_model_sees_what_the_store_holds(dataset: str, content: ContentConfig, types: Any) -> None:
    config = replace(small_config(dataset), content=content, sharding=ShardingConfig(types=types, min_columns=4))
    stores = assembly.open_dataset(config).catalog.stores
    seen = 0
    for ids, values in (batch for rank in run_ranks(looked_up, 2, config) for batch in rank):
        for name, store in stores.items():
            rows = store.rows_of(ids)
            wanted = torch.from_numpy(store.gather(rows[rows >= 0]))
            if content.precision_of(name) == "int8":
                wanted = unpack(pack(wanted), store.width)
            assert np.array_equal(values[name][rows >= 0], wanted.numpy()), name
            seen += len(wanted)
    assert seen > 100


def bytes_read(env: DistributedEnv, config: RunConfig) -> dict[str, list[tuple[int, int]]]:
    """Bytes of each segment file that this rank reads while a model is sharded and filled, as spans of rows."""
    spans: dict[str, list[tuple[int, int]]] = {}
    real = MappedSegment.half

    def half(segment: MappedSegment, start: int, stop: int) -> torch.Tensor:
        size = segment._vectors.element_size() * segment._vectors.shape[1]
        name = segment._file.parent.parent.name
        spans.setdefault(name, []).append((start * size, stop * size))
        return real(segment, start, stop)

    MappedSegment.half = half  # type: ignore[method-assign]
    try:
        data = assembly.open_dataset(config)
        assembly.shard_retriever(config, data, assembly.build_retriever(config, data, RankExchange()), env.device)
    finally:
        MappedSegment.half = real  # type: ignore[method-assign]
    return spans


@pytest.mark.parametrize("content", [SHARDED, INT8, MIXED], ids=["sharded", "int8", "mixed"])
@pytest.mark.parametrize("world", [1, 2])
def test_each_byte_of_a_store_is_read_once_in_all(dataset: str, world: int, content: ContentConfig) -> None:
    config = replace(small_config(dataset), content=content)
    stores = assembly.open_dataset(config).catalog.stores
    ranks = run_ranks(bytes_read, world, config)
    for name, store in stores.items():
        spans = sorted(span for rank in ranks for span in rank.get(name, []))
        if content.placement_of(name) == "host":
            assert not spans
            continue
        borders = [0, *(stop for _, stop in spans)]
        assert [start for start, _ in spans] == borders[:-1]
        assert borders[-1] == store.rows * store.width * 2
        assert all(rank[name] for rank in ranks)


def test_placement_may_change_when_a_run_goes_on_and_precision_may_not(tmp_path: Path) -> None:
    refuse_changes(RunConfig(), RunConfig(content=HOST), tmp_path)
    with pytest.raises(ValueError, match=r"content\.precision is 'fp16' there and 'int8' now"):
        refuse_changes(RunConfig(), RunConfig(content=INT8), tmp_path)


def test_placement_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("content: {placement: host, each: {title: {placement: sharded, precision: int8}}}")
    content = load_config(tmp_path / "a.yaml").content
    assert content.on_host(("image", "title")) == ("image",)
    assert (content.precision_of("image"), content.precision_of("title")) == ("fp16", "int8")


def test_what_cannot_be_is_refused_with_the_remedy(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"content\.placement='disk': choose one of sharded, host"):
        ContentConfig(placement="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"content\.each\['title'\]: placement 'host' with precision 'int8'"):
        ContentConfig(placement="host", each={"title": ContentSettings(precision="int8")})
    for field, other in {
        "sharding.forward_comms='bf16'": {"sharding": ShardingConfig(forward_comms="bf16")},
        "sharding.group_size=4": {"sharding": ShardingConfig(group_size=4)},
        "tables.output_dtype='bf16'": {"tables": TablesConfig(output_dtype="bf16")},
    }.items():
        with pytest.raises(ValueError, match=f"{field} changes the codes"):
            RunConfig(content=INT8, **other)  # type: ignore[arg-type]
        RunConfig(content=HOST, **other)  # type: ignore[arg-type]
    unknown = replace(small_config(dataset), content=ContentConfig(each={"sound": ContentSettings(placement="host")}))
    with pytest.raises(ValueError, match=r"content\.each: 'sound' is no modality of this run; there are image, title"):
        assembly.open_dataset(unknown)


def test_batch_carries_vectors_in_half_precision_in_place_of_ids(dataset: str) -> None:
    env = DistributedEnv(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    config = replace(small_config(dataset), content=HOST)
    loader = assembly.make_loader(config, assembly.open_dataset(config), "train", env)
    assert not loader.pin_memory
    batch = next(iter(loader.batches(0)))
    assert batch.content["title"].dtype == torch.float16
    assert set(batch.features.keys()) & {"content.title", "content.image"} == set()


def said_at_start(env: DistributedEnv, config: RunConfig) -> list[str]:
    retriever = assembly.build_retriever(config, assembly.open_dataset(config), RankExchange())
    plan = sharding.make_plan(retriever, env.device, config.sharding, config.tables)
    return start_table(retriever, plan)


def test_start_says_where_each_modality_lies(dataset: str) -> None:
    (lines,) = run_ranks(said_at_start, 1, replace(small_config(dataset), content=MIXED))
    found = {line.split()[0]: line.split() for line in lines}
    assert found["content.title"][3:7] == ["int8", "fp32", "table_wise", "fused"]
    assert found["content.image"][3:8] == ["fp16", "fp32", "host", "memory_map", "frozen"]


@pytest.mark.gpu
def test_batches_for_a_gpu_are_made_in_page_locked_memory(dataset: str) -> None:
    env = DistributedEnv(rank=0, world_size=1, local_rank=0, device=torch.device("cuda", 0))
    config = replace(small_config(dataset), content=HOST)
    batch = next(iter(assembly.make_loader(config, assembly.open_dataset(config), "train", env).batches(0)))
    assert batch.content["title"].is_pinned() and batch.event_item.is_pinned()
    moved = batch.to(env.device, non_blocking=True)
    assert torch.equal(moved.content["title"].cpu(), batch.content["title"])
