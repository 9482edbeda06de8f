"""Measures the fusion space of a run on a sample of the catalog, and writes report.json and report.html beside it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mufasa_rec.data import paths
from mufasa_rec.data.coding import Vocabulary
from mufasa_rec.data.collaborative import closest
from mufasa_rec.data.cooccurrence import count_pairs
from mufasa_rec.data.parquet import list_row_groups
from mufasa_rec.evaluation import fusion_measures as measures
from mufasa_rec.evaluation.fusion_report import write_fusion_report
from mufasa_rec.modules.fusion import FusionLayer, ItemContent
from mufasa_rec.training.fusion_encode import encode
from mufasa_rec.training.fusion_items import FusionItems, mine_neighbours
from torchx_apps.assembly import OpenDataset
from torchx_apps.fuse_assembly import genre_name
from torchx_apps.fuse_config import FuseConfig

logger = logging.getLogger(__name__)
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
_MAX_ITEMS = 10_000
_MAX_PAIRS = 100_000
_SHOWN = 5
_POPULAR, _COLD = 4, 2
_LOOKED_AT = 200


@dataclass(frozen=True)
class Sample:
    """Items that are measured: with a title vector, ascending.

    Attributes:
        rows: Their item rows, `[n]`.
        z: Fused vectors, `[n, E]`.
        titles: Title vectors, `[n, P]`.
        whole: Whether it is all items with a title vector.
    """

    rows: np.ndarray
    z: Tensor
    titles: Tensor
    whole: bool


@torch.no_grad()
def write_report(
    config: FuseConfig, folder: Path, items: FusionItems, layer: FusionLayer, data: OpenDataset, result: dict[str, Any]
) -> None:
    """Measure a trained layer and write the report into the run folder; for one rank.

    Args:
        config: The run.
        folder: Run folder, with its metrics.jsonl.
        items: The catalog.
        layer: The trained layer.
        data: The data set.
        result: What the run ended with, for the head of the report.
    """
    layer.eval()
    rng = np.random.default_rng(config.seed)
    sample = _sample(config, items, layer, rng)
    report: dict[str, Any] = {
        "dataset": data.manifest.name,
        "split": data.catalog.split,
        "items": {
            "catalog": len(data.catalog),
            "with_title": int((data.catalog.content_rows[config.layer.anchor][:] >= 0).sum()),
            "measured": len(sample.rows),
            "whole": sample.whole,
        },
        "anchor": config.layer.anchor,
        "modalities": layer.widths,
        "width": layer.config.width,
        "weights": {n: getattr(config.objective, f"{n}_weight") for n in _LOSSES},
        "best": result["best"],
        "steps": result["steps"],
        "seconds": result["seconds"],
    }
    if len(sample.rows) > 1:
        report |= _space(config, items, data, sample, rng, result["threshold"])
        report["movement"] = _movement(config, items, layer, sample)
        report["neighbours"] = _neighbours(config, data, sample, rng)
    with paths.atomic_write(folder / REPORT_JSON) as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    write_fusion_report(folder / REPORT_JSON, folder / "metrics.jsonl", folder / REPORT_HTML)


_LOSSES = ("semantic", "collaborative", "structure", "distribution")


def _sample(config: FuseConfig, items: FusionItems, layer: FusionLayer, rng: np.random.Generator) -> Sample:
    anchor = config.layer.anchor
    rows = np.flatnonzero(items.catalog.content_rows[anchor][:] >= 0)
    chosen = rows if len(rows) <= _MAX_ITEMS else np.sort(rng.choice(rows, _MAX_ITEMS, replace=False))
    z = torch.from_numpy(encode(layer, items.content, chosen, config.chunk)).float()
    store = items.catalog.stores[anchor]
    titles = torch.from_numpy(store.gather(items.catalog.content_rows[anchor][chosen]))
    return Sample(chosen, z, titles, len(chosen) == len(rows))


def _space(
    config: FuseConfig,
    items: FusionItems,
    data: OpenDataset,
    sample: Sample,
    rng: np.random.Generator,
    threshold: float,
) -> dict[str, Any]:
    """Alignment, uniformity, effective rank and structure, of the fused vectors beside the titles alone."""
    chance = _random_pairs(len(sample.rows), rng)
    kinds = {
        "near titles of other genres": _places(sample, mine_neighbours(items, sample.rows, sample.titles, threshold)),
        "chosen together in training": _places(sample, _chosen_together(config, data)),
        "random items": chance,
    }
    kinds = {name: _some(pairs, rng) for name, pairs in kinds.items()}
    spaces = {"fused": sample.z, "title": sample.titles}
    cosines = {name: measures.pair_cosines(x, chance) for name, x in spaces.items()}
    return {
        "pairs": {name: len(pairs) for name, pairs in kinds.items()},
        "alignment": {
            name: {space: measures.alignment(x, pairs) for space, x in spaces.items()} for name, pairs in kinds.items()
        },
        "uniformity": {name: measures.uniformity(x, chance) for name, x in spaces.items()},
        "effective_rank": {name: measures.effective_rank(x) for name, x in spaces.items()},
        "spectrum": {name: measures.spectrum(x).round(8).tolist() for name, x in spaces.items()},
        "structure_correlation": measures.rank_correlation(cosines["title"], cosines["fused"]),
        "structure": measures.structure_bins(cosines["title"], cosines["fused"]),
    }


def _random_pairs(n: int, rng: np.random.Generator) -> np.ndarray:
    left = rng.integers(0, n, _MAX_PAIRS)
    return np.stack([left, (left + rng.integers(1, n, _MAX_PAIRS)) % n], axis=1)


def _some(pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pairs if len(pairs) <= _MAX_PAIRS else pairs[rng.choice(len(pairs), _MAX_PAIRS, replace=False)]


def _places(sample: Sample, pairs: np.ndarray) -> np.ndarray:
    """Pairs of item rows as places in the sample, `[pairs, 2]`; those outside are left out."""
    place = np.minimum(np.searchsorted(sample.rows, pairs), len(sample.rows) - 1)
    return place[(sample.rows[place] == pairs).all(1)]


def _chosen_together(config: FuseConfig, data: OpenDataset) -> np.ndarray:
    """Item rows of pairs that training events hold together, the closest of each item, `[pairs, 2]`."""
    groups = list_row_groups(data.folder, data.manifest, data.ref, "train")
    codes = closest(count_pairs(groups, data.catalog, config.behaviour.window), config.behaviour)
    return np.stack(np.divmod(codes, len(data.catalog)), axis=1)


def _movement(config: FuseConfig, items: FusionItems, layer: FusionLayer, sample: Sample) -> dict[str, Any]:
    """How far z turns without each modality, for items that have it and another one."""
    found = {}
    for name in layer.widths if len(layer.widths) > 1 else ():
        has = {other: items.catalog.content_rows[other][sample.rows] >= 0 for other in layer.widths}
        others = np.any([has[other] for other in layer.widths if other != name], axis=0)
        places = np.flatnonzero(has[name] & others)
        hidden = encode(layer, _without(items, name), sample.rows[places], config.chunk)
        found[name] = measures.movement(sample.z[places], torch.from_numpy(hidden))
    return found


def _without(items: FusionItems, name: str) -> Any:
    def contents(rows: np.ndarray) -> ItemContent:
        content = items.content(rows)
        return replace(content, present={**content.present, name: torch.zeros_like(content.present[name])})

    return contents


def _neighbours(
    config: FuseConfig, data: OpenDataset, sample: Sample, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Much chosen items and some that nobody chose, with the closest ones, by fused vectors and by titles alone."""
    told = _describer(config, data)
    counts = data.catalog.counts[sample.rows]
    cold = rng.permutation(np.flatnonzero(counts == 0))[:_COLD]
    popular, seen = [], set()  # of genres that have nothing in common, as far as the most chosen ones allow
    for place in np.argsort(-counts, kind="stable")[:_LOOKED_AT]:
        genres = set(told(sample.rows[place])["genres"]) or {None}
        if not genres & seen and len(popular) < _POPULAR:
            popular.append(int(place))
            seen |= genres
    queries = np.r_[popular, cold].astype(np.int64)
    shown = {"fused": measures.nearest(sample.z, queries, _SHOWN)[0]}
    shown["title"] = measures.nearest(sample.titles, queries, _SHOWN)[0]
    return [
        {
            "item": told(sample.rows[query]),
            "events": int(counts[query]),
            **{name: [told(row) for row in sample.rows[places[number]]] for name, places in shown.items()},
        }
        for number, query in enumerate(queries)
    ]


def _describer(config: FuseConfig, data: OpenDataset) -> Any:
    """Title (or id) and genres of an item row."""
    genre = genre_name(config, data)
    values = [] if genre is None else Vocabulary.load(data.folder, genre).values
    column = None if genre is None else data.catalog.items.categoricals[genre]

    def told(row: int) -> dict[str, Any]:
        title = data.catalog.items.titles(np.array([row]))[0] or str(data.catalog.items.raw_ids(np.array([row]))[0])
        codes: list[int] = []
        if column is not None:
            span = slice(row, row + 1) if column.offsets is None else slice(*column.offsets[row : row + 2])
            codes = [int(code) for code in column.values[span] if code]
        return {"title": title, "genres": [str(values[code - 1]) for code in codes]}

    return told
