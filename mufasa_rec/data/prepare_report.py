"""The report of ``prepare`` as a page: what came in, what was taken for what, what was dropped, what came out."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from mufasa_rec.data.content import coverage_lines
from mufasa_rec.data.schema import DatasetManifest, Feature

REPORT_JSON = "report.json"
REPORT_TEXT = "report.txt"


def report_text(manifest: DatasetManifest, report: dict[str, Any]) -> str:
    """The page.

    Args:
        manifest: The data set.
        report: What ``report.json`` holds.
    """
    sections = [
        _head(manifest, report),
        _section("Read", _by_file(report["choices"])),
        _section("Not used", _not_used(report["ignored"])),
        _section("Dropped", _dropped(report)),
        _section("Splits", _splits(report)),
        _section("Impressions", _impressions(report)),
        _section("Content vectors", _content(manifest)),
        _section("Features", _features(manifest)),
    ]
    return "\n".join(section for section in sections if section)


def _section(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return "\n".join([title, *(f"  {line}" for line in lines), ""]) if lines else ""


def _head(manifest: DatasetManifest, report: dict[str, Any]) -> str:
    found = manifest.statistics
    lines = [
        f"{found['users']:,} users, {found['items']:,} items ({found['items_with_events']:,} with events), "
        f"{found['events']:,} events; {report['events_read']:,} were read from {report['input']} "
        f"in {report['seconds']} s",
        f"events per user   {_quantiles(found['events_per_user'])}",
        f"events per item   {_quantiles(found['events_per_item'])}",
        f"times             {_times(manifest)}",
        f"repeats           {_repeats(manifest)}",
    ]
    if found["items_only_in_events"]:
        lines.append(
            f"{found['items_only_in_events']:,} items occur in events only: they have no title and no categoricals"
        )
    return _section(f"Data set {manifest.name}", lines)


def _quantiles(values: dict[str, float]) -> str:
    words = {"min": "min", "p10": "10 %", "p50": "median", "p90": "90 %", "p99": "99 %", "max": "max", "mean": "mean"}
    return " · ".join(f"{words[name]} {_number(value)}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"


def _times(manifest: DatasetManifest) -> str:
    time = manifest.time
    if not time.absolute or time.minimum_ms is None or time.maximum_ms is None:
        return "only the order is known: no time split, no time features"
    days = (
        datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d")
        for ms in (time.minimum_ms, time.maximum_ms)
    )
    ties = manifest.statistics["tie_share"]
    return f"{' to '.join(days)} (UTC); {ties:.1%} of events share their time with the user's event before"


def _repeats(manifest: DatasetManifest) -> str:
    share = manifest.repeat_share
    masking = "masks them" if manifest.mask_seen_default else "does not mask them"
    return f"{share:.2%} of targets are items the user had before; evaluation {masking} by default"


def _by_file(lines: Iterable[str]) -> list[str]:
    """Lines ``file: what`` as one line per file."""
    files: dict[str, list[str]] = {}
    for line in lines:
        file, colon, what = line.partition(": ")
        files.setdefault(file, []).append(what if colon else "")
    return [f"{file:<22} {', '.join(what)}".rstrip() for file, what in files.items()]


def _not_used(ignored: dict[str, str]) -> list[str]:
    lines = _by_file(name if ": " in name else f"{name}: {reason}" for name, reason in ignored.items())
    columns = any(": " in name for name in ignored)
    hint = "(columns can be named: --columns.event-categoricals, --columns.item-categoricals, --columns.label, ...)"
    return [*lines, *([hint] if columns else [])]


def _dropped(report: dict[str, Any]) -> list[str]:
    return [f"{count:>9,}  {reason}" for reason, count in report["dropped"].items()] or ["nothing"]


def _splits(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, split in report["splits"].items():
        parts = split["parts"]
        rows = "requests" if split["policy"] == "impressions" else "users"
        borders = {
            what: datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M")
            for what, ms in split["borders"].items()
        }
        lines.append(
            f"{name:<14} train {parts['train']['targets']:,} targets in {parts['train']['rows']:,} rows, validation "
            f"{parts['validation']['rows']:,} {rows}, test {parts['test']['rows']:,} {rows}  [{split['hash'][:8]}]"
        )
        if borders:
            lines.append(f"{'':<14} {', '.join(f'{what} from {when} UTC' for what, when in borders.items())}")
    return lines + [f"{name:<14} not made: {reason}" for name, reason in report["splits_not_made"].items()]


def _impressions(report: dict[str, Any]) -> list[str]:
    found = report.get("impressions")
    if not found:
        return []
    lines = [
        f"{found['impressions']:,} in {found['requests']:,} requests, {report['history_length_mean']:.1f} events "
        "strictly before each",
        *(f"{task:<14} {rate:.1%} of the training impressions" for task, rate in found["rates"].items()),
    ]
    context = [f"context.{name} ({size:,} values)" for name, size in found["context"].items()]
    columns = [*context, *(f"dense.{name}" for name in found["dense"])]
    if columns:
        lines.append(", ".join(columns))
    if found["negative_rate"] < 1:
        lines.append(f"the source kept {found['negative_rate']:.2%} of its negatives: training corrects for it")
    oracle = report["notes"].get("synthetic", {}).get("oracle_auc")
    if oracle is not None:
        lines.append(f"oracle         AUC {oracle:.4f} over all impressions, by the true probabilities")
    return lines


def _content(manifest: DatasetManifest) -> list[str]:
    lines = []
    for name, ref in manifest.content.items():
        lines.append(f"{name:<14} {ref.rows:,} vectors, {ref.width} wide, {ref.dtype}")
        lines += [f"{'':<14} {line}" for line in coverage_lines(name, ref.coverage)]
    return lines


def _features(manifest: DatasetManifest) -> list[str]:
    lines = []
    found = manifest.statistics["features"]
    for name, feature in manifest.features.items():
        values = found.get(name, {})
        words = [_kind(feature), f"{feature.cardinality:,} distinct" if feature.cardinality else ""]
        if values.get("null_share"):
            words.append(f"{values['null_share']:.1%} of {feature.level}s have none")
        if "values_per_item" in values:
            words.append(f"{values['values_per_item']['mean']:.1f} an item")
        if "quantiles" in values:
            words.append(_quantiles(values["quantiles"]))
        lines.append(f"{name:<14} {', '.join(word for word in words if word)}")
    return lines


def _kind(feature: Feature) -> str:
    many = "multi-valued " if feature.multi_valued else ""
    stored = ", text stored by hash" if feature.kind == "id" and feature.id_type == "string" else ""
    return f"{many}{feature.kind} of {feature.level}s{stored}"
