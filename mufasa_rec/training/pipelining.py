"""TorchRec's pipeline, and a check that it really looks every table up ahead: it only warns when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule


def make_pipeline(
    model: nn.Module, optimizer: Any, device: torch.device, forward: Callable[[Any], Any], *, prefetch: bool = False
) -> TrainPipelineSparseDist:
    """The pipeline of a run: the next batch's ids are exchanged while this one is computed.

    Args:
        model: The sharded model.
        optimizer: Updates the weights.
        device: Device of this rank.
        forward: Runs the model on a batch.
        prefetch: Whether the rows of the next batch are fetched into the caches meanwhile, too.
    """
    kind = PrefetchTrainPipelineSparseDist if prefetch else TrainPipelineSparseDist
    return kind(model=model, optimizer=optimizer, device=device, execute_all_batches=True, custom_model_fwd=forward)


def left_out(model: nn.Module, pipeline: TrainPipelineSparseDist) -> list[str]:
    """Names of the sharded modules that are looked up outside the pipeline; known after its first step.

    Those inside a pipelined one are called by it.
    """
    pipelined = {id(inner) for module in pipeline._pipelined_modules for inner in module.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, ShardedModule) and id(module) not in pipelined
    ]


def check_pipelined(model: nn.Module, pipeline: TrainPipelineSparseDist) -> None:
    """Stop when a sharded module is looked up outside the pipeline.

    Raises:
        RuntimeError: Names the modules and says what causes it.
    """
    left = left_out(model, pipeline)
    if left:
        raise RuntimeError(
            f"{len(left)} sharded modules are not pipelined: {', '.join(left)}. Their input is made or changed inside "
            "the model's forward; build every KeyedJaggedTensor in collate and pass it to the sharded module as it is. "
            "`python -m torchx_apps.doctor` names the line."
        )
