"""The report is one page that stands alone, shows what was measured, and survives what was not."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mufasa_rec.evaluation.report import write_report

ROWS = {
    "popularity": (0.0392, 0.0193, 0.0201),
    "markov": (0.1917, 0.1121, 0.0994),
    "model": (0.3013, 0.1702, 0.1496),
    "model_without_content": (0.2874, 0.1611, 0.1420),
    "oracle": (0.3741, 0.2178, 0.1903),
}
SLICES = {"few_training_events": (412, 0.45), "has_title": (6010, 1.0), "has_poster": (5102, 1.04), "cold": (58, 0.1)}


def fake_row(name: str) -> dict[str, Any]:
    """A row of `evaluation.json`."""
    hit, gain, reciprocal = ROWS[name]
    slices = {
        part: {"users": users, "hr@10": hit * factor, "ndcg@10": gain * factor}
        for part, (users, factor) in SLICES.items()
    }
    return {
        "row": name,
        "hr@10": hit,
        "hr@10_low": hit - 0.011,
        "hr@10_high": hit + 0.011,
        "ndcg@10": gain,
        "ndcg@10_low": gain - 0.006,
        "ndcg@10_high": gain + 0.006,
        "mrr": reciprocal,
        "coverage": min(1.0, 2.2 * hit),
        "cold_hr@10": 0.0862 if name in ("model", "oracle") else 0.0,
        "few_hr@10": 0.4 * hit,
        "users": 6040,
        "seconds": 200 * hit**2,
        "slices": slices,
    }


def fake_evaluation(names: tuple[str, ...] = tuple(ROWS)) -> dict[str, Any]:
    """An `evaluation.json` as evaluate writes it."""
    edges = [0, *np.unique(np.geomspace(5, 2400, 24).astype(int)).tolist()]
    bell = np.exp(-(np.linspace(-2, 3, len(edges) - 1) ** 2))
    return {
        "dataset": {
            "name": "ml-1m",
            "users": 6040,
            "items": 3706,
            "events": 1_000_209,
            "split": "leave_one_out",
            "split_hash": "9f2c1e7ab0d4",
            "repeat_share": 0.0,
            "mask_seen": True,
        },
        "rows": [fake_row(name) for name in names],
        "histograms": {
            "history_length": {"edges": edges, "counts": (900 * bell).astype(int).tolist()},
            "item_popularity": {"edges": edges, "counts": (480 * bell[::-1]).astype(int).tolist()},
        },
        "runs": {},
    }


def fake_run(folder: Path, steps: int, ceiling: float, seed: int = 0) -> Path:
    """A run folder with `metrics.jsonl` and `config.yaml`."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for step in range(50, steps + 1, 50):
        loss = 6.2 + 2.1 * math.exp(-step / 1500) + 0.04 * rng.standard_normal()
        shares = {"padding_share": 0.031, "rank_imbalance": 1.04, "data_wait_share": 0.008}
        speed = {
            "samples_per_s": 310 + 20 * rng.random(),
            "events_per_s": 41_500 + 900 * rng.random(),
            "step_ms": 412.0,
        }
        head = {"kind": "train", "step": step, "epoch": step // 400, "time_s": 0.41 * step, "loss": loss}
        lines.append({**head, "learning_rate": 1e-3, "temperature": 0.07, "grad_norm": 0.9, **speed, **shares})
        if step % 400 == 0:
            gain = ceiling * (1 - math.exp(-step / 1800)) + 0.001 * rng.standard_normal()
            lines.append(
                {"kind": "validation", "step": step, "epoch": step // 400, "hr@10": 1.8 * gain, "ndcg@10": gain}
            )
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("model:\n  width: 64\n  layers: 2\ntrain:\n  seed: 0\n  bf16: false\n" * 3)
    return folder


def render(tmp_path: Path, evaluation: dict[str, Any], runs: dict[str, Path] | None = None) -> str:
    """Writes and reads back a report."""
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation))
    write_report(path, runs or {}, tmp_path / "out/report.html")
    return (tmp_path / "out/report.html").read_text()


class Page(HTMLParser):
    """What a browser would make of the page: tags, references, text, and whether the tags nest."""

    void = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data", "srcset", "poster")
        self.references += [value or "" for name, value in attrs if name in names]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.void:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def full(tmp_path: Path) -> str:
    """The report of everything."""
    runs = {
        "model": fake_run(tmp_path / "model", 9000, 0.171),
        "model_without_content": fake_run(tmp_path / "ids", 7200, 0.162, seed=1),
    }
    return render(tmp_path, fake_evaluation(), runs)


def test_page_stands_alone(tmp_path: Path) -> None:
    text = full(tmp_path)
    page = Page(text)
    assert page.tags.count("html") == 1
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert {part.split(")")[0][0] for part in text.split("url(")[1:]} <= {"#"}
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(text) < 500_000


def test_all_rows_and_values_are_shown(tmp_path: Path) -> None:
    page = Page(full(tmp_path)).text
    for label in ("Popularity", "Markov chain", "Model", "Model, no content", "Oracle", "chance"):
        assert label in page
    for hit, gain, reciprocal in ROWS.values():
        for value in (hit, gain, reciprocal, hit - 0.011, gain + 0.006):
            assert f"{value:.4f}" in page
    for words in ("6,040", "3,706", "1,000,209", "leave one out", "9f2c1e7a", "30.1 % of 6,040 users", "has poster"):
        assert words in page
    assert "1.52 ×" in page  # NDCG@10 of the model over Markov's
    assert "78.1 %" in page  # and as a share of the oracle's
    assert f"{10 / 3706:.4f}" in page
    assert "left out of the ranking" in page


def test_figures_take_their_colours_from_the_page_and_have_descriptions(tmp_path: Path) -> None:
    text = full(tmp_path)
    assert text.count("<svg ") == text.count('role="img" aria-label="') == 8
    for svg in text.split("<svg ")[1:]:
        drawing = svg.split("</svg>")[0]
        assert "#fe" not in drawing
        assert "DejaVu" not in drawing
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("name", ["popularity", "model", "a_new_row"])
def test_one_row_and_nothing_else_is_enough(tmp_path: Path, name: str) -> None:
    row = {"row": name, "hr@10": 0.25, "ndcg@10": 0.125, "mrr": 0.1, "users": 7, "seconds": 1.5}
    page = Page(render(tmp_path, {"dataset": {"name": "tiny"}, "rows": [row]}))
    assert "0.2500" in page.text
    assert "25.0 % of 7 users" in page.text
    assert page.tags.count("svg") == 2


def test_missing_and_nan_values_are_dashes(tmp_path: Path) -> None:
    evaluation = fake_evaluation(("popularity", "markov", "model"))
    for row in evaluation["rows"]:
        row["cold_hr@10"] = None
        row["few_hr@10"] = math.nan
        del row["hr@10_low"], row["coverage"]
        row["slices"]["cold"] = {"users": 0, "hr@10": None, "ndcg@10": None}
    page = Page(render(tmp_path, evaluation)).text
    assert "nan" not in page.lower().replace("domi" + "nan", "")
    assert "None" not in page
    assert "–" in page
    assert "Oracle" not in page


def test_short_runs_and_cut_off_lines_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    short = fake_run(tmp_path / "short", 50, 0.1)
    with (short / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "validation", "st')
    (tmp_path / "empty").mkdir()
    page = render(tmp_path, fake_evaluation(), {"model": short, "model_without_content": tmp_path / "empty"})
    assert "Training loss over training steps: Model ends at" in page
    assert "NDCG@10 on validation" not in page


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", 100, 0.1)
    (run / "metrics.jsonl").write_text('{"kind": "train"}\nnonsense\n{}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not JSON .*remove the line"):
        render(tmp_path, fake_evaluation(), {"model": run})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"dataset": {"name": "x"}, "rows": []}', '{"dataset": {"name": "x"}, "rows": [{}]}']
)
def test_unusable_evaluation_is_refused_and_nothing_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation.json: .*run evaluate again"):
        write_report(tmp_path / "evaluation.json", {}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    nasty = "<script>alert('$x$')</script>\"><img src=x onerror=y> --> & \\n"
    evaluation = fake_evaluation()
    evaluation["dataset"]["name"] = nasty
    evaluation["dataset"]["split"] = nasty
    evaluation["rows"].append(
        {**fake_row("model"), "row": nasty, "slices": {nasty: {"users": 5, "hr@10": 1, "ndcg@10": 1}}}
    )
    run = fake_run(tmp_path / "run", 900, 0.1)
    (run / "config.yaml").write_text(f"name: {nasty}\n")
    page = Page(render(tmp_path, evaluation, {"model": run, nasty: run}))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(nasty) >= 4


def test_same_files_give_the_same_page(tmp_path: Path) -> None:
    assert render(tmp_path, fake_evaluation()) == render(tmp_path, fake_evaluation())
