"""Cells of a grid as files: what makes one, and how it is read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mufasa_rec.config import RunConfig
from mufasa_rec.evaluation.grid import Cell
from mufasa_rec.evaluation.ranking_grid import RankingCell
from mufasa_rec.evaluation.scored import Scored
from torchx_apps.evaluate import MODEL

# What makes no other cell: where the data lies, the seed (which names the cell itself), how a run is watched.
_NO_PART = ("data.dataset", "data.prefetch", "content.placement", "trainer.log_every", "checkpoint", "sharding",
            "threads", "seed")  # fmt: skip
# What a task does not read.
_FUSION = ("model.fusion_source", "model.finetune_fusion", "optimizer.fusion_share")  # without a fusion layer inside
_UNREAD = {"retrieval": ("task", "ranker", "data.requests"), "ranking": ("model", "data.negatives", "mask_seen")}


def config_hash(config: RunConfig, split: str) -> str:
    """Short hash of all that makes a result, the seed aside."""
    fields = dict(_flat(dataclasses.asdict(config), ""))
    left_out = (*_NO_PART, *_UNREAD[config.task], *(() if config.model.fusion_source else _FUSION))
    kept = {k: v for k, v in fields.items() if not any(k == no or k.startswith(f"{no}.") for no in left_out)}
    text = json.dumps({"split": split, **kept}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flat(fields: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in fields.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def read_ranking_cell(stem: Path) -> RankingCell:
    """Read the cell of a ranker whose files have this stem."""
    told = json.loads(stem.with_suffix(".json").read_text())
    found = load_file(stem.with_suffix(".safetensors"))
    prefix = f"logit.{MODEL}."
    tasks = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
    scored = {
        task: Scored(found["row"], found["user"], found[prefix + task], found[f"label.{task}"])
        for task in sorted(tasks)
    }
    return RankingCell(scored, found["item_count"], seconds=told["seconds"])


def read_cell(stem: Path) -> Cell:
    """Read the cell whose files have this stem."""
    told = json.loads(stem.with_suffix(".json").read_text())
    ranks = load_file(stem.with_suffix(".safetensors"))
    none = np.empty(0)
    return Cell(
        user=ranks["user"],
        target_row=ranks["target_row"],
        rank=ranks[f"rank.{MODEL}"],
        history_length=ranks["history_length"],
        target_events=ranks.get("target_events", none),
        cold_rank=ranks.get(f"cold_rank.{MODEL}", none),
        cold_items=int(ranks.get("cold_items", np.zeros(1))[0]),
        seconds=told["seconds"],
    )
