"""Ranks spread over parts of a catalog equal a brute-force ranking of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.ranks import bootstrap_interval, catalog_part, gains, rank_among, rank_targets
from tests.helpers.ranks import run_ranks


class Alone:
    """The exchange of one rank."""

    world_size, rank = 1, 0

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        return x


def brute_force(
    scores: np.ndarray, target: np.ndarray, seen: list[set[int]], k: int
) -> tuple[np.ndarray, list[list[float]]]:
    """Mid-ranks, and the scores of the best `k`, one query and item at a time."""
    ranks, best = [], []
    for query, row in enumerate(scores.tolist()):
        shown = {item: score for item, score in enumerate(row) if item == target[query] or item not in seen[query]}
        mine = row[target[query]]
        better = sum(score > mine for score in shown.values())
        equal = sum(score == mine for score in shown.values()) - 1
        ranks.append(1 + better + equal / 2)
        best.append(sorted(shown.values(), reverse=True)[:k])
    return np.array(ranks), best


def pairs_of(seen: list[set[int]]) -> tuple[Tensor, Tensor]:
    pairs = [(query, item) for query, items in enumerate(seen) for item in sorted(items)]
    pairs += pairs[:3]  # an item that was seen twice is masked once
    return torch.tensor([p[0] for p in pairs], dtype=torch.int64), torch.tensor(
        [p[1] for p in pairs], dtype=torch.int64
    )


def check(scores: np.ndarray, target: np.ndarray, seen: list[set[int]], rank: Tensor, top: Tensor, k: int) -> None:
    expected, best = brute_force(scores, target, seen, k)
    assert rank.tolist() == expected.tolist()
    for query, items in enumerate(top.tolist()):
        shown = [item for item in items if item >= 0]
        assert items == shown + [-1] * (k - len(shown))
        assert len(set(shown)) == len(shown)
        assert [scores[query, item] for item in shown] == best[query]
        assert not (set(shown) - {target[query]}) & seen[query]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 14), st.integers(0, 10**6), st.booleans())
def test_ranks_equal_brute_force_with_ties_and_masks(queries: int, items: int, seed: int, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (queries, items)).astype(np.float32)
    target = rng.integers(0, items, queries)
    seen = [set(rng.integers(0, items, rng.integers(0, items + 1)).tolist()) if masked else set() for _ in target]
    asked = pairs_of(seen) if masked else None
    rank, top = rank_targets(
        torch.from_numpy(scores.copy()), range(items), torch.from_numpy(target), asked, Alone(), k=4
    )
    check(scores, target, seen, rank, top, 4)


def ranked_in_parts(env: DistributedEnv, scores: np.ndarray, target: np.ndarray, seen: list[set[int]]) -> tuple:
    part = catalog_part(scores.shape[1], env.rank, env.world_size)
    mine = torch.from_numpy(scores[:, part.start : part.stop].copy())
    return rank_targets(mine, part, torch.from_numpy(target), pairs_of(seen), RankExchange(), k=10)


@pytest.mark.parametrize(("world", "items"), [(2, 31), (3, 2)])
def test_ranks_of_parts_equal_brute_force_of_the_whole(world: int, items: int) -> None:
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 9, (40, items)).astype(np.float32)
    target = rng.integers(0, items, 40)
    seen = [set(rng.integers(0, items, 6).tolist()) for _ in target]
    results = run_ranks(ranked_in_parts, world, scores, target, seen)
    for rank, top in results:
        check(scores, target, seen, rank, top, 10)
        assert torch.equal(top, results[0][1])


def refusal(env: DistributedEnv) -> str:
    scores = np.zeros((2, 6), np.float32)
    scores[1, 5] = np.nan  # in the last rank's part only
    try:
        ranked_in_parts(env, scores, np.array([0, 0]), [set(), set()])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_nan_of_one_rank_is_an_error_on_all(world: int) -> None:
    for said in run_ranks(refusal, world):
        assert "scores: NaN" in said


def test_target_is_not_masked_when_it_was_seen_before() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    seen = (torch.tensor([0, 0]), torch.tensor([0, 1]))
    rank, top = rank_targets(scores, range(3), torch.tensor([1]), seen, Alone(), k=3)
    assert rank.tolist() == [1.0]
    assert top.tolist() == [[1, 2, -1]]


def among_in_parts(env: DistributedEnv, scores: np.ndarray, target: np.ndarray, among: np.ndarray) -> list[float]:
    part = catalog_part(scores.shape[1], env.rank, env.world_size)
    mine = torch.from_numpy(scores[:, part.start : part.stop].copy())
    columns = torch.from_numpy(target), torch.from_numpy(among)
    return rank_among(mine, part, *columns, RankExchange()).tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_rank_among_some_items_counts_no_others(world: int) -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 6, (8, 9)).astype(np.float32)  # many are equal
    target, among = rng.integers(0, 9, 8), np.arange(9) % 3 != 1
    expected = []
    for row, item in zip(scores, target, strict=True):
        others = np.delete(row, item)[np.delete(among, item)]
        value = 1 + (others > row[item]).sum() + 0.5 * (others == row[item]).sum()
        expected.append(float(value) if among[item] else np.nan)
    assert np.isnan(expected).any()
    for found in run_ranks(among_in_parts, world, scores, target, among):
        np.testing.assert_array_equal(found, expected)


@given(st.integers(1, 50), st.integers(1, 8))
def test_parts_cover_the_catalog_in_order(items: int, world: int) -> None:
    rows = [row for rank in range(world) for row in catalog_part(items, rank, world)]
    assert rows == list(range(items))


def test_gains_of_mid_ranks() -> None:
    gain = gains(np.array([1.0, 1.5, 10.0, 10.5, 400.0]))
    assert gain["hr@10"].tolist() == [1, 1, 1, 0, 0]
    np.testing.assert_allclose(gain["ndcg@10"], [1, 1 / np.log2(2.5), 1 / np.log2(11), 0, 0])
    np.testing.assert_allclose(gain["mrr"], [1, 1 / 1.5, 0.1, 1 / 10.5, 1 / 400])


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = bootstrap_interval(values)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert (low, high) == bootstrap_interval(values)
    assert bootstrap_interval(np.full(9, 0.25)) == (0.25, 0.25)
    assert np.isnan(bootstrap_interval(np.zeros(0))).all()
