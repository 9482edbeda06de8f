"""The generated catalog as a source: ``synthetic:<seed>``, or with planted returns ``synthetic:returns:<seed>``."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from mufasa_rec.data import raw
from mufasa_rec.data.manifest_json import to_json
from mufasa_rec.data.raw import RawData
from mufasa_rec.data.synthetic import RETURNS, SyntheticConfig, generate

PREFIX = "synthetic:"
KINDS = {"": SyntheticConfig(), "returns": RETURNS}


def read_generated(source: str, config: SyntheticConfig | None = None) -> RawData:
    """Generates the catalog of a seed and puts it into canonical form.

    Args:
        source: ``synthetic:<seed>`` or ``synthetic:<kind>:<seed>``.
        config: Sizes; None takes the kind's, without a kind the demo's.

    Raises:
        ValueError: The seed is no number, or the kind unknown.
    """
    kind, _, text = source.removeprefix(PREFIX).rpartition(":")
    if not text.isdecimal() or kind not in KINDS:
        raise ValueError(f"--input {source!r}: the seed must be a number; write synthetic:0 or synthetic:returns:0")
    config = config or KINDS[kind]
    catalog = generate(int(text), config)
    return RawData(
        name="-".join(filter(None, ["synthetic", kind, text])),
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
