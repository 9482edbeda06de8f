"""A small source of impressions, made from the generated ones, in every raw form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data.importers.columns import ColumnsConfig
from mufasa_rec.data.importers.impression_columns import ImpressionsConfig
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.synthetic_clicks import Clicks, generate_clicks
from mufasa_rec.data.synthetic_clicks_config import SURFACES, ClicksConfig

SMALL = ClicksConfig(num_users=40, num_items=400, requests=6, candidates=4, early_clicks=(1, 8))
LABELS = {"click": "clicked", "like": "liked"}


def impressions_table(clicks: Clicks) -> dict[str, Any]:
    """Columns of the impressions; every third click is a like, numbers have gaps."""
    n = len(clicks.item)
    price = np.random.default_rng(0).normal(10.0, 3.0, n)
    price[::17] = np.nan
    return {
        "user": clicks.user,
        "item": clicks.item,
        "timestamp": clicks.timestamp,
        "page": pa.array([f"page {request}" for request in clicks.request]),
        "clicked": clicks.clicked.astype(np.int64),
        "liked": (clicks.clicked & (np.arange(n) % 3 == 0)).astype(np.int64),
        "surface": pa.array([SURFACES[s] for s in clicks.surface]),
        "price": price,
    }


def write_source(folder: Path, *, events: bool = True, seed: int = 0, **columns: Any) -> Path:
    """Write impressions, with `events` also the clicks, and vectors into `folder`; `columns` replace or add some."""
    folder.mkdir(parents=True, exist_ok=True)
    clicks = generate_clicks(seed, SMALL)
    table = impressions_table(clicks) | columns
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), folder / "impressions.parquet")
    if events:
        past = {"user": clicks.click_user, "item": clicks.click_item, "timestamp": clicks.click_timestamp}
        pq.write_table(pa.table(past), folder / "interactions.parquet")
    for name, (ids, vectors) in clicks.vectors.items():
        np.savez(folder / f"{name}.npz", item_id=ids, vector=vectors)
    return folder


def impressions_config(**change: Any) -> ColumnsConfig:
    """What the columns of the small source mean."""
    fields: dict[str, Any] = {"labels": LABELS, "request": "page", "context": ("surface",), "dense": ("price",)}
    return ColumnsConfig(impressions=ImpressionsConfig(**(fields | change)))


def prepare_impressions(folder: Path, source: Path | None = None, **change: Any) -> str:
    """Prepare the small source under `folder`; returns where the data set lies."""
    output = str(folder / "dataset")
    source = source or write_source(folder / "source")
    prepare(PrepareConfig(input=str(source), output=output, columns=impressions_config(**change)))
    return output
