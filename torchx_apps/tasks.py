"""What a run of each task trains: its loader, its sharded model, and how that is validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mufasa_rec.config import RunConfig
from mufasa_rec.data.row_loader import RowLoader
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.evaluation.impressions import model_score
from mufasa_rec.training.fusion_file import TrainedLayer
from mufasa_rec.training.trainer import Validate
from torchx_apps import assembly, ranking


@dataclass(frozen=True)
class Parts:
    """What the trainer is handed.

    Attributes:
        loader: Training batches of this rank.
        model: The sharded model.
        validate: Evaluates it on the validation part.
    """

    loader: RowLoader[Any]
    model: nn.Module
    validate: Validate


def build(
    config: RunConfig,
    data: assembly.OpenDataset,
    env: DistributedEnv,
    exchange: RankExchange,
    layer: TrainedLayer | None = None,
) -> Parts:
    """Build the parts of a run; collective.

    Args:
        config: The run.
        data: Its data set.
        env: This process among its peers.
        exchange: Reaches the other ranks.
        layer: The fusion layer that a retriever holds, with `model.fusion_source`.
    """
    validate: Callable[[Callable[[], None]], dict[str, float]]
    if config.task == "ranking":
        loader = ranking.make_loader(config, data, "train", env)
        judge = ranking.make_evaluator(config, data, "validation", env, exchange)
        model = ranking.shard_ranker(config, data, ranking.build_ranker(config, data, exchange), env.device)
        validate = lambda after_batch: judge.metrics(model_score(model), after_batch)  # noqa: E731
        return Parts(loader, model, validate)
    loader = assembly.make_loader(config, data, "train", env)
    evaluator = assembly.make_evaluator(config, data, "validation", env, exchange)
    retriever = assembly.build_retriever(config, data, exchange, layer)
    model = assembly.shard_retriever(config, data, retriever, env.device)
    scorer = assembly.make_scorer(config, data, model, env, exchange)
    validate = lambda after_batch: evaluator.metrics(scorer, after_batch)  # noqa: E731
    return Parts(loader, model, validate)
