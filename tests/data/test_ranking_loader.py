"""Batches of requests: what is in them, their order and state, dropped negatives, one impression at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mufasa_rec.data.item_lookup import ItemLookup, split_of
from mufasa_rec.data.loader import DataConfig, RequestsConfig
from mufasa_rec.data.parquet import list_row_groups
from mufasa_rec.data.ranking_batch import RankingBatch
from mufasa_rec.data.ranking_collate import ShownFeatures
from mufasa_rec.data.ranking_loader import RankingLoader, load_users
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.data.synthetic_clicks import generate_clicks
from tests.helpers.impressions import SMALL, impressions_table, prepare_impressions

CONFIG = DataConfig(batch_size=16, num_readers=8, max_history=5, min_count=2, split="impressions", prefetch=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_impressions(tmp_path_factory.mktemp("ranking_loader"))


def loader_of(dataset: str, part: str = "train", config: DataConfig = CONFIG, **change: Any) -> RankingLoader:
    manifest = DatasetManifest.load(dataset)
    ref, split = split_of(manifest, dataset, "impressions")
    catalog = ItemLookup(dataset, manifest, split, min_count=config.min_count)
    assert manifest.impressions is not None
    features = ShownFeatures(manifest.impressions, load_users(dataset, split, config.min_count))
    groups = list_row_groups(dataset, manifest, ref, part)
    change = {"columns": ("timestamp",), "training": part == "train", **change}
    return RankingLoader(groups, catalog, features, config, **change)


def impressions_in(batches: list[RankingBatch]) -> list[int]:
    return torch.cat([batch.impression for batch in batches]).tolist()


def test_batch_holds_what_the_source_says_of_each_candidate(dataset: str) -> None:
    source, loader = impressions_table(generate_clicks(0, SMALL)), loader_of(dataset)
    for batch in loader.batches(0):
        number = batch.impression.numpy()
        ids = np.asarray(loader.catalog.items.ids)[batch.item_row.numpy()]
        np.testing.assert_array_equal(ids[batch.candidate_item], source["item"][number])
        np.testing.assert_array_equal(batch.labels[:, 0], source["clicked"][number])
        np.testing.assert_array_equal(batch.labels[:, 1], source["liked"][number])
        np.testing.assert_array_equal(batch.request_time_ms, source["timestamp"][number])
        owner = np.repeat(np.arange(len(batch.user)), np.diff(batch.candidate_offsets))
        np.testing.assert_array_equal(batch.user[owner], source["user"][number])
        assert (batch.features["context.surface"].values().numpy() > 0).all()
        price, about = source["price"][number], loader.features.info.dense["price"]
        np.testing.assert_allclose(
            batch.dense[:, 0], np.nan_to_num((price - about.mean) / about.std, nan=0.0), atol=1e-4
        )
        np.testing.assert_array_equal(batch.item_count, loader.catalog.counts[batch.item_row[batch.candidate_item]])
        assert batch.features.keys()[-2:] == ["user", "context.surface"]
        assert len(batch.features["user"].values()) == len(batch.user)


def test_history_is_the_newest_events_strictly_before_the_request(dataset: str) -> None:
    clicks, loader = generate_clicks(0, SMALL), loader_of(dataset)
    for batch in loader.batches(0):
        assert batch.timestamps_ms is not None
        ids = np.asarray(loader.catalog.items.ids)[batch.item_row.numpy()][batch.event_item]
        for row in range(len(batch.user)):
            time = batch.request_time_ms[batch.candidate_offsets[row]].item()
            before = (clicks.click_user == batch.user[row].item()) & (clicks.click_timestamp < time)
            span = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
            assert ids[span].tolist() == clicks.click_item[before][-CONFIG.max_history :].tolist()
            assert batch.history_length[row] == before.sum()
            assert batch.start_position[row] == max(before.sum() - CONFIG.max_history, 0)


def test_every_impression_comes_once_in_an_order_that_seed_and_epoch_decide(dataset: str) -> None:
    orders = {
        (seed, epoch): impressions_in(list(loader_of(dataset, seed=seed).batches(epoch)))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    }
    again = impressions_in(list(loader_of(dataset).batches(0)))
    assert again == orders[0, 0]
    assert orders[0, 0] != orders[0, 1] and orders[0, 0] != orders[1, 0]
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1
    assert len(set(again)) == len(again) == 8 * SMALL.num_users * SMALL.requests * SMALL.candidates // 10


def test_batches_do_not_know_the_number_of_ranks(dataset: str) -> None:
    alone = list(loader_of(dataset).batches(0))
    ranks = [list(loader_of(dataset, rank=rank, world_size=2).batches(0)) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        assert impressions_in([batch]) == impressions_in([ranks[0][step], ranks[1][step]])


def test_state_and_a_later_start_continue_with_the_next_request(dataset: str) -> None:
    loader = loader_of(dataset)
    whole = list(loader.batches(1))
    assert impressions_in(list(loader.batches(1, first_step=3))) == impressions_in(whole[3:])
    state = loader.state(1, 3)
    assert state == loader_of(dataset, rank=1, world_size=2).state(1, 3) and state != loader.state(1, 4)


def test_rank_without_requests_gets_an_empty_one(dataset: str) -> None:
    config = replace(CONFIG, batch_size=64, num_readers=64)
    loader = loader_of(dataset, "test", config, rank=63, world_size=64)
    order = loader.order(0)
    batch = loader.make(order, order.num_steps)
    assert (batch.num_rows, batch.num_targets, batch.num_events) == (0, 0, 0)
    assert batch.labels.shape == (0, 2) and batch.dense.shape == (0, 1) and batch.offsets.tolist() == [0, 0]


def test_impressions_one_by_one_are_the_same_candidates_with_the_same_histories(dataset: str) -> None:
    single = replace(CONFIG, requests=RequestsConfig(per_request=False))
    for together, apart in zip(loader_of(dataset).batches(0), loader_of(dataset, config=single).batches(0)):
        assert apart.candidate_offsets.tolist() == list(range(apart.num_targets + 1))
        assert apart.num_rows == together.num_targets
        for name in ("impression", "labels", "dense", "item_count", "request_time_ms"):
            assert torch.equal(getattr(apart, name), getattr(together, name))
        owner = torch.repeat_interleave(torch.diff(together.candidate_offsets))
        items = [together.item_row[part] for part in (together.event_item, together.candidate_item)]
        assert torch.equal(apart.item_row[apart.candidate_item], items[1])
        histories = items[0].tensor_split(together.offsets[1:-1])
        wanted = torch.cat([histories[row] for row in owner.tolist()])
        assert torch.equal(apart.item_row[apart.event_item], wanted)
        assert torch.equal(apart.user, together.user[owner])


@pytest.mark.parametrize("correction", ["offset", "weight"])
def test_dropped_negatives_are_made_up_for_and_positives_all_stay(tmp_path_factory: Any, correction: Any) -> None:
    dataset = prepare_impressions(tmp_path_factory.mktemp("negatives"), labels={"click": "clicked"})
    config = replace(CONFIG, requests=RequestsConfig(negative_rate=0.25, correction=correction))
    every, some = list(loader_of(dataset).batches(0)), list(loader_of(dataset, config=config).batches(0))
    labels = [torch.cat([batch.labels[:, 0] for batch in batches]) for batches in (every, some)]
    assert labels[0].sum() == labels[1].sum()
    negatives = [int((label == 0).sum()) for label in labels]
    assert abs(negatives[1] / negatives[0] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / negatives[0])
    weight, offset = (torch.cat([getattr(b, name) for b in some]) for name in ("weight", "logit_offset"))
    if correction == "offset":
        assert torch.allclose(offset, torch.tensor(np.log(4.0)).float()) and (weight == 1).all()
    else:
        assert torch.equal(weight, torch.where(labels[1] > 0, 1.0, 4.0)) and (offset == 0).all()
    assert impressions_in(some) == impressions_in(list(loader_of(dataset, config=config).batches(0)))
    assert impressions_in(some) != impressions_in(list(loader_of(dataset, config=config).batches(1)))
    test = list(loader_of(dataset, "test", config).batches(0))
    assert sum(batch.num_targets for batch in test) == sum(
        batch.num_targets for batch in loader_of(dataset, "test").batches(0)
    )
    assert all((batch.logit_offset == 0).all() and (batch.weight == 1).all() for batch in test)


def test_rate_of_the_source_counts_as_well(tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("source_rate")
    dataset = prepare_impressions(folder, labels={"click": "clicked"}, negative_rate=0.5)
    batch = next(loader_of(dataset).batches(0))
    assert torch.allclose(batch.logit_offset, torch.tensor(np.log(2.0)).float())
    config = replace(CONFIG, requests=RequestsConfig(negative_rate=0.5))
    assert torch.allclose(
        next(loader_of(dataset, config=config).batches(0)).logit_offset, torch.tensor(np.log(4.0)).float()
    )


def test_one_offset_for_several_tasks_is_refused(dataset: str) -> None:
    config = replace(CONFIG, requests=RequestsConfig(negative_rate=0.5))
    with pytest.raises(ValueError, match="one offset cannot correct 2 tasks"):
        loader_of(dataset, config=config)


def test_prefetching_changes_nothing(dataset: str) -> None:
    ahead = loader_of(dataset, config=replace(CONFIG, prefetch=2))
    assert impressions_in(list(ahead.batches(0))) == impressions_in(list(loader_of(dataset).batches(0)))


def test_batch_moves_as_a_whole(dataset: str) -> None:
    batch = next(loader_of(dataset).batches(0))
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, RankingBatch) and moved.labels.device.type == "meta" and moved.step == batch.step
