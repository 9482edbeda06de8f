"""Tables of trained ranker variants: mean figures over seeds, and paired intervals against one of them.

A cell is one run: a variant with a seed, and its logit for every impression, so that any two cells of one split can be
compared impression by impression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mufasa_rec.evaluation.auc import area, areas_of_groups
from mufasa_rec.evaluation.ranking_figures import FEW_IMPRESSIONS
from mufasa_rec.evaluation.ranking_intervals import Metric, paired_interval
from mufasa_rec.evaluation.scored import Scored

_METRICS: tuple[Metric, ...] = ("auc", "gauc", "logloss")


@dataclass(frozen=True)
class RankingCell:
    """Scores of one run.

    Attributes:
        scored: Every impression with its logit and label, by task.
        item_count: Training impressions of each impression's item, `[n]`, in the same order.
        seconds: Training and scoring.
    """

    scored: Mapping[str, Scored]
    item_count: np.ndarray
    seconds: float = 0.0


def figures(scored: Scored) -> dict[str, float]:
    """AUC, GAUC, LogLoss and NE of some impressions; NaN where they cannot be told."""
    z, y = scored.logit.astype(np.float64), scored.label
    logloss = float((np.logaddexp(0.0, z) - y * z).mean()) if len(z) else math.nan
    rate = float(y.mean()) if len(y) else math.nan
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else math.nan
    _, areas, sizes = areas_of_groups(scored.user, scored.logit, y)
    gauc = float((areas * sizes).sum() / sizes.sum()) if len(sizes) else math.nan
    return {"auc": area(scored.logit, y), "gauc": gauc, "logloss": logloss, "ne": logloss / entropy}


def ranking_markdown(variants: Mapping[str, Mapping[int, RankingCell]], rule: str) -> str:
    """The table of a grid for each task: over all impressions, and over those of items that training hardly showed.

    Args:
        variants: Cells by variant and seed; variants without a cell are left out.
        rule: The variant that the others are compared with.

    Returns:
        Markdown; a difference is variant minus rule with its 95 % interval over users, seeds averaged.
    """
    cells = next((cell for found in variants.values() for cell in found.values()), None)
    if cells is None:
        return ""
    lines = []
    for task in cells.scored:
        for title, most in (
            ("all impressions", None),
            (f"items with at most {FEW_IMPRESSIONS} training impressions", FEW_IMPRESSIONS),
            ("items without a training impression", 0),
        ):
            mask = np.ones(len(cells.item_count), bool) if most is None else cells.item_count <= most
            if not mask.any():
                continue
            lines += [f"### {task}, {title} ({int(mask.sum()):,})", ""]
            lines.append(
                f"| variant | seeds | AUC | GAUC | LogLoss | NE | AUC against {rule} | GAUC against {rule} | "
                f"LogLoss against {rule} | minutes |"
            )
            lines.append("|---|---|---|---|---|---|---|---|---|---|")
            lines += [_line(name, variants, rule, task, mask) for name in variants if variants[name]]
            lines.append("")
    return "\n".join(lines)


def _line(name: str, variants: Mapping[str, Mapping[int, RankingCell]], rule: str, task: str, mask: np.ndarray) -> str:
    cells = {seed: cell.scored[task].taken(mask) for seed, cell in variants[name].items()}
    told = [figures(scored) for scored in cells.values()]
    mean = {key: float(np.mean([one[key] for one in told])) for key in told[0]}
    minutes = float(np.mean([cell.seconds for cell in variants[name].values()])) / 60
    against = {seed: cell.scored[task].taken(mask) for seed, cell in variants.get(rule, {}).items()}
    seeds = sorted(cells.keys() & against.keys()) if name != rule else []
    differences = ["–"] * len(_METRICS)
    if seeds:
        pairs = ([side[seed] for seed in seeds] for side in (cells, against))
        mine, theirs = (list(side) for side in pairs)
        known = [math.isfinite(mean[metric]) for metric in _METRICS]  # users of one class each have no GAUC
        found = [
            paired_interval(mine, theirs, metric) if can else None for metric, can in zip(_METRICS, known, strict=True)
        ]
        differences = ["–" if one is None else f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]" for one in found]
    values = " | ".join(
        "–" if math.isnan(mean[key]) else f"{mean[key]:.4f}" for key in ("auc", "gauc", "logloss", "ne")
    )
    return f"| {name} | {len(cells)} | {values} | {' | '.join(differences)} | {minutes:.1f} |"
