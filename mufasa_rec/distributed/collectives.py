"""Exchanges between ranks that models and evaluation are handed: counts, and gathers with gradient of unequal sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def host_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for exchanges in host memory that nothing else may get between; collective."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


class RankExchange:
    """Reaches the other ranks of a process group; implements `mufasa_rec.modules.next_item.Exchange`.

    Counts travel over a gloo group of their own, so that a GPU is not waited for.

    Args:
        group: Group for tensors; the default group when None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._host_group = host_group() if dist.get_backend(group) != "gloo" else group

    def host(self) -> RankExchange:
        """The same ranks, for tensors in host memory."""
        return self if self._host_group is self.group else RankExchange(self._host_group)

    def counts(self, values: Sequence[int]) -> list[list[int]]:
        """Return every rank's `values`, one list per rank."""
        if self.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, group=self._host_group)
        return [tensor.tolist() for tensor in found]

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows of all ranks end to end; the gradient of a rank's rows is the sum over all ranks.

        Args:
            x: This rank's rows, `[n, ...]`.
            sizes: Row count of each rank.

        Returns:
            `[sum of sizes, ...]`.
        """
        if self.world_size == 1:
            return x
        return _Gather.apply(x, list(sizes), self.rank, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over ranks, without gradient; `x` is changed in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`; for small results, not for the training path."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._host_group)
        return found


class _Gather(torch.autograd.Function):
    """All-gather of padded rows; its backward sums the gradients of all ranks and keeps this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.rank, ctx.group = sizes, rank, group
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=group)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        start = sum(ctx.sizes[: ctx.rank])
        return total[start : start + ctx.sizes[ctx.rank]], None, None, None
