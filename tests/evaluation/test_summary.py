"""Summaries: means, slices, coverage, paired differences, histograms."""

from __future__ import annotations

import numpy as np
import pytest

from mufasa_rec.evaluation.ranks import Ranked
from mufasa_rec.evaluation.summary import histograms, paired, slices_of, summarise


class Catalog:
    """Four items: unknown to training, rare, at the border, popular."""

    counts = np.array([0, 5, 6, 100])

    def __len__(self) -> int:
        return 4


RANKED = Ranked(
    user=np.array([1, 2, 3, 4]),
    target_row=np.array([0, 1, 2, 3]),
    rank=np.array([1.0, 20.0, 2.0, 10.5]),
    top=np.array([[0, 1], [1, 3], [3, 1], [3, -1]]),
    history_length=np.array([49, 50, 199, 200]),
    cold_rank=np.array([11.0, np.nan, np.nan, np.nan]),
)
STORES = {"title": np.array([3, -1, 0, 1])}


def test_slices_hold_the_users_they_name() -> None:
    slices = {name: mask.tolist() for name, mask in slices_of(RANKED, Catalog(), STORES).items()}  # type: ignore[arg-type]
    assert slices == {
        "≤ 5 training events": [True, True, False, False],
        "no training event": [True, False, False, False],
        "history under 50": [True, False, False, False],
        "history 50 to 199": [False, True, True, False],
        "history of 200 and more": [False, False, False, True],
        "target has title": [True, False, True, True],
        "target without title": [False, True, False, False],
    }


def test_row_of_the_table_has_means_intervals_coverage_and_slices() -> None:
    row = summarise("model", RANKED, Catalog(), STORES, 1.5)  # type: ignore[arg-type]
    ndcg = [1.0, 0.0, 1 / np.log2(3), 0.0]
    assert row["row"] == "model"
    assert row["hr@10"] == 0.5
    assert (row["cold_hr@10"], row["cold_among_hr@10"]) == (1.0, 0.0)
    assert row["ndcg@10"] == pytest.approx(np.mean(ndcg))
    assert row["mrr"] == pytest.approx(np.mean([1, 1 / 20, 1 / 2, 1 / 10.5]))
    assert row["coverage"] == 0.75
    assert (row["few_hr@10"], row["cold_hr@10"]) == (0.5, 1.0)
    assert (row["users"], row["seconds"]) == (4, 1.5)
    assert row["ndcg@10_low"] <= row["ndcg@10"] <= row["ndcg@10_high"]
    assert row["slices"]["history 50 to 199"] == {"users": 2, "hr@10": 0.5, "ndcg@10": pytest.approx(0.5 * ndcg[2])}


def test_slice_without_users_is_left_out_and_its_headline_is_null() -> None:
    popular = Ranked(*(getattr(RANKED, name)[3:] for name in Ranked.__dataclass_fields__))
    row = summarise("model", popular, Catalog(), {}, 0.0)  # type: ignore[arg-type]
    assert row["cold_hr@10"] is None
    assert list(row["slices"]) == ["history of 200 and more"]


def test_paired_difference_is_over_the_same_users() -> None:
    worse = Ranked(RANKED.user, RANKED.target_row, RANKED.rank + 1, RANKED.top, RANKED.history_length)
    found = paired("a - b", RANKED, worse)
    assert found["low"] <= found["ndcg@10_difference"] <= found["high"]
    assert found["ndcg@10_difference"] == pytest.approx((1 - 1 / np.log2(3) + 1 / np.log2(3) - 0.5) / 4)
    other = Ranked(RANKED.user[::-1], RANKED.target_row, RANKED.rank, RANKED.top, RANKED.history_length)
    with pytest.raises(ValueError, match="a - b: the two rows rank different users or targets"):
        paired("a - b", RANKED, other)


def test_parts_are_joined_by_user_whoever_evaluated_them() -> None:
    parts = [
        Ranked(*(getattr(RANKED, name)[rows] for name in Ranked.__dataclass_fields__)) for rows in ([3, 1], [2, 0])
    ]
    joined = Ranked.concatenate(parts)
    for name in Ranked.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(joined, name), getattr(RANKED, name))


def test_histograms_count_everything_once() -> None:
    found = histograms(RANKED, np.array([0, 0, 1, 2, 3, 4, 8]))
    assert found["item_popularity"] == {"edges": [0, 1, 2, 4, 8, 16], "counts": [2, 1, 2, 1, 1]}
    assert sum(found["history_length"]["counts"]) == 4
    assert histograms(RANKED, np.zeros(3, np.int64))["item_popularity"] == {"edges": [0, 1, 2], "counts": [3, 0]}
