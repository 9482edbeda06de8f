"""How the ids of each feature of a run find their rows: the configuration, completed by `dataset.json`."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from mufasa_rec.config import RunConfig
from mufasa_rec.data.batch import ITEM
from mufasa_rec.data.id_keys import HashedKeys, RawKeys
from mufasa_rec.data.ranking_batch import USER
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.id_policy import IdPolicyConfig

logger = logging.getLogger(__name__)


def policies(config: RunConfig, manifest: DatasetManifest) -> dict[str, IdPolicyConfig]:
    """The policy of every feature that keeps raw ids."""
    named = {ITEM: config.ids.item, USER: config.ids.user}
    features = manifest.features
    return {name: own.chosen(features[name].id_policy if name in features else None) for name, own in named.items()}


def keys_of(policy: IdPolicyConfig) -> HashedKeys | RawKeys | None:
    """What gives ids their embedding keys; None for a vocabulary."""
    if policy.policy == "hash":
        return HashedKeys(policy.rows, policy.salts)
    return RawKeys(policy.rows) if policy.policy == "managed_collision" else None


def without_names(config: RunConfig, manifest: DatasetManifest) -> dict[str, str]:
    """Tables whose rows stand for no id that is known beforehand, with their policies."""
    found = policies(config, manifest)
    return {name: str(own.policy) for name, own in found.items() if own.policy != "vocabulary"}


def tell(ids: Mapping[str, np.ndarray], found: Mapping[str, IdPolicyConfig]) -> None:
    """Log what is to be expected of hashed ids.

    Args:
        ids: The distinct ids that are known, by feature.
        found: Policies by feature.
    """
    for name, known in ids.items():
        keys = keys_of(found[name])
        if isinstance(keys, HashedKeys):
            logger.info(
                "%s ids: hashed to %d rows with %d salt(s); of the %d that are known %.2f%% share every row with "
                "another one (%.2f%% expected)",
                name, keys.size, keys.salts, len(known), 100 * keys.measured_collisions(known),
                100 * keys.expected_collisions(len(known)),
            )  # fmt: skip
        elif isinstance(keys, RawKeys):
            own = found[name]
            if own.managed.method == "multi_probe":
                logger.info(
                    "%s ids: %d rows in %d buckets, given at first sight within %d places of an id's hash, which keeps "
                    "its row for %d steps after it was seen",
                    name, own.rows, own.managed.buckets, own.managed.max_probe, own.managed.interval,
                )  # fmt: skip
                continue
            logger.info(
                "%s ids: %d rows in %d buckets, given by %s every %d steps to ids seen %d time(s) or more; %d rows for "
                "all others",
                name, own.rows, own.managed.buckets, own.managed.eviction, own.managed.interval, own.managed.min_count,
                own.managed.buckets * own.managed.fallback_rows(own.rows // own.managed.buckets),
            )  # fmt: skip
