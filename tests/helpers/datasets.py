"""A small data set with every kind of column: made from the generated catalog, prepared as a user would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mufasa_rec.data.importers import ColumnsConfig
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.synthetic import SyntheticConfig, generate

SMALL = SyntheticConfig(
    num_users=120,
    num_genres=3,
    topics_per_genre=2,
    items_per_topic=15,
    mean_events=20,
    repertoire=4,
    active_topics=2,
)
ACTIONS = ("buy", "like", "view")
DEVICES = ("phone", "tablet", "tv")


def write_source(folder: Path, seed: int = 0) -> Path:
    """Write interactions, items and two modalities of a small generated catalog into `folder`."""
    catalog = generate(seed, SMALL)
    rng = np.random.default_rng(seed)
    n = len(catalog.user)
    events = {
        "user": catalog.user,
        "item": catalog.item,
        "timestamp": catalog.timestamp,
        "action": pa.array([ACTIONS[i] for i in rng.integers(0, 3, n)]),
        "weight": rng.choice([0.0, 0.5, 1.0, 2.0], n).astype(np.float32),
        "device": pa.array([DEVICES[i] if i < 3 else None for i in rng.integers(0, 4, n)]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(events), folder / "interactions.parquet")
    kinds = pa.array([f"kind {i % 3}" if i % 7 else None for i in range(len(catalog.item_id))])
    items = {"item_id": catalog.item_id, "title": catalog.title, "genres": pa.array(catalog.genres), "kind": kinds}
    pq.write_table(pa.table(items), folder / "items.parquet")
    for name, (ids, vectors) in catalog.vectors.items():
        np.savez(folder / f"{name}.npz", item_id=ids, vector=vectors)
    return folder


def prepare_small(folder: Path, **options: object) -> str:
    """Prepare the small data set under `folder`; returns where it lies."""
    columns = ColumnsConfig(
        action="action", weight="weight", event_categoricals=("device",), item_categoricals=("genres", "kind")
    )
    source = write_source(folder / "source")
    output = str(folder / "dataset")
    prepare(PrepareConfig(input=str(source), output=output, columns=columns, **options))  # type: ignore[arg-type]
    return output
