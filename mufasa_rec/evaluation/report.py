"""The evaluation as one HTML page that opens without a network: tables, figures, and what they do not say.

Everything is read from files (`evaluation.json`, and `metrics.jsonl` and `config.yaml` of each run), so a report can be
made again long after the run. The page holds no script and loads nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from mufasa_rec.data import paths
from mufasa_rec.evaluation import report_parts as parts

logger = logging.getLogger(__name__)

_CONFIG_LINES = 120


def write_report(evaluation_json_path: str | Path, run_folders: Mapping[str, str | Path], output: str | Path) -> None:
    """Writes the report of one evaluation.

    Args:
        evaluation_json_path: The `evaluation.json` that evaluate wrote.
        run_folders: Row name to the folder of the run that trained it; empty when nothing was trained.
        output: The HTML file to write.

    Raises:
        ValueError: A file is missing or is not what its name says.
    """
    evaluation = _read_json(str(evaluation_json_path))
    rows = parts.ordered(evaluation["rows"])
    runs = {name: read_metrics(paths.join(str(folder), "metrics.jsonl")) for name, folder in run_folders.items()}
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            dataset=evaluation["dataset"],
            rows=rows,
            chance=parts.chance(evaluation["dataset"].get("items")),
            summary=parts.summary(rows),
            metric_figures=parts.metric_figures(rows),
            curve_figures=parts.curve_figures(runs),
            speeds=[parts.speed(name, lines) for name, lines in runs.items() if lines],
            speed_names=parts.SPEEDS,
            slices=parts.slices(rows),
            slice_figures=parts.slice_figures(rows),
            histograms=parts.histograms(evaluation.get("histograms") or {}),
            configs={parts.label_of(name): _config_excerpt(str(folder)) for name, folder in run_folders.items()},
        )
    )
    with paths.atomic_write(str(output)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    logger.info("report: %s", output)


def environment() -> jinja2.Environment:
    """Where the reports' templates lie, and how they write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, percent=_percent, count=_count, duration=_duration)
    return environment


def _read_json(url: str) -> dict[str, Any]:
    with paths.open_file(url, "rb") as file:
        try:
            evaluation = json.load(file)
        except ValueError as error:
            raise ValueError(f"{url}: not JSON ({error}); run evaluate again") from error
    missing = [key for key in ("dataset", "rows") if not isinstance(evaluation, dict) or not evaluation.get(key)]
    if missing:
        raise ValueError(f"{url}: {' and '.join(missing)} missing or empty; run evaluate again")
    if not all(isinstance(row, dict) and isinstance(row.get("row"), str) for row in evaluation["rows"]):
        raise ValueError(f"{url}: a row has no name in its field 'row'; run evaluate again")
    return evaluation


def read_metrics(url: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty without one. A last line cut off by a kill is left out."""
    if not paths.exists(url):
        logger.warning("report: %s is missing, its learning curves are left out", url)
        return []
    with paths.open_file(url, "rb") as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    whole = [_parse(line, f"{url}: line {number}") for number, line in enumerate(lines[:-1], start=1)]
    try:
        return [*whole, *(_parse(line, "the last line") for line in lines[-1:])]
    except ValueError:
        logger.warning("report: the last line of %s is incomplete and left out", url)
        return whole


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); remove the line") from error


def _config_excerpt(folder: str) -> str | None:
    """The beginning of a run's resolved config, None without one."""
    url = paths.join(folder, "config.yaml")
    if not paths.exists(url):
        return None
    with paths.open_file(url, "rb") as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    left_out = len(lines) - _CONFIG_LINES
    rest = [f"# {left_out} more lines in config.yaml"] if left_out > 0 else []
    return "\n".join([*lines[:_CONFIG_LINES], *rest])


def _score(value: Any) -> str:
    """A metric with four digits, a dash when there is none."""
    return f"{value:.4f}" if parts.is_number(value) else "–"


def _percent(value: Any) -> str:
    """A share in percent, a dash when there is none."""
    if not parts.is_number(value):
        return "–"
    return "99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def _count(value: Any) -> str:
    """A number with separators and without noise, a dash when there is none."""
    if not parts.is_number(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _duration(seconds: Any) -> str:
    """Seconds for people, a dash when unknown."""
    if not parts.is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
