"""The table of ranker variants: means over seeds, paired intervals, and rows for items that training hardly showed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mufasa_rec.evaluation.auc import area
from mufasa_rec.evaluation.ranking_grid import RankingCell, figures, ranking_markdown
from mufasa_rec.evaluation.scored import Scored


def cell(skill: float, seed: int, seconds: float = 60.0) -> RankingCell:
    """Scores that follow the labels of 600 impressions of 60 users by `skill`."""
    truth = np.random.default_rng(0)
    label = (truth.random(600) < 0.3).astype(np.uint8)
    logit = (skill * label + np.random.default_rng(seed + 1).normal(size=600) - 1).astype(np.float32)
    scored = Scored(np.arange(600), np.arange(600) // 10, logit, label)
    return RankingCell({"click": scored}, np.arange(600) % 8, seconds)


def test_figures_of_a_constant_score_are_those_of_chance() -> None:
    label = np.array([0, 1, 0, 1], np.uint8)
    rate = np.log(1.0)
    told = figures(Scored(np.arange(4), np.array([1, 1, 2, 2]), np.full(4, rate, np.float32), label))
    assert told["auc"] == told["gauc"] == 0.5 and told["ne"] == pytest.approx(1.0)
    alone = figures(Scored(np.arange(2), np.array([1, 2]), np.zeros(2, np.float32), np.array([0, 1], np.uint8)))
    assert math.isnan(alone["gauc"]) and alone["auc"] == 0.5


def test_better_variant_stands_above_the_rule_with_an_interval() -> None:
    text = ranking_markdown({"dmae": {s: cell(1.5, s) for s in (0, 1)}, "din": {0: cell(0.2, 0)}, "none": {}}, "din")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| d")]
    assert [row[0] for row in rows] == ["| dmae", "| din"] * 3  # all, at most five, none
    mean = np.mean([area(c.scored["click"].logit, c.scored["click"].label) for c in (cell(1.5, 0), cell(1.5, 1))])
    assert rows[0][1:3] == ["2", f"{mean:.4f}"]
    low = float(rows[0][6].split("[")[1].split(",")[0])
    assert low > 0.1 and rows[1][6] == "–"
    assert "click, items without a training impression (75)" in text


def test_no_cells_make_no_table() -> None:
    assert ranking_markdown({"dmae": {}}, "dmae") == ""
