"""Training that starts warm: what is named is taken before the first step, and a continued run does not start again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mufasa_rec.config import load_config
from mufasa_rec.distributed.sharding import TableOptimizerConfig
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.warm_start_plan import WarmStartConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_config, train_in, weights_of

QKV = "model.dense.extractor.layers.0.qkv.weight"


def test_run_starts_from_another_and_is_continued_from_its_own(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, max_steps=4)
    run_ranks(train_in, 2, config, tmp_path / "a")
    still = OptimizerConfig(learning_rate=1e-12, weight_decay=0.0, tables=TableOptimizerConfig(learning_rate=1e-12))
    warm = replace(
        small_config(dataset, max_steps=1),
        optimizer=still,
        warm_start=WarmStartConfig(source=str(tmp_path / "a"), modules=("dense.tower",)),
    )
    run_ranks(train_in, 1, warm, tmp_path / "b")
    assert load_config(tmp_path / "b" / "config.yaml").warm_start == warm.warm_start
    source, started = weights_of(tmp_path / "a", "best"), weights_of(tmp_path / "b", "best")
    for name, weight in started.items():
        if name.startswith("model.dense.tower.") or (".embeddings." in name and name.startswith("model.")):
            assert torch.allclose(weight, source[name], atol=1e-6), name
    assert not torch.allclose(started[QKV], source[QKV], atol=1e-4)
    (tmp_path / "a").rename(tmp_path / "gone")  # a run that is continued needs its source no more
    run_ranks(train_in, 2, replace(warm, trainer=replace(warm.trainer, max_steps=2)), tmp_path / "b")
    again = weights_of(tmp_path / "b", "newest")
    assert torch.allclose(again[QKV], started[QKV], atol=1e-6)


def test_run_that_cannot_start_warm_writes_no_run(dataset: str, tmp_path: Path) -> None:
    warm = replace(small_config(dataset, max_steps=1), warm_start=WarmStartConfig(matrices=("item=none.npy",)))
    with pytest.raises(AssertionError, match=r"table item: .*no such file"):
        run_ranks(train_in, 1, warm, tmp_path / "b")
    assert not (tmp_path / "b" / "config.yaml").exists()
