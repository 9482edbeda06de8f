"""A check that TorchRec's pipeline really looks every table up ahead: it only warns when it does not."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule


def check_pipelined(model: nn.Module, pipeline: TrainPipelineSparseDist) -> None:
    """Stop when a sharded module is looked up outside the pipeline.

    Raises:
        RuntimeError: Names the modules and says what causes it.
    """
    pipelined = {id(module) for module in pipeline._pipelined_modules}
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ShardedModule) and id(module) not in pipelined
    ]
    if left:
        raise RuntimeError(
            f"{len(left)} sharded modules are not pipelined: {', '.join(left)}. Their input is made or changed inside "
            "the model's forward; build every KeyedJaggedTensor in collate and pass it to the sharded module as it is."
        )
