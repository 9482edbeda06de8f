"""Generated sources, by seed: catalogs of items with events, and impressions with clicks."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from mufasa_rec.data import raw
from mufasa_rec.data.manifest_json import to_json
from mufasa_rec.data.raw import RawData, RawImpressions
from mufasa_rec.data.synthetic import RETURNS, SCATTERED, SyntheticConfig, generate
from mufasa_rec.data.synthetic_clicks import generate_clicks
from mufasa_rec.data.synthetic_clicks_config import SURFACES, ClicksConfig

PREFIX = "synthetic:"
CLICKS = "clicks"
KINDS = {"": SyntheticConfig(), "returns": RETURNS, "scattered": SCATTERED}


def read_generated(source: str, config: SyntheticConfig | None = None) -> RawData:
    """Generates the catalog of a seed and puts it into canonical form.

    Args:
        source: ``synthetic:<seed>`` or ``synthetic:<kind>:<seed>``.
        config: Sizes; None takes the kind's, without a kind the demo's.

    Raises:
        ValueError: The seed is no number, or the kind unknown.
    """
    kind, _, text = source.removeprefix(PREFIX).rpartition(":")
    if not text.isdecimal() or kind not in (*KINDS, CLICKS):
        raise ValueError(
            f"--input {source!r}: the seed must be a number; write synthetic:0, synthetic:returns:0, "
            "synthetic:scattered:0 or synthetic:clicks:0"
        )
    if kind == CLICKS:
        return read_clicks(int(text))
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


def read_clicks(seed: int, config: ClicksConfig | None = None) -> RawData:
    """Generates the impressions of a seed and puts them into canonical form; pages are dense positions and a surface.

    Args:
        seed: The seed.
        config: Sizes; None takes the demo's.
    """
    config = config or ClicksConfig()
    clicks = generate_clicks(seed, config)
    shown = pa.table(
        {
            raw.USER: clicks.user,
            raw.ITEM: clicks.item,
            raw.TIMESTAMP: clicks.timestamp,
            raw.REQUEST: clicks.request,
            f"{raw.LABEL_PREFIX}click": clicks.clicked.astype("float64"),
            f"{raw.CONTEXT_PREFIX}surface": pa.array([SURFACES[s] for s in clicks.surface], pa.large_string()),
            f"{raw.DENSE_PREFIX}position": clicks.position.astype("float64"),
        }
    )
    past = {raw.USER: clicks.click_user, raw.ITEM: clicks.click_item, raw.TIMESTAMP: clicks.click_timestamp}
    return RawData(
        name=f"synthetic-{CLICKS}-{seed}",
        events=pa.table(past),
        items=pa.table({raw.ITEM_ID: clicks.item_id, raw.AVAILABLE_FROM: clicks.available_from}),
        vectors=dict(clicks.vectors),
        absolute_times=True,
        choices=[f"generated from seed {seed}"],
        fingerprint=f"{PREFIX}{CLICKS}:{seed} {dataclasses.astuple(config)}",
        impressions=RawImpressions(table=shown, oracle=clicks.probability),
        notes={"synthetic": {"seed": seed, "config": to_json(config), "oracle_auc": clicks.oracle_auc()}},
    )
