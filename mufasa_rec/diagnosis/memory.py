"""What a rank's memory holds after training steps: tables, the rest of the model, optimizers, and the peak."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from mufasa_rec.diagnosis.pipelined import sharded_modules

_STATM = Path("/proc/self/statm")


class PeakMemory:
    """Growth of a process's memory from where this is made: on a GPU the allocator's, else what is resident.

    Args:
        device: Device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._begin, self._highest = _now(device), _peak(device)

    def growth(self) -> int:
        """Bytes between the beginning and the highest point since; a peak of before is not counted."""
        highest = _peak(self.device)
        if highest <= self._highest:
            highest = _now(self.device)
        return max(highest - self._begin, 0)


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_bytes(model: nn.Module, dense: Mapping[str, nn.Parameter], optimizers: Iterable[Any]) -> dict[str, int]:
    """Bytes that a rank holds between steps.

    Args:
        model: The sharded model.
        dense: Its data-parallel parameters.
        optimizers: The optimizers' states.

    Returns:
        `tables`, `dense`, `gradients` and `optimizer`, in bytes of this rank.
    """
    tables = sum(local_bytes(list(module.state_dict().values())) for module in sharded_modules(model).values())
    gradients = [parameter.grad for parameter in dense.values() if parameter.grad is not None]
    return {
        "tables": tables,
        "dense": sum(p.nbytes for p in dense.values()),
        "gradients": sum(gradient.nbytes for gradient in gradients),
        "optimizer": sum(local_bytes(state) for state in optimizers),
    }


def local_bytes(values: Any) -> int:
    """Bytes of the tensors in a nest of containers, of sharded ones this rank's shards."""
    total = 0
    for leaf in tree_leaves(values):
        if isinstance(leaf, ShardedTensor):
            total += sum(shard.tensor.nbytes for shard in leaf.local_shards())
        elif isinstance(leaf, DTensor):
            total += local_bytes(leaf.to_local())
        elif isinstance(leaf, Tensor):
            total += leaf.nbytes
        elif hasattr(leaf, "local_shards"):  # TorchRec's LocalShardsWrapper
            total += sum(shard.nbytes for shard in leaf.local_shards())
    return total
