"""Managed tables sharded over ranks: rows start anew, and nothing depends on the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.distributed import id_keys, sharding
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.id_policy import ManagedIdsConfig
from mufasa_rec.distributed.managed_collision import managed_ids, start_rows_like
from mufasa_rec.distributed.managed_ids import ManagedIds
from mufasa_rec.distributed.sharding_config import ShardingConfig, TableSharding
from mufasa_rec.distributed.table_config import TableOptimizerConfig
from mufasa_rec.modules.sparse_arch import SparseArch, TableConfig, merge
from mufasa_rec.training.pipelining import check_pipelined, make_pipeline
from tests.helpers.ranks import run_ranks

ROWS, DIM, IDS, STD = 64, 16, 24, 0.1
ADAGRAD = TableOptimizerConfig(name="adagrad", learning_rate=0.1)
MANAGED = ManagedIdsConfig(interval=2, buckets=4, fallback_share=0.25, eviction="lru")


class Head(nn.Module):
    """Looks two managed tables and a plain one up."""

    def __init__(self, sparse: SparseArch) -> None:
        super().__init__()
        self.sparse = sparse
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        return loss_of(self.sparse(features), self.scale)


@torch.fx.wrap
def loss_of(looked_up: list[Any], scale: Tensor) -> tuple[Tensor, Tensor]:
    values = merge(looked_up)
    loss = sum((scale * values[name] - 0.5).square().mean() for name in ("item", "user", "brand"))
    assert isinstance(loss, Tensor)
    return loss, loss.detach()


@dataclass(frozen=True)
class Trial:
    """Settings of a trial."""

    optimizer: TableOptimizerConfig = field(default_factory=lambda: ADAGRAD)
    managed: ManagedIdsConfig = field(default_factory=lambda: MANAGED)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)


def build(env: DistributedEnv, trial: Trial) -> nn.Module:
    tables = [
        TableConfig(name="item", num_embeddings=ROWS, managed=trial.managed, drawn=True),
        TableConfig(name="user", num_embeddings=2 * ROWS, managed=trial.managed),
        TableConfig(name="brand", num_embeddings=10),
    ]
    sparse = SparseArch(tables, DIM, [], torch.device("meta"))
    sharding.fuse_optimizer(sparse.trained, trial.optimizer)
    model = Head(sparse)
    sharded = sharding.shard(model, sharding.make_plan(model, env.device, trial.sharding), env.device, trial.sharding)
    std = dict.fromkeys(sparse.drawn_tables, STD)
    sharding.initialise_tables(sharded, std, seed=0)
    start_rows_like(sharded, std, seed=0)
    return sharded


def features(ids: Tensor, drawn: Tensor) -> KeyedJaggedTensor:
    values = [ids % 10, ids, drawn, -ids]
    return KeyedJaggedTensor(
        keys=["brand", "item", "item#drawn", "user"],
        values=torch.cat(values),
        lengths=torch.tensor([len(part) for part in values], dtype=torch.int32),
        stride=1,
    )


def batch(step: int, env: DistributedEnv) -> KeyedJaggedTensor:
    """This rank's part of a step's ids, whose range drifts."""
    stream = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 60, (IDS,), generator=stream) + 10 * step
    drawn = torch.randint(0, 500, (8,), generator=stream)
    return features(*(part.chunk(env.world_size)[env.rank] for part in (ids, drawn)))


def shards_of(model: nn.Module) -> dict[str, list[tuple[int, Tensor]]]:
    return {
        name: [(part.first, part.weight.clone()) for part in parts]
        for name, parts in sharding.local_shards(model).items()
    }


def train(env: DistributedEnv, trial: Trial, steps: int) -> dict[str, Any]:
    """Train through the pipeline; returns losses, tables and ids of this rank."""
    model = build(env, trial)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith("scale")], lr=0.0)
    pipeline = make_pipeline(model, optimizer, env.device, lambda one: model(one))
    batches = iter([batch(step, env) for step in range(steps)])
    losses = []
    for _ in range(steps):
        losses.append(float(pipeline.progress(batches)))
        check_pipelined(model, pipeline)
    tables = managed_ids(model)
    ids = {name: (table._mch_sorted_raw_ids, table._mch_remapped_ids_mapping) for name, table in tables.items()}
    figures = {name: table.counters for name, table in tables.items()}
    return {"losses": losses, "weights": shards_of(model), "ids": ids, "figures": figures}


def test_admission_and_rows_are_the_same_on_one_rank_and_on_two() -> None:
    (alone,) = run_ranks(train, 1, Trial(), 12)
    both = run_ranks(train, 2, Trial(), 12)
    for name in ("item", "user"):
        for index in range(2):
            together = torch.cat([rank["ids"][name][index] for rank in both])
            assert torch.equal(alone["ids"][name][index], together)
        assert torch.equal(alone["figures"][name], both[0]["figures"][name] + both[1]["figures"][name])
        assert alone["figures"][name][5] > 0  # some were evicted
    mean = [sum(losses) / 2 for losses in zip(*(rank["losses"] for rank in both))]
    torch.testing.assert_close(torch.tensor(alone["losses"]), torch.tensor(mean), rtol=1e-4, atol=0)
    for name, ((_, whole),) in alone["weights"].items():
        parts = torch.cat([part for rank in both for _, part in rank["weights"].get(name, [])])
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def planted(env: DistributedEnv, trial: Trial) -> dict[str, Any]:
    """Ids are trained, then all new ones take their rows; looks at rows between that forward and its backward."""
    model = build(env, trial)
    old, new = (torch.arange(start, start + 500).chunk(env.world_size)[env.rank] for start in (0, 1_000))
    batches = [features(seen, seen[:0]).to(env.device) for seen in (old, old, old, old, new, new)]
    for before in batches[:-1]:
        model(before)[0].backward()
    ids = managed_ids(model)["item"]
    assert isinstance(ids, ManagedIds)
    optimizer = model.fused_optimizer.state_dict()["state"]  # type: ignore[union-attr, operator]
    trained, ids_before = shards_of(model)["t_item"][0][1], ids._mch_sorted_raw_ids.clone()
    state = [
        part.tensor
        for name, entries in optimizer.items()
        if "t_item" in name
        for value in entries.values()
        for part in value.local_shards()
    ]
    moments = [one.clone() for one in state]
    loss = model(batches[-1])[0]  # the interval ends: new ids take the rows of old ones
    raw = id_keys.raw_of(ids._mch_sorted_raw_ids)
    given = ids._mch_remapped_ids_mapping[(raw >= 1_000) & (raw < 1_500)] - ids._output_global_offset
    mask = torch.zeros(len(trained), dtype=torch.bool, device=env.device)
    mask[given] = True
    found = {
        "given": int(mask.sum()),
        "fresh": shards_of(model)["t_item"][0][1][mask].cpu(),
        "others_stay": torch.equal(shards_of(model)["t_item"][0][1][~mask], trained[~mask]),
        "moments_before": [float(one[mask].abs().min()) for one in moments],
        "moments_after": [float(one[mask].abs().max()) for one in state],
        "moments_of_others_stay": all(torch.equal(a[~mask], b[~mask]) for a, b in zip(moments, state)),
        "changed": not torch.equal(ids_before, ids._mch_sorted_raw_ids),
    }
    loss.backward()
    return found


@pytest.mark.parametrize(("optimizer", "states"), [("row_wise_adagrad", 1), ("adagrad", 1), ("sgd", 0)])
def test_evicted_rows_start_anew_weights_and_optimizer_state(optimizer: Any, states: int) -> None:
    check_planted(
        run_ranks(planted, 2, Trial(optimizer=TableOptimizerConfig(name=optimizer, learning_rate=0.1))), states
    )


def check_planted(found: list[dict[str, Any]], states: int) -> None:
    """All managed rows start anew, and no other."""
    assert sum(one["given"] for one in found) == 48
    for one in found:
        assert one["changed"]
        assert one["others_stay"]
        assert one["moments_of_others_stay"]
        assert len(one["moments_after"]) == states
        assert all(value > 0 for value in one["moments_before"])
        assert all(value == 0 for value in one["moments_after"])
    fresh = torch.cat([one["fresh"] for one in found])
    assert abs(float(fresh.mean())) < 0.02  # trained weights are near 0.5
    assert 0.08 < float(fresh.std()) < 0.12
    assert len(torch.unique(fresh)) > 0.99 * fresh.numel()


def plan_of(env: DistributedEnv, trial: Trial) -> str:
    try:
        build(env, trial)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (Trial(managed=ManagedIdsConfig(buckets=1)), "ids.item.managed.buckets=1: cannot be dealt to 2 ranks"),
        (
            Trial(sharding=ShardingConfig(tables={"item": TableSharding(types=("table_wise",))})),
            "sharding.tables['item']: its rows are managed (ids.item.policy), which needs types: [row_wise]",
        ),
    ],
)
def test_what_a_managed_table_cannot_be_is_refused_by_name(trial: Trial, message: str) -> None:
    assert all(message in told for told in run_ranks(plan_of, 2, trial))


def test_a_managed_table_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match=r"tables.each\['item'\].frozen=True: its rows are managed"):
        TableConfig(name="item", num_embeddings=ROWS, managed=ManagedIdsConfig(), frozen=True)
