"""Small runs: a configuration that trains in seconds, and what a run folder holds."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mufasa_rec.config import RunConfig
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.data.negatives import NegativesConfig
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding import TableOptimizerConfig
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from mufasa_rec.training.checkpoint import find_checkpoint
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.trainer_config import TrainerConfig
from torchx_apps.train import train


def small_config(dataset: str, *, softmax: Any = "full", **trainer: Any) -> RunConfig:
    """A run of a small model without dropout, eight virtual readers and batches of sixteen rows."""
    return RunConfig(
        data=DataConfig(
            dataset=dataset,
            batch_size=16,
            num_readers=8,
            max_history=12,
            min_count=2,
            negatives=NegativesConfig(softmax=softmax, num_uniform=24, num_inbatch=24),
        ),
        model=RetrieverConfig(
            width=16,
            id_dropout=0.0,
            num_gap_buckets=8,
            attention="full",
            extractor=SparseAttentionConfig(num_layers=1, dropout=0.0),
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=5, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.05)
        ),
        trainer=replace(TrainerConfig(epochs=100, log_every=1, validate_every=100, patience=0), **trainer),
    )


def train_in(env: DistributedEnv, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train a run on the ranks of `env`."""
    return train(config, folder, env)


def metrics_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of one kind."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights_of(folder: Path, which: str = "newest") -> dict[str, torch.Tensor]:
    """The whole tensors of a run's checkpoint (weights and optimizer state), put together in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process, which is meant
        state = _load_state_dict_from_keys(checkpoint_id=find_checkpoint(folder / "checkpoints", which))
    return dict(_flat(state, ""))


def _flat(state: dict[str, Any], prefix: str) -> Any:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
