"""A copy of a run's state in host memory: training goes on changing the weights while the copy is written."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.shards_wrapper import LocalShardsWrapper


class HostCopy:
    """Takes copies, in memory that is used again for the next one.

    On a GPU the memory is page-locked, so that the copy runs at the bus's speed. It costs the size of this rank's
    state in host memory, once.

    Example:
        >>> weight = torch.ones(2)
        >>> copied = HostCopy().take({"weight": weight})
        >>> _ = weight.zero_()
        >>> copied
        {'weight': tensor([1., 1.])}
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy a state; the copy before is overwritten.

        Args:
            state: Tensors, sharded tensors and nested dicts of them.

        Returns:
            The same with all of this rank's tensors in host memory, complete when this returns.
        """
        copied = self._copy(state, "")
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(inner, f"{name}/{key}") for key, inner in value.items()}
        if isinstance(value, ShardedTensor):
            return self._sharded(value, name)
        if isinstance(value, DTensor):
            return self._grouped(value, name)
        return self._tensor(value, name)

    def _sharded(self, value: ShardedTensor, name: str) -> ShardedTensor:
        """The same table with its shards in host memory; nothing is exchanged, all ranks know the metadata."""
        metadata = copy.deepcopy(value.metadata())
        for shard in metadata.shards_metadata:
            shard.placement._device = torch.device("cpu")  # type: ignore[union-attr]  as ShardedTensor.cpu() does
        of_place = {tuple(shard.shard_offsets): shard for shard in metadata.shards_metadata}
        shards = [
            Shard(self._tensor(shard.tensor, f"{name}#{index}"), of_place[tuple(shard.metadata.shard_offsets)])
            for index, shard in enumerate(value.local_shards())
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, sharded_tensor_metadata=metadata, process_group=value._process_group
        )

    def _grouped(self, value: DTensor, name: str) -> DTensor:
        """The same table of several groups of ranks; DTensor's own constructors would move it back to the device."""
        local: Any = value.to_local()
        shards = [self._tensor(shard, f"{name}#{index}") for index, shard in enumerate(local.local_shards())]
        copied = LocalShardsWrapper(shards, local.local_offsets())  # type: ignore[bad-argument-type]
        return DTensor(copied, value._spec, requires_grad=False)  # type: ignore[bad-argument-count]

    def _tensor(self, tensor: Tensor, name: str) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[name] = memory
        return memory.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
