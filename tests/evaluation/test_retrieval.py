"""Evaluation over ranks loses no row and equals brute force: popularity, Markov, and a retriever."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.baselines import MarkovScorer, PopularityScorer
from mufasa_rec.evaluation.ranks import Ranked
from mufasa_rec.models.baselines import Transitions, count_transitions
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config
from torchx_apps import assembly

NUM_ITEMS = 90


def streams_of(dataset: str) -> dict[int, list[int]]:
    """Item rows of every user's events, in order."""
    table = pq.read_table(f"{dataset}/events/base/bucket-00000.parquet", columns=["user", "item"]).to_pydict()
    rows = assembly.open_dataset(small_config(dataset)).catalog.rows_of
    return {user: rows(np.array(items)).tolist() for user, items in zip(table["user"], table["item"], strict=True)}


def baselines(env: DistributedEnv, config: RunConfig) -> list[Ranked]:
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    evaluator = assembly.make_evaluator(config, data, "test", env, exchange)
    loader = assembly.make_loader(config, data, "train", env)
    transitions = Transitions.merge(exchange.objects(count_transitions(loader.batches(0))))
    counts = data.catalog.counts
    return [evaluator.rank(PopularityScorer(counts)), evaluator.rank(MarkovScorer(transitions, counts))]


def unweighted(dataset: str, streams: dict[int, list[int]]) -> set[tuple[int, int]]:
    """Events (user, position) of weight 0, which are no targets and so end no transition."""
    table = pq.read_table(f"{dataset}/events/base/bucket-00000.parquet", columns=["user", "weight"]).to_pydict()
    weights = dict(zip(table["user"], table["weight"], strict=True))
    return {(user, i) for user in streams for i, weight in enumerate(weights[user]) if weight == 0}


def expected_ranks(
    streams: dict[int, list[int]], weightless: set[tuple[int, int]], markov: bool, masked: bool
) -> list[float]:
    """Ranks by loops over users, events and items."""
    count, pairs = Counter(), Counter()
    for user, items in streams.items():
        count.update(items[:-2])
        pairs.update((items[i - 1], items[i]) for i in range(1, len(items) - 2) if (user, i) not in weightless)
    total = sum(count.values()) + 1.0
    ranks = []
    for _, items in sorted(streams.items()):
        target, last = items[-1], items[-2]
        seen = set(items[:-1]) - {target} if masked else set()
        score = [count[i] / total + (pairs[last, i] if markov else 0) for i in range(NUM_ITEMS)]
        shown = [score[i] for i in range(NUM_ITEMS) if i not in seen]
        ranks.append(1 + sum(s > score[target] for s in shown) + (sum(s == score[target] for s in shown) - 1) / 2)
    return ranks


@pytest.mark.parametrize(("world", "masked"), [(1, True), (2, True), (2, False), (3, True)])
def test_popularity_and_markov_equal_brute_force(dataset: str, world: int, masked: bool) -> None:
    config = small_config(dataset)
    # Three ranks share seven readers of a window that holds every training event, so all transitions count.
    data = replace(config.data, num_readers=7, batch_size=28, max_history=300, target_actions=None)
    config = replace(config, data=data, mask_seen=masked)
    streams = streams_of(dataset)
    weightless = unweighted(dataset, streams)
    for popularity, markov in run_ranks(baselines, world, config):
        assert popularity.user.tolist() == markov.user.tolist() == sorted(streams)
        assert popularity.target_row.tolist() == [streams[user][-1] for user in sorted(streams)]
        assert popularity.history_length.tolist() == [len(streams[user]) - 1 for user in sorted(streams)]
        assert popularity.rank.tolist() == expected_ranks(streams, weightless, False, masked)
        assert markov.rank.tolist() == expected_ranks(streams, weightless, True, masked)


def retrieved(env: DistributedEnv, config: RunConfig) -> tuple[Ranked, np.ndarray, np.ndarray]:
    """Rank with an untrained retriever; also this rank's item vectors and its readers' user vectors."""
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), env.device)
    model.eval()
    evaluator = assembly.make_evaluator(config, data, "test", env, exchange)
    scorer = assembly.make_scorer(config, data, model, env, exchange)
    scorer.chunk_items = 20
    ranked = evaluator.rank(scorer)
    users = [scorer.user_vectors(batch)[: batch.num_rows] for batch in evaluator.loader.batches(0)]
    ids = [batch.user[: batch.num_rows] for batch in evaluator.loader.batches(0)]
    order = torch.cat(ids).numpy().argsort() if env.world_size == 1 else np.zeros(0, np.int64)
    return ranked, scorer.items.numpy(), torch.cat(users).numpy()[order]


def test_retriever_ranks_by_its_vectors_alike_on_one_and_two_ranks(dataset: str) -> None:
    config = small_config(dataset)
    config = replace(config, mask_seen=True)
    ((alone, items, users),) = run_ranks(retrieved, 1, config)
    assert items.shape == (NUM_ITEMS, 16)
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1.0, rtol=1e-5)
    streams = streams_of(dataset)
    scores = users.astype(np.float64) @ items.T.astype(np.float64)
    for place, user in enumerate(alone.user.tolist()):
        target = streams[user][-1]
        seen = set(streams[user][:-1]) - {target}
        better = sum(scores[place, i] > scores[place, target] for i in range(NUM_ITEMS) if i not in seen)
        assert abs(alone.rank[place] - 1 - better) <= 1  # fp32 against float64: neighbours may swap
    shares = run_ranks(retrieved, 2, config)
    np.testing.assert_allclose(np.concatenate([part[1] for part in shares]), items, atol=1e-6)
    for ranked, _, _ in shares:
        assert ranked.user.tolist() == alone.user.tolist()
        assert np.mean(ranked.rank == alone.rank) > 0.97


def test_evaluation_with_ranks_that_have_no_rows_loses_none(dataset: str) -> None:
    """Ten ranks' worth of readers on three ranks: 120 users over 1,000 readers leave most readers empty."""
    config = small_config(dataset)
    config = replace(config, data=replace(config.data, num_readers=1000, batch_size=1000))
    for popularity, _ in run_ranks(baselines, 3, config):
        assert popularity.user.tolist() == list(range(1, 121))
