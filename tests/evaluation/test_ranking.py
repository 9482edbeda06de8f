"""Metrics of a ranker: equal to scikit-learn's while exact, within their own bound beyond, the same on any ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_auroc
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.auc import area, area_of_counts, areas_of_groups, error_bound
from mufasa_rec.evaluation.ranking import RankingMetrics, RankingMetricsConfig
from mufasa_rec.evaluation.ranking_figures import corrected_logits, impression_slices, probabilities
from mufasa_rec.evaluation.ranking_intervals import interval, paired_interval
from mufasa_rec.evaluation.scored import Scored
from tests.helpers.ranks import run_ranks

Columns = dict[str, np.ndarray]


def make_columns(n: int = 3000, users: int = 200, seed: int = 0, decimals: int = 2) -> Columns:
    """Impressions with ties, users of one class, and probabilities that mean something."""
    rng = np.random.default_rng(seed)
    logit = np.round(rng.normal(-1.0, 1.5, n), decimals).astype(np.float32)
    label = (rng.random(n) < probabilities(logit)).astype(np.int64)
    user = rng.integers(0, users, n) * 1_000_003 - 5
    label[user == user[0]] = 1
    return {"logit": logit, "label": label, "user": user, "row": rng.permutation(n) + 7}


def metrics_of(columns: Columns, *, batches: int = 7, **config: Any) -> RankingMetrics:
    metrics = RankingMetrics(slices=("odd",), config=RankingMetricsConfig(**config))
    for part in np.array_split(np.arange(len(columns["row"])), batches):
        taken = {name: values[part] for name, values in columns.items()}
        metrics.add(**taken, slices={"odd": taken["row"] % 2 == 1})
    return metrics


def gauc_of(columns: Columns) -> float:
    """As it is written down, with scikit-learn's area for each user."""
    total, weight = 0.0, 0
    for user in np.unique(columns["user"]):
        mine = columns["user"] == user
        label = columns["label"][mine]
        if 0 < label.sum() < len(label):
            total += roc_auc_score(label, columns["logit"][mine]) * len(label)
            weight += len(label)
    return total / weight


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
def test_exact_area_is_that_of_scikit_learn(rows: list[tuple[int, bool, int]]) -> None:
    score, label, weight = (np.array(column) for column in zip(*rows, strict=True))
    if not 0 < label.sum() < len(label):
        assert np.isnan(area(score, label))
        return
    assert area(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    times = np.repeat(np.arange(len(score)), weight)
    again = area(score[times], label[times])
    assert area(score, label, weight) == pytest.approx(again, abs=1e-12, nan_ok=True)


def test_exact_metrics_are_those_of_scikit_learn_torchmetrics_and_torchrec() -> None:
    columns = make_columns()
    found = metrics_of(columns).compute()
    logit, label = columns["logit"], columns["label"]
    assert found.overall.auc == pytest.approx(roc_auc_score(label, logit), abs=1e-12)
    theirs = binary_auroc(torch.sigmoid(torch.from_numpy(logit).double()), torch.from_numpy(label))
    assert found.overall.auc == pytest.approx(float(theirs), abs=1e-6)
    assert found.overall.gauc == pytest.approx(gauc_of(columns), abs=1e-12)
    assert found.overall.auc_error == 0.0
    assert found.overall.logloss == pytest.approx(log_loss(label, probabilities(logit)), rel=1e-9)
    assert (found.overall.impressions, found.overall.clicks) == (3000, int(label.sum()))
    assert found.overall.calibration == pytest.approx(probabilities(logit).sum() / label.sum())
    y, p, ones = (torch.tensor(x, dtype=torch.float64) for x in (label, probabilities(logit), np.ones(3000)))
    entropy = compute_cross_entropy(y, p, ones, eta=1e-12).sum()
    ne = compute_ne(entropy, ones.sum(), y.sum(), (1 - y).sum(), eta=1e-12)
    assert found.overall.ne == pytest.approx(float(ne), rel=1e-9)
    odd = {name: values[columns["row"] % 2 == 1] for name, values in columns.items()}
    assert found.slices["odd"].auc == pytest.approx(roc_auc_score(odd["label"], odd["logit"]), abs=1e-12)
    assert found.slices["odd"].gauc == pytest.approx(gauc_of(odd), abs=1e-12)


def test_order_and_batches_change_nothing() -> None:
    columns = make_columns()
    shuffled = np.random.default_rng(1).permutation(3000)
    one = metrics_of(columns, batches=1).compute()
    other = metrics_of({name: values[shuffled] for name, values in columns.items()}, batches=11).compute()
    assert asdict(one.overall) == pytest.approx(asdict(other.overall), rel=1e-12)
    assert one.scored is not None
    assert other.scored is not None
    assert all(np.array_equal(getattr(one.scored, name), getattr(other.scored, name)) for name in columns)


@pytest.mark.parametrize("budget", [0, 1000])
@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["spread", "concentrated"])
def test_beyond_the_budget_area_is_within_its_bound_and_a_ten_thousandth(
    budget: int, spread: float, tmp_path: Path
) -> None:
    columns = make_columns(40_000, decimals=6)
    columns["logit"] = (columns["logit"] * spread).astype(np.float32)
    exact = metrics_of(columns).compute()
    binned = metrics_of(columns, budget_rows=budget, folder=str(tmp_path)).compute()
    assert binned.scored is None
    for name in ("overall", "odd"):
        one, other = (x.overall if name == "overall" else x.slices[name] for x in (exact, binned))
        assert 0 < other.auc_error < 1e-4
        assert abs(other.auc - one.auc) <= other.auc_error + 1e-12
        assert other.gauc == pytest.approx(one.gauc, abs=1e-12)
        assert asdict(other) | {"auc": 0, "auc_error": 0} == pytest.approx(
            asdict(one) | {"auc": 0, "auc_error": 0}, rel=1e-9
        )


def test_counted_area_is_wrong_by_no_more_than_its_bound() -> None:
    """All pairs of a bin are in the right order, of which the count says half."""
    positive, negative = np.array([0.0, 2.0, 3.0]), np.array([4.0, 2.0, 1.0])
    middle, error = area_of_counts(positive, negative), error_bound(positive, negative)
    score = np.array([0, 0, 0, 0, 1.1, 1.1, 1.2, 1.2, 2.1, 2.2, 2.2, 2.2])
    label = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1])
    assert area(score, label) == pytest.approx(middle + error)


BUDGETS = (10_000, 700)  # enough, and enough for all but not for the share of a rank


def part_metrics(env: DistributedEnv, folder: str) -> list[Any]:
    columns, found = make_columns(600), []
    mine = (np.arange(600) % 3 == 0) == (env.rank == 0)
    for budget in BUDGETS:
        metrics = RankingMetrics(RankExchange(), ("odd",), RankingMetricsConfig(budget_rows=budget, folder=folder))
        taken = {name: values[mine] for name, values in columns.items()}
        metrics.add(**taken, slices={"odd": taken["row"] % 2 == 1})
        result = metrics.compute()
        rows = [] if result.scored is None else result.scored.row.tolist()
        found.append((asdict(result.overall), asdict(result.slices["odd"]), rows))
    return found


def test_every_rank_has_the_metrics_of_all(tmp_path: Path) -> None:
    columns = make_columns(600)
    exact = metrics_of(columns).compute()
    for told in run_ranks(part_metrics, 2, str(tmp_path)):
        for (overall, odd, rows), tolerance in zip(told, (1e-12, 1e-5), strict=True):
            for mine, expected in ((overall, asdict(exact.overall)), (odd, asdict(exact.slices["odd"]))):
                assert mine == pytest.approx(expected | {"auc_error": mine["auc_error"]}, rel=tolerance)
            assert rows == (sorted(columns["row"].tolist()) if tolerance == 1e-12 else [])
    assert not list(tmp_path.iterdir())


def test_nothing_and_one_class_are_not_told() -> None:
    metrics = RankingMetrics()
    nothing = metrics.compute().overall
    assert nothing.impressions == 0
    assert all(np.isnan(x) for x in (nothing.auc, nothing.gauc, nothing.logloss, nothing.ne, nothing.calibration))
    metrics.add(logit=torch.zeros(2), label=torch.zeros(2), user=torch.arange(2), row=torch.arange(2))
    one = metrics.compute().overall
    assert np.isnan([one.auc, one.gauc, one.ne, one.calibration]).all()
    assert one.logloss == pytest.approx(np.log(2))


def test_perfect_and_constant_rankers() -> None:
    label = np.array([0, 1] * 50)
    columns = {"user": np.arange(100) // 10, "row": np.arange(100), "label": label}
    perfect = metrics_of({**columns, "logit": 40.0 * label - 20.0}).compute().overall
    constant = metrics_of({**columns, "logit": np.zeros(100)}).compute().overall
    assert (perfect.auc, perfect.gauc) == (1.0, 1.0)
    assert perfect.ne == pytest.approx(0.0, abs=1e-6)
    assert (constant.auc, constant.gauc) == (0.5, 0.5)
    assert constant.ne == pytest.approx(1.0)
    assert constant.calibration == pytest.approx(1.0)


def test_bad_input_is_refused_by_name() -> None:
    good: dict[str, Any] = {name: values[:3] for name, values in make_columns().items()}
    metrics = RankingMetrics()
    with pytest.raises(ValueError, match="label: 4; metrics want 0 or 1"):
        metrics.add(**(good | {"label": np.array([0, 4, 1])}))
    with pytest.raises(ValueError, match="logit: NaN"):
        metrics.add(**(good | {"logit": np.array([0, np.nan, 1])}))
    with pytest.raises(ValueError, match=r"user: shape \(2,\) beside \(3,\) logits"):
        metrics.add(**(good | {"user": good["user"][:2]}))
    with pytest.raises(ValueError, match=r"slices: \['new'\], but the metrics were made for \[\]"):
        metrics.add(**good, slices={"new": np.ones(3, bool)})
    with pytest.raises(ValueError, match="slices: 40; metrics are kept for 31 at most"):
        RankingMetrics(slices=[str(i) for i in range(40)])
    with pytest.raises(ValueError, match="budget_rows=-1: choose 0 or more"):
        RankingMetricsConfig(budget_rows=-1)
    with pytest.raises(ValueError, match="num_bins=1: choose 2 or more"):
        RankingMetricsConfig(num_bins=1)


def test_correction_of_down_sampling_calibrates() -> None:
    """Of a stream with 2 % clicks a tenth of the negatives was kept: the best constant there is about 17 %."""
    rate, kept = 0.02, 0.1
    sampled = rate / (rate + (1 - rate) * kept)
    trained = np.full(5000, np.log(sampled / (1 - sampled)))
    label = (np.arange(5000) % 50 == 0).astype(int)
    columns = {"user": np.arange(5000) % 7, "row": np.arange(5000), "label": label}
    off = metrics_of({**columns, "logit": trained}).compute().overall
    on = metrics_of({**columns, "logit": corrected_logits(trained, kept)}).compute().overall
    assert off.calibration > 8
    assert off.ne > 1.3
    assert on.calibration == pytest.approx(1.0, rel=1e-5)
    assert on.ne == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(ValueError, match=r"negative_rate=0\.0: choose above 0"):
        corrected_logits(trained, 0.0)


def test_slices_divide_the_impressions() -> None:
    count, length = np.array([0, 3, 9]), np.array([0, 30, 70])
    masks = impression_slices(count, length, {"title": np.array([1, 0, 1])})
    assert masks["new item"].tolist() == [True, False, False]
    assert masks["item with ≤ 5 training impressions"].tolist() == [True, True, False]
    history = [mask for name, mask in masks.items() if "history" in name]
    assert (np.sum(history, axis=0) == 1).all()
    assert (masks["item has title"] ^ masks["item without title"]).all()


def scored_of(columns: Columns) -> Scored:
    scored = metrics_of(columns).compute().scored
    assert scored is not None
    return scored


def test_paired_interval_finds_a_difference_that_single_ones_hide() -> None:
    columns = make_columns(4000, users=400)
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.5, 4000)
    worse = scored_of({**columns, "logit": (columns["logit"] + noise).astype(np.float32)})
    better = scored_of(columns)
    for metric, sign in (("auc", 1), ("gauc", 1), ("logloss", -1)):
        pair = paired_interval([better], [worse], metric, samples=200)
        one, other = (interval([x], metric, samples=200) for x in (better, worse))
        assert pair.value == pytest.approx(one.value - other.value)
        assert sign * pair.value > 0
        assert min(sign * pair.low, sign * pair.high) > 0
        assert one.low < other.high if sign > 0 else other.low < one.high  # they overlap
    exact = metrics_of(columns).compute().overall
    for metric in ("auc", "gauc", "logloss"):
        assert interval([better], metric, samples=2).value == pytest.approx(getattr(exact, metric))
    same = paired_interval([better, worse], [worse, better], "auc", samples=50)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_interval_covers_the_truth_of_independent_users() -> None:
    """Users with one pair each, in the right order with probability 0.7: GAUC's interval holds 0.7 nearly always."""
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        right = rng.random(300) < 0.7
        logit = np.stack([np.zeros(300), np.where(right, 1.0, -1.0)], axis=1).reshape(-1)
        user, row = np.repeat(np.arange(300), 2), np.arange(600)
        found = interval([Scored(row, user, logit, np.tile([0, 1], 300))], "gauc", samples=200)
        hits += found.low <= 0.7 <= found.high
    assert hits >= 34


def test_scores_of_other_impressions_are_not_compared() -> None:
    one, other = scored_of(make_columns(100)), scored_of(make_columns(100, seed=1))
    with pytest.raises(ValueError, match="scores: of other impressions"):
        paired_interval([one], [other], "auc")
    with pytest.raises(ValueError, match="models: none"):
        paired_interval([], [one], "auc")


def test_areas_of_groups_leave_single_class_users_out() -> None:
    columns = make_columns()
    users, _, sizes = areas_of_groups(columns["user"], columns["logit"], columns["label"])
    assert columns["user"][0] not in users
    assert sizes.sum() < 3000
    assert [len(x) for x in areas_of_groups(*(np.zeros(0) for _ in range(3)))] == [0, 0, 0]
