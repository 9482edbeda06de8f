"""Averaging gradients over ranks so that the result does not depend on where a gradient lies in its bucket."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def average_in_rank_order(model: nn.Module) -> None:
    """Have DDP add gradients in the order of ranks, element by element; for three or more ranks on CPUs.

    Gloo adds the parts of a buffer in an order that depends on their place in it, and DDP rearranges its buckets after
    the first step. So a continued run, whose first step is in the middle of another's, would differ in the last bits.
    Two ranks have one order only. It costs an all-gather of the gradients instead of a ring of sums.

    Args:
        model: A model that holds a DistributedDataParallel module.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(module.process_group, _gather_and_add)


def _gather_and_add(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DDP: the mean of a bucket's gradients."""
    mine = bucket.buffer()
    world = dist.get_world_size(group)
    found = [torch.empty_like(mine) for _ in range(world)]
    work = dist.all_gather(found, mine, group=group, async_op=True)
    assert work is not None

    def mean(done: Any) -> Tensor:
        done.wait()
        total = found[0]
        for other in found[1:]:
            total += other
        return total.div_(world)

    return work.get_future().then(mean)
