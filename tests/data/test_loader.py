"""The loader: the same batches on any number of ranks, from any layout and path; its thread, its state, its errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mufasa_rec.config import RunConfig
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.loader import DataConfig, Loader
from mufasa_rec.data.negatives import NegativesConfig
from mufasa_rec.data.parquet import RowGroupReader
from mufasa_rec.distributed.env import DistributedEnv
from tests.helpers.naive import check_batch, naive_batch
from tests.helpers.runs import small_config
from torchx_apps import assembly


def place(rank: int = 0, world_size: int = 1) -> DistributedEnv:
    return DistributedEnv(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))


def config_of(dataset: str, softmax: str = "full", **data: Any) -> RunConfig:
    config = small_config(dataset, softmax=softmax)
    return replace(config, data=replace(config.data, prefetch=0, **data))


def loader_of(config: RunConfig, part: str = "train", rank: int = 0, world_size: int = 1) -> Loader:
    return assembly.make_loader(config, assembly.open_dataset(config), part, place(rank, world_size))


def content_of(batches: list[Batch]) -> dict[str, list]:
    """What ranks' batches of one step say together, free of the numbering of batch items."""
    out: dict[str, list] = {}
    for batch in batches:
        if not batch.num_rows:
            assert batch.num_events == batch.num_targets == 0
        rows = batch.item_row
        told = {
            "history": rows[batch.event_item],
            "following": rows[batch.next_item],
            "weight": batch.target_weight,
            "candidates": rows[batch.candidate_item],
            "user": batch.user[: batch.num_rows],
            "target": batch.target_row[: batch.num_rows],
            "lengths": torch.diff(batch.offsets)[: batch.num_rows],
            "start": batch.start_position[: batch.num_rows],
            "seen": batch.seen_row,
            "device": batch.features["event.device"].values(),
        }
        for name, values in told.items():
            out.setdefault(name, []).extend(values.tolist())
    pairs = [list(zip(b.item_row[b.candidate_item].tolist(), b.candidate_bias.tolist())) for b in batches]
    out["candidates"] = sorted(pair for found in pairs for pair in found)  # a rank brings its part of each source
    return out


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("part", "softmax"), [("train", "full"), ("train", "sampled"), ("test", "full")])
def test_ranks_together_hold_the_batches_of_one_rank(dataset: str, world_size: int, part: str, softmax: str) -> None:
    config = config_of(dataset, softmax)
    alone = list(loader_of(config, part).batches(1))
    shares = [list(loader_of(config, part, rank, world_size).batches(1)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(alone)}
    for step, batch in enumerate(alone):
        assert content_of([share[step] for share in shares]) == content_of([batch])
        assert batch.num_targets == sum(share[step].num_targets for share in shares)


def test_ranks_without_rows_give_an_empty_row_in_every_step(dataset: str) -> None:
    config = config_of(dataset, num_readers=150, batch_size=150)
    data = assembly.open_dataset(config)
    shares = []
    for rank in range(150):
        loader = assembly.make_loader(config, data, "validation", place(rank, 150))
        shares.append([batch.num_rows for batch in loader.batches(0)])
    assert {len(share) for share in shares} == {1}
    assert sum(sum(share) for share in shares) == 120
    assert [0] in shares


@pytest.mark.parametrize("part", ["train", "validation"])
def test_loader_equals_a_loop_over_the_rows_of_its_plan(dataset: str, part: str) -> None:
    config = config_of(dataset, target_actions=("buy", "view"))
    loader = loader_of(config, part)
    actions = [1, 3] if part == "train" else None
    order = loader.order(2)
    for step in range(order.num_steps):
        rows = []
        for reader in loader.readers:
            for piece in order.pieces(reader, step):
                group, permutation = loader._group(reader, 2, piece.group)
                rows.extend((group, int(row)) for row in permutation[piece.start : piece.stop])
        check_batch(loader.make(order, step), loader.catalog, naive_batch(rows, 12, actions))


def test_each_row_is_trained_once_per_epoch_in_an_order_of_its_own(dataset: str) -> None:
    loader = loader_of(config_of(dataset))
    users = [[user for batch in loader.batches(epoch) for user in batch.user.tolist()] for epoch in (0, 1)]
    assert sorted(users[0]) == sorted(users[1]) == list(range(1, 121))
    assert users[0] != users[1]


def test_lookup_by_distinct_items_says_the_same_as_by_events(dataset: str) -> None:
    for config in (config_of(dataset), config_of(dataset, "sampled")):
        other = replace(config, data=replace(config.data, dedup=False))
        for first, second in zip(loader_of(config).batches(0), loader_of(other).batches(0), strict=True):
            assert content_of([first]) == content_of([second])
            assert len(first.item_row) < len(second.item_row)


def test_negatives_are_drawn_anew_in_each_step_and_carry_log_q(dataset: str) -> None:
    loader = loader_of(config_of(dataset, "sampled"))
    sampler = loader.sampler
    assert sampler is not None
    drawn = [batch.item_row[batch.candidate_item] for batch in loader.batches(0)]
    assert len({tuple(rows.tolist()) for rows in drawn}) == len(drawn)
    assert set(np.concatenate(drawn).tolist()) <= set(np.flatnonzero(sampler.available).tolist())
    order = loader.order(0)
    targets = sampler.share(16) * 16 * sampler.targets_per_row
    expected = targets * (sampler.counts / sampler.total) + 24 / len(sampler.items)
    batch = loader.make(order, 0)
    rows = batch.item_row[batch.candidate_item].numpy()
    np.testing.assert_allclose(batch.candidate_bias.numpy(), -np.log(expected[rows]), rtol=1e-5)


def test_expected_number_of_in_batch_negatives_is_met(dataset: str) -> None:
    """Over many epochs an item is drawn as often as Q says."""
    negatives = NegativesConfig(softmax="sampled", num_uniform=100, num_inbatch=400)
    loader = loader_of(
        config_of(dataset, negatives=negatives, max_history=200, num_readers=1, batch_size=120, min_count=1)
    )
    sampler = loader.sampler
    assert sampler is not None
    drawn = np.zeros(len(loader.catalog))
    epochs = 25
    for epoch in range(epochs):
        batch = loader.make(loader.order(epoch), 0)
        np.add.at(drawn, batch.item_row[batch.candidate_item].numpy(), 1.0 / epochs)
    rows = np.flatnonzero(sampler.available)
    expected = np.exp(-sampler.bias(rows, 120))
    assert drawn.sum() == pytest.approx(500, rel=0.03)
    assert expected.sum() == pytest.approx(500, rel=0.01)
    assert np.corrcoef(drawn[rows], expected)[0, 1] > 0.9


def test_full_softmax_has_each_available_item_once_over_all_ranks(dataset: str) -> None:
    config = config_of(dataset)
    batches = [next(iter(loader_of(config, "train", rank, 3).batches(0))) for rank in range(3)]
    rows = np.concatenate([batch.item_row[batch.candidate_item] for batch in batches])
    available = assembly.open_dataset(config).catalog.available
    assert rows.tolist() == np.flatnonzero(available).tolist()


def test_state_continues_with_the_next_row_of_every_reader(dataset: str) -> None:
    loader = loader_of(config_of(dataset))
    whole = list(loader.batches(3))
    state = loader.state(3, 2)
    assert (state.epoch, state.step, len(state.readers)) == (3, 2, 8)
    order = loader.order(3)
    for reader, (group, offset) in enumerate(state.readers):
        piece = order.pieces(reader, 2)[0]
        assert (group, offset) == (piece.group, piece.start)
    rest = list(loader_of(config_of(dataset)).batches(state.epoch, state.step))
    assert [content_of([batch]) for batch in rest] == [content_of([batch]) for batch in whole[2:]]
    assert loader.state(3, order.num_steps).readers == [(-1, 0)] * 8


def test_targets_beyond_the_history_are_told_once(dataset: str, caplog: pytest.LogCaptureFixture) -> None:
    list(loader_of(config_of(dataset)).batches(0))
    (record,) = caplog.records
    assert "data.max_history=12: rows have targets further back" in record.getMessage()
    caplog.clear()
    whole = config_of(dataset, max_history=300)
    list(loader_of(whole).batches(0))
    list(loader_of(config_of(dataset), "test").batches(0))
    assert not caplog.records


def test_thread_makes_the_batches_that_are_made_without_it(dataset: str) -> None:
    config = config_of(dataset)
    ahead = replace(config, data=replace(config.data, prefetch=3))
    told = [[content_of([batch]) for batch in loader_of(c).batches(0, num_steps=4)] for c in (config, ahead)]
    assert len(told[0]) == 4
    assert told[0] == told[1]


def test_error_in_the_thread_is_raised_where_batches_are_read(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(dataset)
    loader = loader_of(replace(config, data=replace(config.data, prefetch=2)))
    make = loader.make

    def fails_later(order: object, step: int) -> Batch:
        if step == 3:
            raise ValueError("step 3 is broken")
        return make(order, step)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "make", fails_later)
    batches = loader.batches(0)
    assert len(list(islice(batches, 3))) == 3
    with pytest.raises(ValueError, match="step 3 is broken"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_closing_early_ends_the_thread(dataset: str) -> None:
    config = config_of(dataset)
    batches = loader_of(replace(config, data=replace(config.data, prefetch=1))).batches(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_data_set_on_an_object_store_gives_the_same_batches(dataset: str) -> None:
    remote = "memory://loader-test/dataset"
    store = fsspec.filesystem("memory")
    for file in Path(dataset).rglob("*"):
        if file.is_file():
            store.makedirs(f"/loader-test/dataset/{file.parent.relative_to(dataset)}", exist_ok=True)
            store.pipe(f"/loader-test/dataset/{file.relative_to(dataset)}", file.read_bytes())
    for part in ("train", "test"):
        here, there = (list(loader_of(config_of(url), part).batches(0)) for url in (dataset, remote))
        assert [content_of([batch]) for batch in here] == [content_of([batch]) for batch in there]


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a Parquet file, keeping its row groups."""
    file = pq.ParquetFile(path)
    tables = [change(file.read_row_group(index)) for index in range(file.num_row_groups)]
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    target = tmp_path / "dataset"
    fsspec.filesystem("file").copy(dataset, str(target), recursive=True)
    return target


def test_rows_with_their_own_lists_give_the_batches_of_references(dataset: str, copy: Path) -> None:
    """The same rows written the other way, as Spark or a warehouse would."""
    columns = ["item", "timestamp", "action", "weight", "device"]
    for part in ("train", "validation"):
        file = copy / "splits/leave_one_out" / part / "base/bucket-00000.parquet"
        events, rows = pq.ParquetFile(copy / EVENTS), pq.ParquetFile(file)
        tables = []
        for group in range(rows.num_row_groups):
            users = events.read_row_group(group).to_pydict()
            at = {user: index for index, user in enumerate(users["user"])}
            found = rows.read_row_group(group).to_pylist()
            table = {name: [users[name][at[r["user"]]][: r["history_end"]] for r in found] for name in columns}
            types = {name: events.schema_arrow.field(name).type for name in columns}
            arrays = {"user": pa.array([r["user"] for r in found], pa.int64())}
            arrays |= {name: pa.array(values, types[name]) for name, values in table.items()}
            arrays["target_from"] = pa.array([r["target_from"] for r in found], pa.int32())
            tables.append(pa.table(arrays))
        with pq.ParquetWriter(file, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, table.num_rows))
    manifest = copy / "dataset.json"
    text = manifest.read_text().replace('"layout": "references"', '"layout": "lists"')
    assert text != manifest.read_text()
    manifest.write_text(text)
    for part in ("train", "validation"):
        told = [[content_of([b]) for b in loader_of(config_of(str(url)), part).batches(0)] for url in (dataset, copy)]
        assert told[0] == told[1]


def set_weight(value: float) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        lists = table.column("weight").to_pylist()
        lists[0][0] = value
        place = table.schema.get_field_index("weight")
        return table.set_column(place, table.schema.field(place), pa.array(lists, table.schema.field(place).type))

    return change


def cast_user(table: pa.Table) -> pa.Table:
    return table.set_column(0, "user", table.column("user").cast(pa.float64()))


def shift_end(table: pa.Table) -> pa.Table:
    return table.set_column(1, "history_end", pa.array([500] * table.num_rows, pa.int32()))


def other_user(table: pa.Table) -> pa.Table:
    return table.set_column(0, "user", pa.array([10**6] * table.num_rows, pa.int64()))


def empty_rows(table: pa.Table) -> pa.Table:
    zero = pa.array([0] * table.num_rows, pa.int32())
    return table.set_column(1, "history_end", zero).set_column(2, "target_from", zero)


EVENTS = "events/base/bucket-00000.parquet"
ROWS = "splits/leave_one_out/validation/base/bucket-00000.parquet"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (EVENTS, set_weight(-1.0), r"column 'weight' of row group \d+ holds 1 weights.*such as -1.0.*write 0 or more"),
        (EVENTS, set_weight(float("nan")), r"column 'weight'.*not finite, such as nan"),
        (EVENTS, lambda table: table.drop(["device"]), r"column 'device' is missing; it has .*dataset.json"),
        (EVENTS, cast_user, r"column 'user' is double with 0 nulls; write int64"),
        (ROWS, shift_end, r"row 0 of row group 0 has target_from=\d+, history_end=500 for a stream of \d+ events"),
        (ROWS, other_user, r"refers to users that row group 0 of .*events.*does not hold.*prepare the data set again"),
        (ROWS, empty_rows, r"row \d+ of an evaluation part has no event to rank; leave such rows out"),
    ],
)
def test_broken_file_is_named_with_the_remedy(
    copy: Path, file: str, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    rewrite(copy / file, change)
    with pytest.raises(ValueError, match=message):
        list(loader_of(config_of(str(copy)), "validation").batches(0))


def test_part_without_rows_is_named(copy: Path) -> None:
    (copy / ROWS).unlink()
    with pytest.raises(ValueError, match=r"splits/leave_one_out/validation: no rows .*prepare it again"):
        loader_of(config_of(str(copy)), "validation")


def test_counts_that_miss_a_target_are_refused(dataset: str) -> None:
    loader = loader_of(config_of(dataset))
    assert loader.sampler is not None
    loader.sampler.available[:] = False
    with pytest.raises(ValueError, match=r"items are training targets without a training event"):
        next(iter(loader.batches(0)))


def test_files_beyond_the_limit_are_closed_and_opened_again(dataset: str) -> None:
    loader = loader_of(config_of(dataset))
    reader = RowGroupReader(loader.columns, max_open=1)
    for ref in loader.groups:
        again, first = reader.read(ref), loader._files.read(ref)
        assert again.columns["item"].tolist() == first.columns["item"].tolist()
    assert len(reader._files) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("batch_size", 65), ("num_readers", 0), ("max_history", 0), ("min_count", 0), ("prefetch", -1)],
)
def test_configuration_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}={value}"):
        DataConfig(**{field: value})


def test_sampled_softmax_without_negatives_is_refused(dataset: str) -> None:
    none = NegativesConfig(softmax="sampled", num_uniform=0, num_inbatch=0)
    with pytest.raises(
        ValueError, match=r"num_uniform and num_inbatch are both 0.*set data\.negatives\.softmax='full'"
    ):
        loader_of(config_of(dataset, negatives=none))
    with pytest.raises(ValueError, match=r"data\.negatives\.num_uniform=-1"):
        NegativesConfig(num_uniform=-1)


def test_unknown_target_action_is_named(dataset: str) -> None:
    with pytest.raises(ValueError, match=r"target_actions: 'share' is no action .*\['buy', 'like', 'view'\]"):
        loader_of(config_of(dataset, target_actions=("share",)))
