"""A few steps of tables alone: sharded over ranks, and in plain torch on one, on the same batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.distributed import sharding
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.sharding_config import ShardingConfig
from mufasa_rec.distributed.table_config import TableOptimizerConfig, TablesConfig
from mufasa_rec.modules.sparse_arch import SparseArch, TableConfig, merge
from mufasa_rec.training.optim import OptimizerConfig, TrainOptimizer

SIZES = {"item": (41, 32), "item.brand": (10, 32), "user": (23, 16)}  # rows and columns
STEPS, WORLD, IDS = 4, 2, 30


@dataclass(frozen=True)
class Trial:
    """Settings of a trial."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    optimizer: TableOptimizerConfig = field(default_factory=lambda: TableOptimizerConfig(name="adagrad"))


class Head(nn.Module):
    """Looks tables up and sums what they say, each feature with its own direction."""

    def __init__(self, sparse: SparseArch) -> None:
        super().__init__()
        self.sparse = sparse
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return loss_of(merge(self.sparse(features)), self.scale)


def loss_of(values: dict[str, Tensor], scale: Tensor) -> Tensor:
    """A loss in which the order of ids and of columns matters."""
    total = scale.new_zeros(())
    for name, found in sorted(values.items()):
        rows, columns = found.shape
        places = torch.arange(rows * columns, dtype=torch.float32, device=found.device)
        wanted = torch.cos(places + len(name)).view(rows, columns)
        total = total + (scale * found - wanted).square().mean()
    return total


def batch(step: int, rank: int) -> KeyedJaggedTensor:
    """One rank's ids of a step; some repeat."""
    stream = torch.Generator().manual_seed(100 * step + rank)
    values = [torch.randint(0, rows, (IDS,), generator=stream) for rows, _ in SIZES.values()]
    return KeyedJaggedTensor(
        keys=list(SIZES), values=torch.cat(values), lengths=torch.full((len(SIZES),), IDS), stride=1
    )


def sharded_model(env: DistributedEnv, trial: Trial) -> tuple[nn.Module, ShardingPlan]:
    """The model of a trial, sharded, with its first weights."""
    tables = [
        TableConfig(
            name=name,
            num_embeddings=rows,
            dim=columns,
            weight_dtype=trial.tables.weight_dtype_of(name),
            output_dtype=trial.tables.output_dtype_of(name),
            frozen=trial.tables.is_frozen(name),
        )
        for name, (rows, columns) in SIZES.items()
    ]
    sparse = SparseArch(tables, 32, [], torch.device("meta"))
    sharding.fuse_optimizer(sparse.trained, trial.optimizer, trial.tables)
    sharding.freeze(sparse.untrained)
    model = Head(sparse)
    plan = sharding.make_plan(model, env.device, trial.sharding, trial.tables)
    sharded = sharding.shard(model, plan, env.device, trial.sharding)
    sharding.initialise_tables(sharded, dict.fromkeys(sparse.drawn_tables, 0.1), seed=0)
    return sharded, plan


def train_sharded(env: DistributedEnv, trial: Trial) -> dict[str, Any]:
    """Train a trial; returns this rank's losses, its shards after it, and the bytes of its optimizer state."""
    model, _ = sharded_model(env, trial)
    sync = sharding.sync_of(model, trial.sharding)
    dense = {"scale": next(p for name, p in model.named_parameters() if name.endswith("scale"))}
    config = OptimizerConfig(learning_rate=1e-9, warmup_steps=0, final_share=1.0, tables=trial.optimizer)
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config, STEPS)  # type: ignore[arg-type]
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step, env.rank).to(env.device))
        loss.backward()
        optimizer.step()
        if sync is not None:
            sync[0]()
        losses.append(float(loss.detach()))
    shards = {
        name: [(part.first, part.column, part.weight.cpu().clone()) for part in parts]
        for name, parts in sharding.local_shards(model).items()
    }
    states = optimizer.tensors()["fused"]
    return {"losses": losses, "shards": shards, "states": {name: sorted(state) for name, state in states.items()}}


def whole_tables(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put the ranks' shards together."""
    found = {}
    for name, (rows, columns) in SIZES.items():
        table = f"t_{name.replace('.', '_')}"
        whole = torch.full((rows, columns), torch.nan)
        for result in results:
            for first, column, weight in result["shards"].get(table, ()):
                whole[first : first + weight.shape[0], column : column + weight.shape[1]] = weight.float()
        found[name] = whole
    return found


def train_plain(
    first: dict[str, Tensor], trial: Trial, world: int = WORLD
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The same in plain torch: losses by rank, and the tables after it.

    Args:
        first: First weights, `[rows, columns]` by feature.
        trial: Settings, of which optimizers, learning rates and frozen tables count.
        world: Ranks whose batches are taken.
    """
    weights = {name: table.clone().requires_grad_(not trial.tables.is_frozen(name)) for name, table in first.items()}
    moments: dict[str, Tensor] = {}
    losses: list[list[float]] = [[] for _ in range(world)]
    for step in range(STEPS):
        total = torch.zeros(())
        for rank in range(world):
            jagged = batch(step, rank).to_dict()
            loss = loss_of({name: weights[name][jagged[name].values()] for name in SIZES}, torch.ones(()))
            losses[rank].append(float(loss.detach()))
            total = total + loss / world
        if total.requires_grad:
            total.backward()
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            update_plain(weight, trial.tables.optimizer_of(name, trial.optimizer), moments, name)
            weight.grad = None
    return losses, {name: weight.detach() for name, weight in weights.items()}


@torch.no_grad()
def update_plain(weight: Tensor, config: TableOptimizerConfig, moments: dict[str, Tensor], name: str) -> None:
    """One update by the optimizer's definition."""
    assert weight.grad is not None
    gradient = weight.grad
    if config.name == "sgd":
        weight -= config.learning_rate * gradient
        return
    square = gradient.square()
    if config.name == "row_wise_adagrad":
        square = square.mean(dim=1, keepdim=True)
    moments[name] = moments.get(name, torch.zeros_like(square)) + square
    weight -= config.learning_rate * gradient / (moments[name].sqrt() + config.eps)
