"""A run does not depend on the number of ranks, and not on chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics_of, small_config, train_in, weights_of


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_one_rank_equals_two_ranks_over_fifty_steps(dataset: str, tmp_path: Path, softmax: str) -> None:
    config = small_config(dataset, softmax=softmax, max_steps=50)
    for world in (1, 2):
        run_ranks(train_in, world, config, tmp_path / str(world))
    one, two = (metrics_of(tmp_path / str(world), "train") for world in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 51))
    np.testing.assert_allclose([a["loss"] for a in one], [a["loss"] for a in two], rtol=1e-4)
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    alone, shared = weights_of(tmp_path / "1"), weights_of(tmp_path / "2")
    assert alone.keys() == shared.keys()
    for name, weight in alone.items():
        if name.startswith("model."):
            assert torch.linalg.norm(weight - shared[name]) <= 1e-3 * torch.linalg.norm(weight) + 1e-6, name


def test_two_runs_with_one_seed_are_bit_identical(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, softmax="sampled", max_steps=12)
    for run in ("a", "b"):
        run_ranks(train_in, 2, config, tmp_path / run)
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    for kind, names in (("train", ("loss", "grad_norm")), ("validation", ("hr@10", "ndcg@10", "mrr"))):
        lines = [[[line[name] for name in names] for line in metrics_of(tmp_path / run, kind)] for run in ("a", "b")]
        assert lines[0]
        assert lines[0] == lines[1]
