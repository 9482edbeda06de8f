"""The fusion run as one HTML page: its losses, its space, its neighbours, in the style of the evaluation's report.

Everything is read from `report.json` and `metrics.jsonl`, so the page can be made again long after the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mufasa_rec.data import paths
from mufasa_rec.evaluation import fusion_figures as figures
from mufasa_rec.evaluation.figures import Curve
from mufasa_rec.evaluation.report import environment, read_metrics
from mufasa_rec.evaluation.report_parts import Record, is_number

logger = logging.getLogger(__name__)
_NO_TERMS = {"kind", "step", "epoch", "time_s", "learning_rate", "grad_norm"}
_KINDS = {"train": "batches", "validation": "held out"}
TERMS = {
    "loss": ("The whole loss", "What training minimises, and what decides which weights are the best."),
    "semantic": (
        "(i) across genres",
        "Finds an item's title, and near ones of other genres, among all in the batch.",
    ),
    "collaborative": ("(ii) behaviour", "Finds what training events say of an item among all in the batch."),
    "structure": ("(iii) structure", "How far similarities are from those of titles, and what modalities say is lost."),
    "distribution": ("(iv) distribution", "How far the fused vectors are from a regular cloud."),
    "reconstruction": ("Reconstruction, a part of (iii)", "What cannot be read back of each modality: 1 is nothing."),
}


def write_fusion_report(report_json: str | Path, metrics: str | Path, output: str | Path) -> None:
    """Write the page.

    Args:
        report_json: What was measured of the run.
        metrics: Its `metrics.jsonl`; without one the curves are left out.
        output: The HTML file to write.

    Raises:
        ValueError: When the report is missing or not JSON.
    """
    report = _read(str(report_json))
    lines = read_metrics(str(metrics))
    page = (
        environment()
        .get_template("fusion_report.html.j2")
        .render(
            report=report,
            space="alignment" in report,
            terms=term_figures(lines),
            figures=_space_figures(report),
        )
    )
    with paths.atomic_write(str(output)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    logger.info("report: %s", output)


def _read(url: str) -> dict[str, Any]:
    with paths.open_file(url, "rb") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{url}: not JSON ({error}); run fuse again") from error


def term_figures(lines: Sequence[Record]) -> list[dict[str, Any]]:
    """A figure for each loss term that the run has, those of modalities and guards behind the others."""
    there = {name for line in lines for name, value in line.items() if is_number(value)} - _NO_TERMS - {"positives"}
    names = [*(name for name in TERMS if name in there), *sorted(there - TERMS.keys())]
    found = []
    for name in names:
        train, held = (_curve(lines, kind, name, label) for kind, label in _KINDS.items())
        title, caption = TERMS.get(name, (name.replace("/", " of "), ""))
        last = [f"{curve.label} ends at {curve.y[-1]:.4f}" for curve in (train, held) if curve is not None]
        if last:
            svg = figures.term_curves(train, held, f"{title} over training steps: {', '.join(last)}")
            found.append({"title": title, "caption": caption, "svg": svg, "main": name in TERMS})
    return found


def _curve(lines: Sequence[Record], kind: str, name: str, label: str) -> Curve | None:
    points = [(line["step"], line[name]) for line in lines if line.get("kind") == kind and is_number(line.get(name))]
    if not points:
        return None
    x, y = zip(*points, strict=True)
    return Curve(label=label, colour="model", x=x, y=y)


def _space_figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the space looks like, as far as it was measured."""
    found = []
    if report.get("structure", {}).get("title"):
        text = f"Cosines of fused vectors over those of titles; rank correlation {report['structure_correlation']:.3f}"
        caption = "Random pairs of items, grouped by how close their titles are: the median, and the middle 80 %."
        svg = figures.structure_band(report["structure"], text)
        found.append({"title": "Does it keep what titles say?", "caption": caption, "svg": svg})
    if report.get("spectrum"):
        ranks = report["effective_rank"]
        text = "Share of the variance held by the first directions: " + ", ".join(
            f"effective rank of {name} {value:.1f}" for name, value in ranks.items()
        )
        caption = "Dashed: the effective rank, the number of directions that are really used."
        svg = figures.spectra(report["spectrum"], ranks, text)
        found.append({"title": "How many directions does it use?", "caption": caption, "svg": svg})
    if any(one["mean"] is not None for one in report.get("movement", {}).values()):
        text = "How far the fused vector turns without a modality: " + ", ".join(
            f"{name} {one['mean']:.3f}" for name, one in report["movement"].items() if one["mean"] is not None
        )
        caption = "Items that have the modality and another one. A bar near 0: the layer hardly listens to it."
        svg = figures.movement_bars(report["movement"], text)
        found.append({"title": "What does each modality move?", "caption": caption, "svg": svg})
    return found
