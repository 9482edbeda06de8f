"""What is measured of a fusion space means what its name says, and the page shows it without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mufasa_rec.evaluation import fusion_measures as measures
from mufasa_rec.evaluation.fusion_report import write_fusion_report

PAIRS = np.array([[0, 1], [2, 3], [4, 5]])


def test_alignment_is_the_mean_squared_distance_on_the_sphere() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = x / x.norm(dim=1, keepdim=True)
    expected = np.mean([float(((unit[a] - unit[b]) ** 2).sum()) for a, b in PAIRS])
    assert measures.alignment(x, PAIRS) == pytest.approx(expected, abs=1e-5)
    assert measures.alignment(7 * x, PAIRS) == measures.alignment(x, PAIRS)
    assert measures.alignment(x, PAIRS[:0]) is None


def test_uniformity_rises_when_a_space_shrinks_to_a_point() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    point = 0.01 * x + torch.ones(8)
    assert measures.uniformity(x, PAIRS) < -1 < measures.uniformity(point, PAIRS) <= 0


def test_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(500, 3, generator=generator) @ torch.linalg.qr(torch.randn(10, 10, generator=generator))[0][:3]
    assert measures.effective_rank(flat) == pytest.approx(3.0, abs=0.1)
    assert measures.effective_rank(torch.ones(5, 4)) == 0.0
    assert measures.spectrum(flat).sum() == pytest.approx(1.0)


def test_rank_correlation_is_of_ranks_and_ties_share_theirs() -> None:
    a = np.array([1.0, 2.0, 2.0, 5.0])
    assert measures.rank_correlation(a, np.exp(a)) == 1.0
    assert measures.rank_correlation(a, -a) == -1.0
    assert measures.rank_correlation(a, np.ones(4)) == 0.0


def test_neighbours_are_the_closest_others() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.3]])
    place, cosine = measures.nearest(x, np.array([0, 2]), 2)
    assert place.tolist() == [[1, 3], [3, 1]]
    assert (np.diff(cosine, axis=1) <= 0).all()


def test_bins_follow_the_fused_cosines() -> None:
    titles = np.linspace(-0.2, 1.0, 2000)
    bins = measures.structure_bins(titles, titles**3)
    assert bins["median"] == sorted(bins["median"])
    assert all(low <= mid <= high for low, mid, high in zip(bins["low"], bins["median"], bins["high"], strict=True))


def test_what_turns_moves() -> None:
    z = torch.eye(2)
    moved = measures.movement(z, torch.stack([z[0], -z[1]]))
    assert (moved["items"], moved["mean"]) == (2, pytest.approx(1.0))
    assert measures.movement(z[:0], z[:0])["mean"] is None


def fake_report() -> dict[str, Any]:
    item = {"title": "A <b>Storm</b> & more", "genres": ["Drama"]}
    return {
        "dataset": "shop",
        "split": "leave_one_out@0123456789abcdef",
        "items": {"catalog": 100, "with_title": 90, "measured": 90, "whole": True},
        "anchor": "title",
        "modalities": {"title": 8, "image": 4},
        "width": 16,
        "weights": {"semantic": 1.0, "collaborative": 0.0},
        "best": {"loss": 1.5, "step": 30},
        "steps": 40,
        "seconds": 12.0,
        "pairs": {"random items": 50},
        "alignment": {"random items": {"fused": 1.9, "title": None}},
        "uniformity": {"fused": -2.0, "title": -1.0},
        "effective_rank": {"fused": 9.5, "title": 4.0},
        "spectrum": {"fused": [0.5, 0.3, 0.2], "title": [0.9, 0.1]},
        "structure_correlation": 0.8,
        "structure": {"title": [0.1, 0.5], "low": [0.0, 0.2], "median": [0.1, 0.4], "high": [0.2, 0.6]},
        "movement": {
            "image": {"items": 5, "mean": 0.25, "low": 0.1, "high": 0.4},
            "title": {"items": 0, "mean": None, "low": None, "high": None},
        },
        "neighbours": [{"item": item, "events": 0, "fused": [item], "title": []}],
    }


def write(tmp_path: Path, report: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    (tmp_path / "report.json").write_text(json.dumps(report))
    if lines:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_fusion_report(tmp_path / "report.json", tmp_path / "metrics.jsonl", tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_page_shows_terms_neighbours_and_movement_and_loads_nothing(tmp_path: Path) -> None:
    lines = [
        {"kind": kind, "step": step, "loss": 2.0 / step, "semantic": 1.0 / step, "structure/fused": 0.5, "positives": 1}
        for step in (10, 20)
        for kind in ("train", "validation")
    ]
    page = write(tmp_path, fake_report(), lines)
    for text in (
        "A &lt;b&gt;Storm&lt;/b&gt; &amp; more",
        "(i) across genres",
        "without image",
        "collaborative</dt><dd>off",
    ):
        assert text in page
    assert "without title" not in page
    assert page.count("<svg") == 3 + 3  # of the space, and of three terms
    assert "positives over training" not in page
    assert not re.search(r"(?:src|href)=\"http|<script|@import", page)


def test_page_of_a_run_without_curves_or_titles_still_says_what_there_is(tmp_path: Path) -> None:
    report = {name: value for name, value in fake_report().items() if name not in ("alignment", "structure")}
    for name in ("spectrum", "movement", "neighbours"):
        del report[name]
    page = write(tmp_path, report, [])
    assert "<h1>shop</h1>" in page
    assert "<svg" not in page
