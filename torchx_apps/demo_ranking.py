"""The demo of the ranking task: DMAE, its rivals and DMAE without each unit, trained alike and judged side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchx_apps.evaluate_ranking import SCORES_FILE
from torchx_apps.grids import RANKING
from torchx_apps.local_job import Job

OUTPUTS = (*RANKING, SCORES_FILE)
ROWS = {
    "din": "DIN (ids only)",
    "early_fusion": "early fusion (one cosine)",
    "simtier": "SimTier (histograms)",
    "dmae": "DMAE",
    "dmae_without_mieu": "DMAE without MIEU",
    "dmae_without_mifu": "DMAE without MIFU",
    "dmae_without_midu": "DMAE without MIDU",
    "oracle": "oracle",
}
COLUMNS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "logloss": "LogLoss",
    "ne": "NE",
    "calibration": "calibration",
    "cold_auc": "cold AUC",
}


def jobs(preset: str, run: Path, *, has_content: bool) -> list[Job]:
    """The training of every row, and the evaluation of all; without content there is only one row to train.

    Args:
        preset: Named configuration of the training.
        run: Folder of everything that is written.
        has_content: Whether the data set has content vectors.
    """
    rows = {name: variant for name, variant in RANKING.items() if has_content or name == "din"}
    common = ["--preset", preset, "--data.dataset", str(run / "dataset")]
    trains = [
        Job(name=f"train {name}", component="train", program_args=[*common, *variant.train, "--run", str(run / name)])
        for name, variant in rows.items()
    ]
    first, *others = rows
    arguments = ["--run", str(run / first), "--name", first, "--output", str(run)]
    if others:
        arguments += ["--compare", ",".join(f"{name}={run / name}" for name in others)]
    return [*trains, Job(name="evaluate", component="evaluate", program_args=arguments)]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows of summary.json out as a table; a figure that cannot be told is a dash."""
    found = {row["row"]: row for row in rows}
    shown = next((row["impressions"] for row in rows), 0)
    lines = [f"{f'{shown:,} impressions':<28}" + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for name in [name for name in ROWS if name in found]:
        figures = (found[name].get(key) for key in COLUMNS)
        lines.append(f"{ROWS[name]:<28}" + "".join(f"{'–' if x is None else f'{x:.4f}':>12}" for x in figures))
    lines.append(
        "cold AUC: on items without a training impression or event; NE: LogLoss over that of the mean click rate"
    )
    return "\n".join(lines)
