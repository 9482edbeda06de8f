"""The generated catalog: its oracle is calibrated, and what is planted is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mufasa_rec.data.synthetic import RETURNS, SCATTERED, SyntheticConfig, _Users, _World, generate

SMALL_RETURNS = replace(RETURNS, num_users=600, mean_events=100)
SMALL_SCATTERED = replace(SCATTERED, num_users=600)


def topics_per_user(config: SyntheticConfig) -> list[np.ndarray]:
    """Topics of each user's events in order."""
    catalog = generate(0, config)
    starts = np.flatnonzero(np.r_[True, catalog.user[1:] != catalog.user[:-1]])
    return np.split((catalog.item - 1) // config.items_per_topic, starts[1:])


@pytest.mark.parametrize(
    "config", [SyntheticConfig(num_users=600), SMALL_RETURNS, SMALL_SCATTERED], ids=["demo", "returns", "scattered"]
)
def test_oracle_hits_as_often_as_it_says(config: SyntheticConfig) -> None:
    rng = np.random.default_rng(0)
    users, everyone = _Users(config, _World(config, rng), rng), np.arange(config.num_users)
    told, hits = [], []
    for _ in range(40):
        users.advance(everyone, released=False)
    for _ in range(20):
        chance = users.next_distribution(everyone)
        np.testing.assert_allclose(chance.sum(axis=1), 1.0, atol=1e-9)
        best = np.argsort(-chance, axis=1)[:, :3]
        told.append(np.take_along_axis(chance, best, axis=1).sum(axis=1).mean())
        item = users.advance(everyone, released=True)
        hits.append((best == item[:, None]).any(axis=1).mean())
    assert abs(np.mean(told) - np.mean(hits)) < 0.015


def test_returning_genre_comes_back_after_more_events_than_a_window_holds() -> None:
    far = same_genre = events = 0
    for topics in topics_per_user(SMALL_RETURNS):
        genre = topics // SMALL_RETURNS.topics_per_genre
        same_genre += int((genre[1:] == genre[:-1]).sum())
        for place in range(60, len(topics)):
            before = np.flatnonzero(topics[:place] == topics[place])
            far += int(len(before) > 0 and place - before[-1] > 32)
            events += 1
    assert far > 0.1 * events
    assert same_genre > 0.85 * sum(len(topics) - 1 for topics in topics_per_user(SMALL_RETURNS))


def test_scattered_topics_were_mostly_left_longer_ago_than_a_short_window() -> None:
    known, near, last = [], [], []
    for topics in topics_per_user(SMALL_SCATTERED):
        visited = np.unique(topics[:-1])
        known.append(topics[-1] in visited)
        near.append(topics[-1] in topics[-8:-1])
        last.append(np.mean(np.isin(visited, topics[-8:-1])))
    assert np.mean(known) > 0.8
    assert np.mean(near) < 0.6
    assert np.mean(last) < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drift": 0.1}, "drift=0.1: choose 0 when"),
        ({"topics_per_session_genre": 3}, "topics_per_session_genre=3: choose active_topics=4 to"),
        ({"repertoire": 41}, "repertoire=41: choose topics_per_session_genre=4 times at most"),
        ({"repertoire": 44}, "repertoire=44: choose topics_per_session_genre=4 times at most"),
    ],
)
def test_returns_that_cannot_be_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RETURNS, **change)
