"""The generated catalog as a source: ``--input synthetic:<seed>``."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from mufasa_rec.data import raw
from mufasa_rec.data.manifest_json import to_json
from mufasa_rec.data.raw import RawData
from mufasa_rec.data.synthetic import SyntheticConfig, generate

PREFIX = "synthetic:"


def read_generated(source: str, config: SyntheticConfig | None = None) -> RawData:
    """Generates the catalog of a seed and puts it into canonical form.

    Args:
        source: ``synthetic:<seed>``.
        config: Sizes; None takes the demo's.

    Raises:
        ValueError: The seed is no number.
    """
    text = source.removeprefix(PREFIX)
    if not text.isdecimal():
        raise ValueError(f"--input {source!r}: the seed must be a number; write synthetic:0")
    config = config or SyntheticConfig()
    catalog = generate(int(text), config)
    return RawData(
        name=f"synthetic-{text}",
        events=pa.table({raw.USER: catalog.user, raw.ITEM: catalog.item, raw.TIMESTAMP: catalog.timestamp}),
        items=pa.table(
            {
                raw.ITEM_ID: catalog.item_id,
                raw.TITLE: pa.array(catalog.title, pa.large_string()),
                raw.AVAILABLE_FROM: catalog.available_from,
                "genres": pa.array(catalog.genres, pa.large_list(pa.large_string())),
            }
        ),
        vectors=dict(catalog.vectors),
        absolute_times=True,
        choices=[f"generated from seed {text}"],
        fingerprint=f"{source} {dataclasses.astuple(config)}",
        oracle={"user": catalog.oracle_user, "rank": catalog.oracle_rank, "top": catalog.oracle_top},
        notes={"synthetic": {"seed": int(text), "config": to_json(config)}},
    )
