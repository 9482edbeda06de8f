"""The ranker: its loss, requests against single impressions, what may not change its logits, and its rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.ranker_build import build_arch
from mufasa_rec.models.ranker_config import ROWS, RankerConfig, RankingFeatures, comparator
from mufasa_rec.modules.ranking_objective import RankingObjective
from mufasa_rec.modules.similarity_interest import SimilarityInterestConfig
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from tests.helpers.ranks import run_ranks
from tests.tensors import gradients
from torchx_apps.benchmarks._requests import Requests, make_requests, one_by_one, part_of, ranker_of, ranking_features

ITEMS = 30
FEATURES = ranking_features({"title": 6, "image": 3}, max_history=16)
LENGTHS, CANDIDATES = [5, 0, 9, 1, 3], [3, 2, 1, 0, 8]
INTERESTS = ["none", "dmae", "sal", "dmae+sal", "simtier", "early_fusion"]


def make_config(**values: Any) -> RankerConfig:
    sizes: dict[str, Any] = {"width": 8, "hidden": (16, 8), **values}
    return RankerConfig(dmae=SimilarityInterestConfig(width=8), sal=SparseAttentionConfig(dropout=0.0), **sizes)


def make_ranker(config: RankerConfig | None = None, features: RankingFeatures = FEATURES) -> Ranker:
    torch.manual_seed(0)
    return ranker_of(config or make_config(), features, ITEMS)


def make_batch(lengths: list[int] = LENGTHS, candidates: list[int] = CANDIDATES) -> Requests:
    return make_requests(lengths, candidates, FEATURES, num_items=ITEMS)


@pytest.mark.parametrize(
    ("interest", "attention"), [*((x, "full") for x in INTERESTS), ("sal", "sparse"), ("dmae+sal", "sparse")]
)
def test_requests_and_single_impressions_have_the_same_logits_loss_and_gradients(interest: str, attention: str) -> None:
    model, results = make_ranker(make_config(content_interest=interest, attention=attention)), []
    batch = make_batch()
    for given in (batch, one_by_one(batch)):
        model.zero_grad()
        loss, output = model.train()(given)
        loss.backward()
        logits = model.eval()(given)[1].logits
        results.append([logits, output.logits, loss.detach(), *gradients(model.dense.parameters())])
    assert results[0][0].shape == (sum(CANDIDATES), 2)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_loss_is_the_weighted_cross_entropy_of_each_task_and_the_divergence() -> None:
    model = make_ranker(make_config(task_weights={"like": 0.5}, distribution_weight=0.3))
    batch = make_batch()
    batch.labels[2, 1] = -1.0  # no label
    batch.weight[4] = 0.0
    loss, output = model(batch)
    with torch.no_grad():
        model.dense.objective.distribution_weight = 0.0
        plain, _ = model(batch)
    asked = output.logits + batch.logit_offset[:, None]
    total, expected = 0.0, 0.0
    for task, share in enumerate([1.0, 0.5]):
        labels = batch.labels[:, task]
        keep = (labels >= 0) & (batch.weight > 0)
        losses = F.binary_cross_entropy_with_logits(asked[keep, task], labels[keep], reduction="none")
        summed = float((losses * batch.weight[keep]).sum()) * share
        total, expected = total + summed, expected + summed / int(keep.sum())
    assert float(plain) == pytest.approx(expected, rel=1e-5)
    assert float(output.loss_sum) == pytest.approx(total, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(expected + 0.3 * float(output.divergence), rel=1e-5)
    assert float(output.divergence) > 0


def test_offset_of_down_sampling_enters_training_alone() -> None:
    model, batch = make_ranker().eval(), make_batch()
    moved = replace(batch, logit_offset=batch.logit_offset + 3.0)
    assert torch.equal(model(batch)[1].logits, model(moved)[1].logits)
    model.train()
    assert torch.equal(model(batch)[1].logits, model(moved)[1].logits)
    assert not torch.equal(model(batch)[0], model(moved)[0])


def test_offset_makes_a_constant_model_learn_the_rate_of_unsampled_data() -> None:
    """900 negatives of which a tenth is kept, 100 clicks: the best constant is log(100 / 900)."""
    labels = torch.cat([torch.ones(100), torch.zeros(90)])[:, None]
    constant = torch.full((1,), math.log(100 / 900), requires_grad=True)
    offset = torch.full((190,), -math.log(0.1))
    objective = RankingObjective([1.0], distribution_weight=0.0)
    logits = (constant + offset)[:, None]
    loss, _ = objective(logits, labels, torch.ones(190), (torch.zeros(()), torch.tensor(0)))
    loss.backward()
    assert constant.grad is not None
    assert float(constant.grad) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("interest", INTERESTS)
@pytest.mark.parametrize(
    ("lengths", "candidates"), [(LENGTHS, CANDIDATES), ([0, 0], [1, 2]), ([3, 1], [0, 0]), ([0], [0])]
)
def test_every_parameter_has_a_gradient(interest: str, lengths: list[int], candidates: list[int]) -> None:
    model = make_ranker(make_config(content_interest=interest))
    loss, _ = model(make_batch(lengths, candidates))
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model.dense.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients(model.sparse.trained.parameters()))
    assert not any(p.grad is not None for p in model.sparse.content.parameters())


def _changed_content(fill: float, interest: str) -> Tensor:
    """Logits with the content of items that lack it, and the padding of the tables, replaced."""
    model, batch = make_ranker(make_config(content_interest=interest)).eval(), make_batch()
    with torch.no_grad():
        for name, table in zip(FEATURES.modalities, model.sparse.content.values(), strict=True):
            weight = next(iter(table.parameters()))
            weight[~batch.present[name]] = fill
            weight[:, FEATURES.modalities[name] :] = fill
    return model(batch)[1].logits


@pytest.mark.parametrize("interest", INTERESTS)
def test_content_that_is_not_there_has_no_influence(interest: str) -> None:
    assert torch.equal(_changed_content(0.0, interest), _changed_content(float("nan"), interest))


def test_din_reads_no_content() -> None:
    model, batch = make_ranker(make_config(content_interest="none")).eval(), make_batch()
    before = model(batch)[1].logits
    with torch.no_grad():
        for weight in model.sparse.content.parameters():
            weight.fill_(float("nan"))
    assert torch.equal(model(batch)[1].logits, before)


@pytest.mark.parametrize("interest", INTERESTS)
def test_bf16_autocast_trains_close_to_fp32(interest: str) -> None:
    model, batch, results = make_ranker(make_config(content_interest=interest)), make_batch(), []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            loss, output = model(batch)
        loss.backward()
        assert output.logits.dtype == torch.float32
        assert all(torch.isfinite(g).all() for g in gradients(model.dense.parameters()))
        results.append(float(loss.detach()))
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_each_kind_of_feature_reaches_the_logits_it_should() -> None:
    model, batch = make_ranker().eval(), make_batch()
    before = model(batch)[1].logits
    first = batch.candidate_offsets[1]
    for name, index in (("user", 0), ("context.hour", 0)):
        ids = {**batch.ids, name: batch.ids[name].clone()}
        ids[name][index] = (ids[name][index] + 1) % 20
        same = torch.isclose(model(replace(batch, ids=ids))[1].logits, before, atol=1e-7).all(1)
        reached = int(first) if name == "user" else 1
        assert (~same).nonzero().squeeze(1).tolist() == list(range(reached))
    dense = batch.dense.clone()
    dense[1] += 1
    same = torch.isclose(model(replace(batch, dense=dense))[1].logits, before, atol=1e-7).all(1)
    assert (~same).nonzero().squeeze(1).tolist() == [1]


def test_tables_may_have_their_own_width() -> None:
    model = make_ranker(make_config(dims={"user": 16, "context.hour": 4}))
    loss, _ = model(make_batch())
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model.sparse.trained.parameters()))
    assert sorted(model.sparse.others) == ["dim_16", "dim_4"]
    with pytest.raises(ValueError, match=r"ranker\.dims: 'item' is no feature of requests or context"):
        make_ranker(make_config(dims={"item": 16}))


def test_labels_other_than_zero_and_one_are_refused() -> None:
    model, batch = make_ranker(), make_batch()
    batch.labels[3, 0] = 4.0
    with pytest.raises(ValueError, match=r"labels: 4\.0; cross-entropy wants 0 or 1"):
        model(batch)


class _Other:
    """A second rank that has told what it has."""

    world_size = 2

    def __init__(self, theirs: Tensor) -> None:
        self.theirs = theirs

    def sum(self, x: Tensor) -> Tensor:
        return x + self.theirs


def test_mean_over_ranks_of_the_loss_is_that_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(10, 2), torch.rand(10) + 0.1
    labels = torch.randint(0, 2, (10, 2)).float()
    labels[:4, 1] = -1.0
    numbers = torch.tensor([[7.0, 3.0, 4.0], [3.0, 3.0, 1.0]])  # labels of both tasks and histograms of each rank
    divergence = torch.tensor([2.0, 0.7])
    rows = (slice(0, 7), slice(7, 10))
    parts = []
    for rank, part in enumerate(rows):
        objective = RankingObjective([1.0, 0.5], distribution_weight=0.1, exchange=_Other(numbers[1 - rank]))
        restored = divergence[rank], numbers[rank, 2].long()
        parts.append(objective(logits[part], labels[part], weight[part], restored)[0])
    whole = RankingObjective([1.0, 0.5], distribution_weight=0.1)
    expected, _ = whole(logits, labels, weight, (divergence.sum(), torch.tensor(5)))
    torch.testing.assert_close(sum(parts) / 2, expected)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_comparison_trains(row: str) -> None:
    model = make_ranker(comparator(make_config(), row))
    loss, output = model(make_batch())
    loss.backward()
    names = {name.split(".")[1] for name, _ in model.dense.named_parameters() if name.startswith("extractors")}
    assert names == ({"ids"} if row == "din" else {"ids", row.split("_without")[0]})
    assert (float(output.divergence) > 0) == (row not in ("din", "simtier", "dmae_without_midu"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 6}, "ranker.width=6: choose a positive multiple of 4"),
        ({"content_interest": "bert"}, "ranker.content_interest='bert': choose one of"),
        ({"attention": "linear"}, "ranker.attention='linear'"),
        ({"distribution_weight": -1.0}, "ranker.distribution_weight=-1.0: choose 0 or more"),
        ({"task_weights": {"click": -1.0}}, r"ranker.task_weights\['click'\]=-1.0"),
        ({"dropout": 1.0}, "ranker.dropout=1.0"),
        ({"dims": {"user": 6}}, r"ranker.dims\['user'\]=6: choose a positive multiple of 4"),
    ],
)
def test_configuration_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankerConfig(**values)


def test_what_the_data_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ranker\.content_interest='dmae': the data has no content"):
        build_arch(make_config(), RankingFeatures())
    with pytest.raises(ValueError, match=r"ranker.task_weights: 'like' is no task of the data; it has \['click'\]"):
        build_arch(make_config(content_interest="none", task_weights={"like": 1.0}), RankingFeatures())
    with pytest.raises(ValueError, match="row='best': unknown"):
        comparator(make_config(), "best")
    with pytest.raises(ValueError, match=r"hidden=\(\): give the width"):
        make_ranker(make_config(hidden=()))


def train_sharded(env: DistributedEnv, steps: int) -> list[float]:
    """Losses of a sharded ranker, each rank on its part of the same global batches."""
    torch.manual_seed(0)
    model, exchange = ranker_of(make_config(dims={"user": 16}), FEATURES, ITEMS), RankExchange()
    model.dense.objective.exchange = exchange
    sharding.fuse_optimizer(model.sparse.trained, sharding.TableOptimizerConfig(name="adagrad", learning_rate=0.05))
    sharding.freeze(model.sparse.content)
    sharded = sharding.shard(model, sharding.make_plan(model, env.device), env.device)
    dense = [p for name, p in sharded.named_parameters() if "dense." in name]
    optimizer = torch.optim.SGD(dense, lr=0.1)
    losses = []
    for step in range(steps):
        batch = make_requests([4, 0, 7, 2], [2, 3, 1, 4], FEATURES, num_items=ITEMS, seed=step)
        optimizer.zero_grad()
        loss, _ = sharded(batch if env.world_size == 1 else part_of(batch, 3 * env.rank, 3 + env.rank))
        loss.backward()
        optimizer.step()
        losses.append(float(exchange.sum(loss.detach().clone())) / env.world_size)
    return losses


def test_ranker_learns_the_same_on_one_rank_and_on_two() -> None:
    one, two = (run_ranks(train_sharded, world, 5)[0] for world in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)
    assert len(set(one)) == 5
