"""Rows found by probing: what a CPU can show of it, by planting ids where FBGEMM's kernel looks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from mufasa_rec.distributed import id_keys
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.id_policy import IdPolicyConfig, IdsConfig, ManagedIdsConfig
from mufasa_rec.distributed.managed_collision import managed_ids
from mufasa_rec.distributed.multi_probe_ids import MultiProbeIds
from mufasa_rec.modules.sparse_arch import merge
from tests.distributed.test_managed_collision import Trial, build, features
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
PROBED = ManagedIdsConfig(method="multi_probe", eviction="lru", interval=2, buckets=4, max_probe=16)


def look_up(ids: MultiProbeIds, raw: Tensor) -> Tensor:
    sent = ids.preprocess({"t": JaggedTensor(values=raw, lengths=torch.tensor([len(raw)]))})
    return ids.remap(ids.profile(sent))["t"].values()


def plant(ids: MultiProbeIds, raw: Tensor) -> Tensor:
    """Give each id the row that its hash says, as long as no other has it; returns the ids that got one."""
    keys, rows = id_keys.keys_of(raw), look_up(ids, raw) - ids.first_row
    given = []
    for one, key, row in zip(raw.tolist(), keys, rows):
        if int(ids._hash_zch_identities[row, 0]) == -1:
            ids._hash_zch_identities.data[row, 0] = key
            given.append(one)
    return torch.tensor(given)


def test_id_finds_its_own_row_and_others_share_rows_of_their_bucket() -> None:
    ids = MultiProbeIds("item", 64, PROBED, CPU).eval()
    own = plant(ids, torch.arange(-20, 20))
    rows = look_up(ids, own)
    assert torch.equal(id_keys.raw_of(ids._hash_zch_identities[rows, 0]), own)
    assert len(rows.unique()) == len(rows) == 64 - int(ids.open_slots())
    others = torch.arange(1_000, 1_200)
    places = look_up(ids, others)
    assert torch.equal(places // 16, id_keys.bucket_of(id_keys.keys_of(others), 4))
    assert torch.equal(look_up(ids, others), places)


def test_part_of_a_rank_finds_the_rows_that_the_whole_table_finds() -> None:
    whole = MultiProbeIds("item", 64, PROBED, CPU).eval()
    own = plant(whole, torch.arange(40))
    part = whole.rebuild_with_output_id_range((32, 64), [0, 32, 64], CPU).eval()
    part._hash_zch_identities.data.copy_(whole._hash_zch_identities.data[32:])
    here = own[id_keys.bucket_of(id_keys.keys_of(own), 4) >= 2]
    assert len(here) > 5
    assert torch.equal(look_up(part, here), look_up(whole, here))
    with pytest.raises(ValueError, match=r"ids\.item: rows 0 to 8 of a rank are no whole buckets of 16 rows"):
        whole.rebuild_with_output_id_range((0, 8), [0, 8, 64], CPU)


def judged(env: DistributedEnv, trial: Trial) -> dict[str, Any]:
    """Vectors of ids in a table that is only looked up, its ids planted; this rank's share of the ids."""
    model = build(env, trial).eval()
    ids = managed_ids(model)["item"]
    assert isinstance(ids, MultiProbeIds)
    whole = MultiProbeIds("item", ids.table_rows, trial.managed, CPU).eval()
    own = plant(whole, torch.arange(40))
    part = ids._hash_zch_identities.data
    part.copy_(whole._hash_zch_identities.data[ids.first_row : ids.first_row + len(part)])
    raw = own.chunk(env.world_size)[env.rank]
    with torch.no_grad():
        looked_up = merge(model.module.sparse(features(raw, raw[:0])))  # type: ignore[union-attr, operator]
    state = model.state_dict()
    return {
        "vectors": looked_up["item"],
        "saved": sorted(name.rsplit(".", 1)[-1] for name in state if "t_item" in name),
        "step": ids.step,
    }


def test_sharded_lookup_of_planted_ids_is_the_same_on_one_rank_and_on_two() -> None:
    trial = Trial(managed=PROBED)
    (alone,) = run_ranks(judged, 1, trial)
    both = run_ranks(judged, 2, trial)
    assert torch.equal(alone["vectors"], torch.cat([rank["vectors"] for rank in both]))
    assert len(alone["vectors"].unique(dim=0)) == len(alone["vectors"])
    assert {"_hash_zch_identities", "_hash_zch_metadata", "_current_iter_tensor"} <= set(alone["saved"])
    assert alone["step"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eviction": "lfu"}, "ids...managed.eviction='lfu': method 'multi_probe' admits at first sight"),
        ({"eviction": "lru", "min_count": 2}, "ids...managed.min_count=2: method 'multi_probe' admits at first sight"),
        ({"eviction": "lru", "max_probe": 0}, "ids...managed.max_probe=0: choose 1 or more"),
    ],
)
def test_what_the_method_cannot_do_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ManagedIdsConfig(method="multi_probe", **settings)
    assert message in str(error.value)


def test_training_on_a_cpu_is_refused_by_name() -> None:
    config = IdsConfig(user=IdPolicyConfig(policy="managed_collision", rows=64, managed=PROBED))
    config.refuse_on("cuda")
    with pytest.raises(ValueError, match=r"ids\.user\.managed\.method='multi_probe'.*choose 'sorted'"):
        config.refuse_on("cpu")


def trained(env: DistributedEnv, trial: Trial) -> dict[str, Any]:
    """Steps on a GPU: ids take rows, come back to them, lose them, and rows that are taken start anew."""
    model = build(env, trial)
    ids = managed_ids(model)["item"]
    assert isinstance(ids, MultiProbeIds)
    rows = []
    for ahead in (0, 0, 0, 1_000, 1_000, 1_000, 1_000):
        raw = torch.arange(ahead, ahead + 40)
        loss, _ = model(features(raw, raw[:0]).to(env.device))
        loss.backward()
        rows.append(look_up(ids.eval(), raw.to(env.device)).cpu())
        ids.train()
    return {
        "stays": torch.equal(rows[1], rows[2]),
        "held": id_keys.raw_of(ids._hash_zch_identities.data[:, 0]).cpu(),
        "counters": ids.counters.cpu(),
        "step": ids.step,
    }


@pytest.mark.gpu
def test_ids_take_rows_keep_them_and_lose_them_to_newer_ones_on_a_gpu() -> None:
    (found,) = run_ranks(trained, 1, Trial(managed=PROBED), on_gpus=True)
    assert found["stays"]
    assert found["step"] == 7
    new = ((found["held"] >= 1_000) & (found["held"] < 1_040)).sum()
    assert new >= 38  # two ids may want one last place in the same step
    counted, hits, lookups, fallbacks, admitted, evicted = found["counters"].tolist()
    assert counted == lookups == 7 * 40
    assert hits + fallbacks == lookups
    assert admitted >= 78
    assert 0 < evicted <= admitted
