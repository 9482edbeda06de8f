"""Managed tables on a GPU: rows start anew there, too, under the optimizers that it has."""

from __future__ import annotations

from typing import Any

import pytest

from mufasa_rec.distributed.table_config import TableOptimizerConfig
from tests.distributed.test_managed_collision import Trial, check_planted, planted
from tests.helpers.ranks import run_ranks


@pytest.mark.gpu
@pytest.mark.parametrize(("optimizer", "states"), [("row_wise_adagrad", 1), ("adagrad", 1), ("adam", 2), ("sgd", 0)])
def test_rows_on_a_gpu_start_anew_weights_and_optimizer_state(optimizer: Any, states: int) -> None:
    trial = Trial(optimizer=TableOptimizerConfig(name=optimizer, learning_rate=0.1))
    check_planted(run_ranks(planted, 1, trial, on_gpus=True), states)
