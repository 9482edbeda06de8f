"""Generated impressions: the oracle is calibrated and knows most, and what is planted is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mufasa_rec.data.synthetic_clicks import Clicks, auc, generate_clicks
from mufasa_rec.data.synthetic_clicks_config import MODALITIES, ClicksConfig

SMALL = ClicksConfig(num_users=400, num_items=1500, requests=12)


@pytest.fixture(scope="module")
def clicks() -> Clicks:
    return generate_clicks(0, SMALL)


def test_one_seed_gives_the_same_impressions_and_another_gives_others(clicks: Clicks) -> None:
    again, other = generate_clicks(0, SMALL), generate_clicks(1, SMALL)
    np.testing.assert_array_equal(again.item, clicks.item)
    np.testing.assert_array_equal(again.probability, clicks.probability)
    assert (other.item != clicks.item).any()


def test_clicks_happen_as_often_as_the_oracle_says(clicks: Clicks) -> None:
    for low, high in ((0.0, 0.15), (0.15, 0.5), (0.5, 1.0)):
        inside = (clicks.probability >= low) & (clicks.probability < high)
        told, found = clicks.probability[inside].mean(), clicks.clicked[inside].mean()
        assert abs(told - found) < 4 * np.sqrt(told * (1 - told) / inside.sum())
    assert clicks.oracle_auc() > 0.75


def test_a_click_follows_its_page_and_precedes_the_users_next_one(clicks: Clicks) -> None:
    key = {(u, i, t) for u, i, t in zip(clicks.user, clicks.item, clicks.timestamp)}
    pages = {u: np.unique(clicks.timestamp[clicks.user == u]) for u in (1, 2, 3)}
    assert len(key) <= len(clicks.user)
    for user, times in pages.items():
        later = clicks.click_timestamp[(clicks.click_user == user) & (clicks.click_timestamp >= SMALL.start_ms)]
        page = times[np.searchsorted(times, later) - 1]
        assert (later > page).all() and (later - page < 30_000).all() and (np.diff(times) >= 60_000).all()


def test_cold_items_are_shown_in_the_test_part_only(clicks: Clicks) -> None:
    cold = clicks.item_id[clicks.available_from == clicks.test_from]
    assert len(cold) == SMALL.num_items * SMALL.cold_share
    shown = np.isin(clicks.item, cold)
    assert shown.any() and (clicks.timestamp[shown] >= clicks.test_from).all()
    assert not np.isin(clicks.click_item[clicks.click_timestamp < clicks.test_from], cold).any()


def test_click_depends_on_the_modality_that_the_surface_names(clicks: Clicks) -> None:
    """Among candidates close to many recent clicks in titles alone, search clicks far more often than gallery."""
    share = {name: _recent_share(clicks, name) for name in MODALITIES}
    for near, far, surface in (("title", "image", 0), ("image", "title", 1)):
        supported = (share[near] > 0.08) & (share[near] < 0.3) & (share[far] < 0.02)
        rates = [clicks.clicked[supported & (clicks.surface == s)].mean() for s in (0, 1)]
        assert rates[surface] > 2 * rates[1 - surface]


def _recent_share(clicks: Clicks, modality: str) -> np.ndarray:
    """Share of the user's recent clicks that are close to each candidate in a modality."""
    ids, vectors = clicks.vectors[modality]
    table = np.zeros((len(clicks.item_id) + 1, vectors.shape[1]), np.float32)
    table[ids] = vectors
    found = np.zeros(len(clicks.item))
    for user in np.unique(clicks.user):
        mine, past = np.flatnonzero(clicks.user == user), clicks.click_user == user
        age = clicks.timestamp[mine][:, None] - clicks.click_timestamp[past][None]
        recent = (age > 0) & (age <= SMALL.recent_days * 86_400_000)
        close = table[clicks.item[mine]] @ table[clicks.click_item[past]].T > SMALL.close
        found[mine] = (close & recent).sum(1) / np.maximum(recent.sum(1), 1)
    return found


def test_auc_counts_ties_half() -> None:
    assert auc(np.array([1.0, 1.0]), np.array([0, 1])) == 0.5
    assert auc(np.array([0.0, 2.0, 1.0]), np.array([0, 1, 1])) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_clicks": (5, 2)}, "early_clicks=.*least <= most"),
        ({"related": 1.0}, "related=1.0: choose"),
        ({"old_weight": 0.0}, "old_weight=0.0: choose above 0"),
        ({"num_items": 100}, "num_items=100: too few"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
