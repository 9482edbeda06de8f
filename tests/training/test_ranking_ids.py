"""Rankers whose items are hashed and whose users have managed rows, and the other way round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mufasa_rec.config import RunConfig
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.distributed.id_policy import IdPolicyConfig, IdsConfig, ManagedIdsConfig
from mufasa_rec.distributed.sharding import TableOptimizerConfig
from mufasa_rec.models.ranker_config import RankerConfig
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.trainer_config import TrainerConfig
from tests.helpers.impressions import prepare_impressions
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, train_in, weights_of

HASH = IdPolicyConfig(policy="hash", rows=300, salts=2)
MANAGED = IdPolicyConfig(
    policy="managed_collision", rows=64, managed=ManagedIdsConfig(buckets=4, interval=2, eviction="lfu")
)


@pytest.fixture(scope="module")
def impressions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_impressions(tmp_path_factory.mktemp("ranking"))


def config_of(dataset: str, ids: IdsConfig) -> RunConfig:
    return RunConfig(
        task="ranking",
        data=replace(
            DataConfig(dataset=dataset, split="impressions", batch_size=32, num_readers=8, max_history=10, min_count=2),
            dedup=False,
        ),
        ids=ids,
        ranker=RankerConfig(width=16, content_interest="none", hidden=(16,), dropout=0.0),
        optimizer=OptimizerConfig(warmup_steps=2, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.05)),
        trainer=TrainerConfig(epochs=9, max_steps=8, log_every=4, patience=0, monitor="auc"),
    )


@pytest.mark.parametrize(
    ("ids", "managed"), [(IdsConfig(item=HASH, user=MANAGED), "user"), (IdsConfig(item=MANAGED, user=HASH), "item")]
)
def test_ranker_learns_alike_on_one_rank_and_on_two(
    impressions: str, tmp_path: Path, ids: IdsConfig, managed: str
) -> None:
    for world in (1, 2):
        run_ranks(train_in, world, config_of(impressions, ids), tmp_path / str(world))
    one, two = (metrics_of(tmp_path / str(world), "train") for world in (1, 2))
    np.testing.assert_allclose([a["loss"] for a in one], [a["loss"] for a in two], rtol=1e-4)
    assert {name.split("_")[0] for name in one[0] if name.endswith("_hit_share")} == {managed}
    for name in ("hit_share", "admitted", "evicted", "counted"):
        assert [line[f"{managed}_{name}"] for line in one] == [line[f"{managed}_{name}"] for line in two]
    assert one[-1][f"{managed}_hit_share"] > 0.2
    rows = {name.split(".")[-2]: len(w) for name, w in weights_of(tmp_path / "2").items() if name.endswith(".weight")}
    assert (rows["t_user"], rows["t_item"]) == ((64, 300) if managed == "user" else (300, 64))
