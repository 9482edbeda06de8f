"""Evaluation of trained rankers: metrics of every run on the same impressions, slices, and paired intervals.

What `torchx_apps.evaluate` does for runs of the task `ranking`. Writes evaluation.json, summary.json, and every
impression's logit by every run in scores.safetensors.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.data.preparation import ORACLE_FILE
from mufasa_rec.data.ranking_batch import RankingBatch
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.impressions import FIGURES, NEW_ITEM, Score, model_score
from mufasa_rec.evaluation.ranking import RankingResult
from mufasa_rec.evaluation.ranking_intervals import interval, paired_interval
from torchx_apps import assembly, judged_run, ranking

logger = logging.getLogger(__name__)
SCORES_FILE = "scores.safetensors"
ORACLE = "oracle"
_PAIRED = ("auc", "gauc", "logloss")
Found = dict[str, dict[str, RankingResult]]  # by row and task


def evaluate_ranking(
    runs: dict[str, str],
    configs: dict[str, RunConfig],
    output: Path,
    part: str,
    env: DistributedEnv,
    *,
    checkpoint: str = "best",
) -> list[dict[str, Any]]:
    """Evaluate every run and, for generated data, the oracle.

    Args:
        runs: Run folders by row name; the first decides data set and split, and the others are compared with it.
        configs: Their configurations.
        output: Where results are written.
        part: `validation` or `test`.
        env: This process among its peers; the process group must be up.
        checkpoint: Which checkpoint of the first run: `best`, `newest` or a step; of the others it is the best.

    Returns:
        The rows of `summary.json`.
    """
    exchange = RankExchange()
    name = next(iter(runs))
    data = assembly.open_dataset(configs[name], assembly.load_vocabulary(runs[name]))
    found: Found = {}
    seconds: dict[str, float] = {}
    for row, folder in runs.items():
        which = checkpoint if row == name else "best"
        begin = time.perf_counter()
        found[row] = _evaluate_run(folder, which, configs[row], data, part, env, exchange)
        trained = Path(folder) / "summary.json"
        before = json.loads(trained.read_text())["seconds"] if trained.exists() else 0.0
        seconds[row] = before + time.perf_counter() - begin
    oracle = _oracle(data)
    if oracle is not None:
        found[ORACLE] = ranking.make_evaluator(configs[name], data, part, env, exchange).evaluate(oracle)
        seconds[ORACLE] = 0.0
    if not env.is_main:
        return []
    rows = [_row(row, results, seconds[row]) for row, results in found.items()]
    facts = {
        "name": data.manifest.name,
        "split": data.split.id,
        "split_hash": data.split.hash,
        "part": part,
        "tasks": ranking.impressions_of(data).tasks,
        "impressions": rows[0]["impressions"],
    }
    evaluation = {"dataset": facts, "rows": rows, "pairs": _pairs(found), "runs": {k: str(v) for k, v in runs.items()}}
    output.mkdir(parents=True, exist_ok=True)
    _write_scores(found, _item_counts(configs[name], data, part, env), output)
    return _write(evaluation, output)


def _evaluate_run(
    folder: str,
    which: str,
    config: RunConfig,
    first: assembly.OpenDataset,
    part: str,
    env: DistributedEnv,
    exchange: RankExchange,
) -> dict[str, RankingResult]:
    """Load a run's checkpoint on this world's ranks and score every impression with it."""
    data = judged_run.open_beside(folder, config, first)
    model = ranking.shard_ranker(config, data, ranking.build_ranker(config, data, exchange), env.device)
    judged_run.load_weights(folder, which, config, data, model, exchange)
    return ranking.make_evaluator(config, data, part, env, exchange).evaluate(model_score(model))


def _oracle(data: assembly.OpenDataset) -> Score | None:
    """The true logits of the first task, where the data set was generated; 0 for other tasks."""
    file = paths.join(data.folder, ORACLE_FILE)
    if not paths.exists(file):
        return None
    chance = torch.from_numpy(load_file(paths.local_copy(file))["probability"])
    logits = torch.logit(chance)

    def score(batch: RankingBatch) -> torch.Tensor:
        found = torch.zeros_like(batch.labels, device="cpu")
        found[:, 0] = logits[batch.impression.cpu()].float()
        return found

    return score


def _row(name: str, results: dict[str, RankingResult], seconds: float) -> dict[str, Any]:
    """Figures of a row, by the first task, and of all tasks and slices."""
    first = next(iter(results.values()))
    row: dict[str, Any] = {"row": name} | {figure: _told(getattr(first.overall, figure)) for figure in FIGURES}
    row["cold_auc"] = _told(first.slices[NEW_ITEM].auc)
    row["cold_impressions"] = first.slices[NEW_ITEM].impressions
    row["impressions"], row["seconds"] = first.overall.impressions, seconds
    if first.scored is not None:
        found = interval([first.scored], "auc")
        row |= {"auc_low": _told(found.low), "auc_high": _told(found.high)}
    row["tasks"] = {task: _figures(result.overall) for task, result in results.items()}
    row["slices"] = {task: {k: _figures(v) for k, v in result.slices.items()} for task, result in results.items()}
    return row


def _figures(figures: Any) -> dict[str, Any]:
    return {name: _told(value) for name, value in asdict(figures).items()}


def _told(value: float) -> float | None:
    """A figure as JSON has it: none where it cannot be told."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _pairs(found: Found) -> list[dict[str, Any]]:
    """The first row's differences to the others, with 95 % intervals over users; a loss is better below 0."""
    first, *others = found
    pairs = []
    for other in others:
        for task, mine in found[first].items():
            theirs = found[other][task].scored
            if mine.scored is None or theirs is None or (other == ORACLE and task != next(iter(found[first]))):
                continue
            told = {metric: asdict(paired_interval([mine.scored], [theirs], metric)) for metric in _PAIRED}
            pairs.append({"pair": f"{first} - {other}", "task": task, **told})
    return pairs


def _item_counts(
    config: RunConfig, data: assembly.OpenDataset, part: str, env: DistributedEnv
) -> tuple[np.ndarray, np.ndarray]:
    """Every impression of the part, ascending, and the training impressions of its item."""
    loader = ranking.make_loader(config, data, part, replace(env, rank=0, world_size=1))
    batches = [(batch.impression.numpy(), batch.item_count.numpy()) for batch in loader.batches(0)]
    row, count = (np.concatenate(column) for column in zip(*batches, strict=True))
    order = np.argsort(row)
    return row[order], count[order]


def _write_scores(found: Found, counts: tuple[np.ndarray, np.ndarray], output: Path) -> None:
    """Write what paired comparisons with other evaluations of the split need: each impression's logit by every row."""
    columns: dict[str, np.ndarray] = {"row": counts[0], "item_count": counts[1]}
    for row, results in found.items():
        for task, result in results.items():
            if result.scored is None:
                logger.warning("%s: more impressions than the budget of exact metrics; scores are not written", row)
                return
            columns |= {"user": result.scored.user, f"label.{task}": result.scored.label}
            columns[f"logit.{row}.{task}"] = result.scored.logit
    with paths.atomic_write(output / SCORES_FILE) as path:
        save_file({name: np.ascontiguousarray(values) for name, values in columns.items()}, path)


def _write(evaluation: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Write evaluation.json and summary.json, and say the rows."""
    summary = [{key: value for key, value in row.items() if key != "slices"} for row in evaluation["rows"]]
    for name, content in (("evaluation.json", evaluation), ("summary.json", summary)):
        with paths.atomic_write(output / name) as path:
            path.write_text(json.dumps(content, indent=2))
    for row in summary:
        figures = " · ".join(f"{name} {row[name]:.4f}" for name in (*FIGURES, "cold_auc") if row[name] is not None)
        logger.info("%-24s %s", row["row"], figures)
    return summary
