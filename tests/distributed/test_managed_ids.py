"""Who is given a row of a managed table, who loses it, and where all others are looked up; without any ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from mufasa_rec.distributed import id_keys
from mufasa_rec.distributed.id_policy import Eviction, IdPolicyConfig, ManagedIdsConfig
from mufasa_rec.distributed.managed_ids import COUNTERS, ManagedIds

CPU = torch.device("cpu")


def table(rows: int, **settings: object) -> ManagedIds:
    config = ManagedIdsConfig(**{"interval": 1, "buckets": 1, "eviction": "lfu", **settings})  # type: ignore[arg-type]
    return ManagedIds("item", rows, config, CPU)


def look_up(ids: ManagedIds, seen: list[int] | Tensor, drawn: list[int] | None = None) -> list[int]:
    """One step; returns the rows."""
    values = torch.cat([torch.as_tensor(seen, dtype=torch.int64), torch.tensor(drawn or [], dtype=torch.int64)])
    lengths = torch.tensor([len(seen), len(drawn or [])])
    feature = {"item": JaggedTensor(values=values, lengths=lengths, weights=lengths)}
    feature = ids.remap(ids.profile(ids.preprocess(feature)))
    ids.evict()
    return feature["item"].values().tolist()


def held(ids: ManagedIds) -> dict[int, int]:
    """Row of every id that has one."""
    empty = ids.empty.repeat_interleave(ids.bucket_rows)
    taken = ids._mch_sorted_raw_ids != empty
    raw = id_keys.raw_of(ids._mch_sorted_raw_ids[taken])
    return dict(zip(raw.tolist(), ids._mch_remapped_ids_mapping[taken].tolist()))


def state(ids: ManagedIds) -> list[Tensor]:
    return [*(value.clone() for value in ids.state_dict().values()), ids.counters.clone(), *ids.pending]


def figures(ids: ManagedIds) -> dict[str, int]:
    return dict(zip(COUNTERS, ids.counters.tolist()))


def test_misses_are_spread_over_all_fallback_rows_and_no_other() -> None:
    ids = table(1_024, buckets=4, fallback_share=0.25, min_count=2)
    rows = Counter(look_up(ids, list(range(20_000))))
    assert held(ids) == {}
    assert sorted(rows) == [row for row in range(1_024) if row % 256 >= 192]
    assert max(rows.values()) < 3 * 20_000 / 256


def test_ids_are_admitted_when_they_were_seen_often_enough_within_an_interval() -> None:
    ids = table(16, interval=3, min_count=2)
    look_up(ids, [1, 2, 3])
    look_up(ids, [2, 3])
    assert held(ids) == {}
    look_up(ids, [4, 3], drawn=[5, 5, 1])  # drawn ids do not count
    assert sorted(held(ids)) == [2, 3]
    for _ in range(3):
        look_up(ids, [1])
    assert sorted(held(ids)) == [1, 2, 3]


def test_known_ids_are_remembered_however_seldom_they_are_seen() -> None:
    ids = table(4, eviction="lru", min_count=2, fallback_share=0.5)
    look_up(ids, [1, 1, 2, 2])
    look_up(ids, [1])
    look_up(ids, [3, 3])
    assert sorted(held(ids)) == [1, 3]  # 2 was seen less recently than 1


def test_least_frequent_policy_keeps_the_counts_and_an_equal_one_stays() -> None:
    ids = table(5)
    look_up(ids, [1] * 5 + [2] * 4 + [3] * 3 + [4] * 2)
    assert sorted(held(ids)) == [1, 2, 3, 4]
    row = held(ids)[4]
    look_up(ids, [5, 5])
    assert sorted(held(ids)) == [1, 2, 3, 4]
    look_up(ids, [6] * 3)
    assert sorted(held(ids)) == [1, 2, 3, 6]
    assert held(ids)[6] == row


def test_least_recent_policy_keeps_the_newest_whatever_their_counts() -> None:
    ids = table(5, eviction="lru")
    look_up(ids, [1] * 50 + [2])
    look_up(ids, [3, 4])
    look_up(ids, [2])
    look_up(ids, [5])
    assert sorted(held(ids)) == [2, 3, 4, 5]


def test_distance_policy_weighs_counts_by_age() -> None:
    ids = table(3, eviction="distance_lfu", decay=1.0)
    look_up(ids, [1] * 8 + [2] * 2)
    look_up(ids, [2])
    look_up(ids, [3] * 3)  # of 8 / 3, 3 / 2 and 3 / 1 the second is the least
    assert sorted(held(ids)) == [1, 3]
    look_up(ids, [3])
    look_up(ids, [4, 4])  # of 8 / 5, 4 / 2 and 2 / 1 the first is
    assert sorted(held(ids)) == [3, 4]


@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu"])
@pytest.mark.parametrize("min_count", [1, 2])
def test_every_round_keeps_the_best_of_each_bucket(eviction: Eviction, min_count: int) -> None:
    """Against a plain dictionary: who is there afterwards are the best of those who were and those who came."""
    ids = table(96, buckets=4, interval=2, eviction=eviction, min_count=min_count, fallback_share=0.25)
    rng = np.random.default_rng(0)
    known: dict[int, tuple[int, int]] = {}
    rows: dict[int, int] = {}

    def score(one: tuple[int, int], now: int) -> float:
        return {"lfu": one[0], "lru": one[1], "distance_lfu": one[0] / (now - one[1] + 1)}[eviction]

    for now in range(2, 41, 2):
        seen: Counter[int] = Counter()
        last: dict[int, int] = {}
        for step in (now - 1, now):
            batch = (rng.zipf(1.3, 60) % 400 + now * 3).tolist()
            look_up(ids, batch)
            seen.update(batch)
            last.update(dict.fromkeys(batch, step))
        before = dict(known)
        for one, count in seen.items():
            if one in before:
                before[one] = (before[one][0] + count, last[one])
        coming = {one: (seen[one], last[one]) for one in seen if one not in before and seen[one] >= min_count}
        kept = held(ids)
        assert kept.keys() <= before.keys() | coming.keys()
        everyone = {**before, **coming}
        buckets = dict(zip(everyone, id_keys.bucket_of(id_keys.keys_of(torch.tensor(list(everyone))), 4).tolist()))
        for bucket in range(4):
            scores = sorted((score(everyone[one], now) for one in everyone if buckets[one] == bucket), reverse=True)
            mine = sorted((score(everyone[one], now) for one in kept if buckets[one] == bucket), reverse=True)
            assert mine == scores[: ids.managed_rows]
        assert sorted(kept.values()) == sorted(set(kept.values()))  # a row each
        assert all(kept[one] == row for one, row in rows.items() if one in kept)
        known, rows = {one: everyone[one] for one in kept}, kept
    assert figures(ids)["evicted"] > 0
    assert int(ids.open_slots()) == 4 * ids.managed_rows - len(known)


def test_a_tiny_first_batch_does_not_limit_what_is_admitted_later() -> None:
    ids = table(4_096, buckets=4, interval=2)
    look_up(ids, [1])
    look_up(ids, list(range(3_000)))
    assert set(held(ids)) == set(range(3_000))


def test_evaluation_changes_no_state() -> None:
    ids = table(64, buckets=2, interval=2)
    look_up(ids, list(range(40)))
    look_up(ids, list(range(40)))
    look_up(ids, [3, 4])
    before, rows_before = state(ids), held(ids)
    ids.eval()
    for _ in range(5):
        rows = look_up(ids, list(range(60)))
    assert {one: row for one, row in enumerate(rows) if one in rows_before} == rows_before
    assert len(rows_before) < 60
    assert all(torch.equal(old, new) for old, new in zip(before, state(ids), strict=True))


def test_figures_add_up() -> None:
    ids = table(64, buckets=2, interval=3, fallback_share=0.25)
    rng = np.random.default_rng(1)
    counted = hits = lookups = misses = 0
    for _ in range(30):
        seen, drawn = rng.integers(0, 200, 40).tolist(), rng.integers(0, 200, 10).tolist()
        found = look_up(ids, seen, drawn)
        own = [row % 32 < ids.managed_rows for row in found]
        counted, lookups = counted + 40, lookups + 50
        hits, misses = hits + sum(own[:40]), misses + 50 - sum(own)
    told = figures(ids)
    assert (told["counted"], told["hits"], told["lookups"], told["fallbacks"]) == (counted, hits, lookups, misses)
    assert told["admitted"] - told["evicted"] == len(held(ids))
    assert told["evicted"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 100}, r"ids...rows=100: 64 buckets .* choose 128"),
        ({"rows": 64}, r"ids...rows=64: .* choose 128"),
        ({"rows": 1}, r"ids...rows=1: choose 2 or more"),
        ({"salts": 9}, r"ids...salts=9: choose 1 to 8"),
        ({"policy": "none"}, r"ids...policy='none': choose one of vocabulary, hash, managed_collision"),
    ],
)
def test_policies_that_cannot_be_are_refused_with_the_remedy(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdPolicyConfig(**{"policy": "managed_collision", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buckets": 3}, "managed.buckets=3: choose a power of two up to 1024"),
        ({"eviction": "fifo"}, "managed.eviction='fifo': choose one of lfu, lru, distance_lfu"),
        ({"interval": 0}, "managed.interval=0: choose 1 or more"),
        ({"fallback_share": 0.0}, "managed.fallback_share=0.0: choose above 0 and below 1"),
        ({"decay": 0.0}, "managed.decay=0.0: choose above 0; for plain counts choose 'lfu'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_remedy(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManagedIdsConfig(**settings)


def test_number_of_ranks_that_does_not_divide_the_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ids.user.managed.buckets=64: cannot be dealt to 3 ranks"):
        ManagedIdsConfig().refuse_world(3, "user")
