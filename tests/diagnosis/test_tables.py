"""Tables that did not become what was asked for, and features that a batch lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from mufasa_rec.diagnosis.tables import Asked, feature_findings, plan_findings
from tests.helpers.subjects import Spliced, make_batch

BAGS = "dlrm.sparse_arch.embedding_bag_collection"


def plan(sharding_type: str = "row_wise", kernel: str = "fused") -> ShardingPlan:
    """Both pooled tables data-parallel, the history as given."""
    part = ParameterSharding(sharding_type=sharding_type, compute_kernel=kernel, ranks=[0])
    pooled = ParameterSharding(sharding_type="data_parallel", compute_kernel="dense", ranks=[0])
    bags = EmbeddingModuleShardingPlan({"t_user": pooled, "t_item": pooled})
    return ShardingPlan(plan={"history": EmbeddingModuleShardingPlan({"t_history": part}), BAGS: bags})


def test_pooled_tables_may_be_data_parallel_on_a_cpu() -> None:
    assert plan_findings(Spliced(), plan(), "cpu") == []


def test_unpooled_table_may_be_data_parallel_on_a_gpu_only() -> None:
    assert plan_findings(Spliced(), plan("data_parallel", "dense"), "cuda") == []
    (found,) = plan_findings(Spliced(), plan("data_parallel", "dense"), "cpu")
    assert found.where == "table t_history of history"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            Asked(("table_wise", "column_wise"), None, "f"),
            "sharding type became 'row_wise', asked for was 'table_wise' or",
        ),
        (Asked(None, ("fused_uvm",), "f"), "its kernel became 'fused', asked for was 'fused_uvm'"),
    ],
)
def test_table_that_is_not_what_was_asked_for_is_named(asked: Asked, said: str) -> None:
    (found,) = plan_findings(Spliced(), plan(), "cuda", {"t_history": asked})
    assert said in found.what
    assert found.where == "table t_history of history (f)"
    assert plan_findings(Spliced(), plan(), "cuda", {"t_history": Asked(("row_wise",), ("fused",), "f")}) == []


def test_table_that_is_not_planned_is_named() -> None:
    found = plan_findings(Spliced(), ShardingPlan(plan={BAGS: plan().plan[BAGS]}), "cpu")
    assert [finding.where for finding in found] == ["table t_history of history"]


def test_features_are_found_wherever_a_batch_keeps_them() -> None:
    batch = make_batch()
    nested = SimpleNamespace(parts={"all": [batch.sparse_features]}, numbers=torch.zeros(2))
    assert feature_findings(Spliced(), batch) == feature_findings(Spliced(), nested) == []
    found = feature_findings(Spliced(), SimpleNamespace(x=1))
    assert sorted(finding.where.split(" of ")[0] for finding in found) == [
        "feature history",
        "feature item",
        "feature user",
    ]
