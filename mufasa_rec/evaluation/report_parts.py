"""What the report's template shows: rows, comparisons, slices and figures, computed from the records on file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from mufasa_rec.evaluation import figures
from mufasa_rec.evaluation.figures import Bar, Curve, colour_of

# Label and meaning of each row, in the order of the page.
ROWS = {
    "popularity": ("Popularity", "the same list for everyone: items by their number of training events"),
    "markov": ("Markov chain", "what most often followed the user's last item in training"),
    "model_without_content": ("Model, no content", "the same model, trained without content vectors"),
    "model": ("Model", "the trained model"),
    "oracle": ("Oracle", "ranks by the generator's true distribution: the ceiling, known for generated data only"),
}
_SMALL_SLICE = 100
SPEEDS = {
    "samples_per_s": "rows/s",
    "events_per_s": "events/s",
    "step_ms": "ms a step",
    "padding_share": "padding",
    "data_wait_share": "waiting for data",
}
Record = Mapping[str, Any]


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def label_of(row: str) -> str:
    """What the page calls a row."""
    return ROWS[row][0] if row in ROWS else row.replace("_", " ")


def ordered(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows in the page's order, with label, meaning and colour."""
    place = {name: number for number, name in enumerate(ROWS)}
    ordered = sorted(rows, key=lambda row: place.get(row["row"], len(place)))
    return [
        {
            **row,
            "label": label_of(row["row"]),
            "meaning": ROWS.get(row["row"], ("", ""))[1],
            "colour": colour_of(row["row"]),
        }
        for row in ordered
    ]


def chance(items: int | None) -> dict[str, float] | None:
    """What a random ranking of all items scores in the mean."""
    if not items:
        return None
    found = min(10, items)
    gain = sum(1 / math.log2(rank + 1) for rank in range(1, found + 1))
    reciprocal = math.log(items) + 0.5772 + 1 / (2 * items) if items > 20 else sum(1 / r for r in range(1, items + 1))
    return {"hr@10": found / items, "ndcg@10": gain / items, "mrr": reciprocal / items}


def summary(rows: Sequence[Record]) -> dict[str, Any]:
    """The row that the page is about, and how it compares."""
    by_name = {row["row"]: row for row in rows}
    main = by_name.get("model") or rows[-1]

    def ratio(other: str) -> float | None:
        gain, below = main.get("ndcg@10"), by_name.get(other, {}).get("ndcg@10")
        return gain / below if other != main["row"] and is_number(gain) and is_number(below) and below else None

    names = ("popularity", "markov", "model_without_content", "oracle")
    return {"main": main, "ratios": {name: ratio(name) for name in names}, "by_name": by_name}


def _bar(row: Record, metric: str, values: Record | None = None) -> Bar | None:
    value = (values or row).get(metric)
    if not is_number(value):
        return None
    low, high = (row.get(f"{metric}_{end}") if values is None else None for end in ("low", "high"))
    if not is_number(low) or not is_number(high):
        low = high = None
    return Bar(label=row["label"], colour=row["colour"], value=value, low=low, high=high)


def metric_figures(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Bars of HR@10 and NDCG@10."""
    captions = {
        "hr@10": ("HR@10", "Share of users whose next item is among the first ten."),
        "ndcg@10": (
            "NDCG@10",
            "The same, but a place nearer to the top counts more: 1 for the first, 0.29 for the tenth.",
        ),
    }
    found = []
    for metric, (title, caption) in captions.items():
        bars = [bar for row in rows if (bar := _bar(row, metric))]
        if bars:
            text = f"{title}: " + ", ".join(f"{bar.label} {bar.value:.4f}" for bar in bars)
            found.append({"title": title, "caption": caption, "svg": figures.metric_bars(bars, text)})
    return found


def curve_figures(runs: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Learning curves of the runs: training loss, and NDCG@10 on validation."""
    kinds = (
        ("train", "loss", "Training loss", "Each reported loss thin, its moving average thick."),
        (
            "validation",
            "ndcg@10",
            "NDCG@10 on validation",
            "Measured during training; the large dot is the best value.",
        ),
    )
    found = []
    for kind, metric, title, caption in kinds:
        curves = [curve for name, lines in runs.items() if (curve := _curve(name, lines, kind, metric))]
        if curves:
            text = f"{title} over training steps: " + ", ".join(f"{c.label} ends at {c.y[-1]:.4f}" for c in curves)
            svg = figures.learning_curves(curves, text, smooth=kind == "train")
            found.append({"title": title, "caption": caption, "svg": svg})
    return found


def _curve(name: str, lines: Iterable[Record], kind: str, metric: str) -> Curve | None:
    points = [
        (line["step"], line[metric])
        for line in lines
        if line.get("kind") == kind and is_number(line.get("step")) and is_number(line.get(metric))
    ]
    if not points:
        return None
    x, y = zip(*points, strict=True)
    return Curve(label=label_of(name), colour=colour_of(name), x=x, y=y)


def speed(name: str, lines: Sequence[Record]) -> dict[str, Any]:
    """Length of a run and medians of its accounting lines."""
    train = [line for line in lines if line.get("kind") == "train"]

    def last(field: str) -> Any:
        return max((line[field] for line in train if is_number(line.get(field))), default=None)

    def median(field: str) -> Any:
        return statistics.median(values) if (values := [x[field] for x in train if is_number(x.get(field))]) else None

    medians = {field: median(field) for field in SPEEDS}
    return {"label": label_of(name), "steps": last("step"), "time_s": last("time_s"), **medians}


def slices(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Every slice of the users with its values in each row that has it."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("slices") or {}))
    found = []
    for name in names:
        values = [(row.get("slices") or {}).get(name) or {} for row in rows]
        users = max((value.get("users") or 0 for value in values), default=0)
        found.append({"label": name.replace("_", " "), "users": users, "values": values, "small": users < _SMALL_SLICE})
    return found


def slice_figures(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """HR@10 and NDCG@10 of every row in every slice that has users."""
    found = []
    for metric, title in (("hr@10", "HR@10 by slice"), ("ndcg@10", "NDCG@10 by slice")):
        shown = {}
        for part in slices(rows):
            pairs = zip(rows, part["values"], strict=True)
            bars = [bar for row, values in pairs if (bar := _bar(row, metric, values))]
            if part["users"] and bars:
                shown[f"{part['label']} ({part['users']:,})"] = bars
        if shown:
            svg = figures.slice_dots(shown, f"{title}: {', '.join(shown)}")
            found.append({"title": title, "caption": "In brackets: how many users.", "svg": svg})
    return found


def histograms(found: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Histograms of history length and item popularity, those that are there."""
    kinds = {
        "history_length": (
            "How long histories are",
            "events before the target",
            "Number of users by length of history.",
        ),
        "item_popularity": (
            "How popular items are",
            "training events of an item",
            "Number of items by training events.",
        ),
    }
    shown = []
    for key, (title, x_label, caption) in kinds.items():
        edges, counts = (found.get(key, {}).get(field) or [] for field in ("edges", "counts"))
        if counts and len(edges) == len(counts) + 1:
            svg = figures.histogram(edges, counts, x_label, f"{title}: {sum(counts):,} in {len(counts)} bins")
            shown.append({"title": title, "caption": caption, "svg": svg})
    return shown
