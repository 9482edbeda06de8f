"""A data set that is only described: what `dataset.json` would say of a catalog that nobody has prepared yet."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from mufasa_rec.data.schema import (
    FORMAT_VERSION,
    ContentRef,
    DatasetManifest,
    Feature,
    ImpressionsInfo,
    ItemStoreRef,
    SplitRef,
    TimeInfo,
)

# The catalogs that presets for planning are made for.
CATALOGS: dict[str, dict[str, Any]] = {"billion": {"items": 4_000_000_000, "content": {"fused": 128}}}


def imagined_manifest(
    *, items: int, content: Mapping[str, int] | None = None, users: int = 0, candidates: int = 10
) -> DatasetManifest:
    """Describe a catalog.

    Args:
        items: Items, each with a vector of every modality.
        content: Width of each modality's vectors.
        users: Users with a row of their own, for ranking; 0 for data without impressions.
        candidates: Candidates of a request, for ranking.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> imagined_manifest(items=1000, content={"title": 64}).content["title"].rows
        1000
    """
    sizes = {"items": items, "candidates": candidates, **{f"content {name}": w for name, w in (content or {}).items()}}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: choose 1 or more.")
    shown = ImpressionsInfo(
        tasks=["click"], requests=users, impressions=users * candidates, users=users, rates={"click": 0.1}
    )
    return DatasetManifest(
        format_version=FORMAT_VERSION,
        name="imagined",
        created_by="torchx_apps.plan",
        time=TimeInfo(absolute=True, timezone="UTC"),
        features={"item": Feature(level="event", kind="id", id_policy="vocabulary", cardinality=items)},
        partitions=[],
        buckets=1,
        items=ItemStoreRef(generation="0", count=items, checksum=""),
        content={
            name: ContentRef(generation="0", width=width, dtype="float16", rows=items, checksum="")
            for name, width in (content or {}).items()
        },
        splits={"leave_one_out": SplitRef(id="leave_one_out", hash="")},
        tie_rule="",
        repeat_share=0.0,
        mask_seen_default=True,
        impressions=shown if users else None,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that describe a catalog."""
    parser.add_argument("--items", metavar="N", type=float, help="items of a catalog that is not there yet")
    parser.add_argument(
        "--content", metavar="NAME=WIDTH", nargs="+", default=[], help="its content modalities, with --items"
    )
    parser.add_argument("--users", metavar="N", type=float, default=0, help="its users, with --items, for ranking")


def described(options: argparse.Namespace) -> DatasetManifest | None:
    """The catalog that options describe; None when they describe none.

    Raises:
        ValueError: For a size that is no number, or below 1.
    """
    if options.items is None:
        return None
    widths = {name: int(width) for name, width in numbers("--content", options.content).items()}
    return imagined_manifest(items=int(options.items), content=widths, users=int(options.users))


def numbers(option: str, given: Sequence[str]) -> dict[str, float | int]:
    """`NAME=NUMBER` pairs; whole numbers as such.

    Raises:
        ValueError: For a pair that is none.
    """
    found: dict[str, float | int] = {}
    for pair in given:
        name, _, text = pair.partition("=")
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{option} {pair}: give NAME=NUMBER.") from None
        found[name] = int(number) if number == int(number) else number
    return found
