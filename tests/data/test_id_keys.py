"""Keys by hashing: even, never the row of what is unknown, and colliding as often as is foretold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mufasa_rec.data.id_keys import HashedKeys, mix
from mufasa_rec.distributed import id_keys


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, count))


@pytest.mark.parametrize("ids", [random_ids(50_000), np.arange(50_000), np.arange(50_000) * 4096])
@pytest.mark.parametrize("salts", [1, 2, 3])
def test_foretold_share_of_collisions_is_the_measured_one_within_one_hundredth(ids: np.ndarray, salts: int) -> None:
    keys = HashedKeys(80_001, salts)
    foretold = keys.expected_collisions(len(ids))
    assert abs(keys.measured_collisions(ids) - foretold) < 0.01
    assert 0.2 < foretold < 0.7


def test_more_salts_tell_more_ids_apart_where_there_are_rows_enough() -> None:
    ids = random_ids(20_000)
    one, two = (HashedKeys(100_001, salts).measured_collisions(ids) for salts in (1, 2))
    assert two < 0.7 * one


def test_no_id_is_hashed_to_the_row_of_what_is_unknown_and_every_other_row_is_used() -> None:
    keys = HashedKeys(101, 2).keys_of(random_ids(5_000))
    assert np.unique(keys).tolist() == list(range(1, 101))
    assert keys.shape[1] == 2
    assert (keys[:, 0] == keys[:, 1]).mean() < 0.05


def test_no_ids_collide_where_there_are_none_or_one() -> None:
    keys = HashedKeys(10)
    assert keys.measured_collisions(np.zeros(0, np.int64)) == 0
    assert keys.expected_collisions(0) == keys.expected_collisions(1) == keys.measured_collisions(np.array([7])) == 0


@pytest.mark.parametrize("buckets", [1, 2, 64, 1024])
def test_managed_ids_survive_their_way_and_are_ordered_by_bucket(buckets: int) -> None:
    ids = torch.from_numpy(random_ids(2_000))
    sent = id_keys.to_send(ids, buckets)
    keys = id_keys.received(sent, buckets)
    bucket = id_keys.bucket_of(keys, buckets)
    assert torch.equal(id_keys.raw_of(keys), ids)
    assert torch.equal(keys, id_keys.keys_of(ids))
    assert np.array_equal(sent.numpy().view(np.uint64) % np.uint64(buckets), bucket.numpy().view(np.uint64))
    assert torch.equal(bucket[keys.argsort()], bucket.sort().values)
    last = id_keys.last_keys(0, buckets, buckets, ids.device)
    assert bool((last[bucket] >= keys).all())
    assert torch.equal(id_keys.bucket_of(last, buckets), torch.arange(buckets))


def test_both_halves_of_the_house_mix_alike() -> None:
    ids = random_ids(1_000)
    assert np.array_equal(id_keys.mix(torch.from_numpy(ids)).numpy().view(np.uint64), mix(ids))
