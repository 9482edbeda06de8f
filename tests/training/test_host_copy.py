"""Copies of tables that several groups of ranks hold: TorchRec gives such a table as a DTensor over shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torchrec.distributed.shards_wrapper import LocalShardsWrapper

from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.distributed.table_rows import local_shards
from mufasa_rec.training.host_copy import HostCopy
from tests.helpers.ranks import run_ranks

ROWS, DIM = 6, 4


class Tables(nn.Module):
    """A model whose state is one table in two groups of two ranks."""

    def __init__(self, rank: int, weight: Tensor) -> None:
        super().__init__()
        first = ROWS // 2 * (rank % 2)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        wrapper: Any = LocalShardsWrapper([weight], [(first, 0)])
        self.table = DTensor.from_local(
            wrapper,
            device_mesh=mesh,
            placements=[Replicate(), Shard(0)],
            run_check=False,
            shape=torch.Size([ROWS, DIM]),
            stride=(DIM, 1),
        )

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"ids.embeddings.t_item.weight": self.table}


def copied_and_saved(env: DistributedEnv, folder: Path) -> tuple[list[tuple[int, int, int]], bool, bool]:
    weight = torch.arange(ROWS // 2 * DIM, dtype=torch.float32).view(-1, DIM) + 100 * (env.rank % 2)
    model, before = Tables(env.rank, weight), weight.clone()
    copied = HostCopy().take({"model": model.state_dict()})
    weight.zero_()
    kept = torch.equal(copied["model"]["ids.embeddings.t_item.weight"].to_local().local_shards()[0], before)
    dcp.save(copied, checkpoint_id=folder)
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder)
    (part,) = local_shards(model)["t_item"]
    return [(part.first, part.column, part.dim)], kept, torch.equal(weight, before)


def test_table_of_several_groups_is_copied_saved_and_loaded(tmp_path: Path) -> None:
    found = run_ranks(copied_and_saved, 4, tmp_path / "saved")
    assert [place for place, _, _ in found] == [[(3 * (rank % 2), 0, DIM)] for rank in range(4)]
    assert all(kept for _, kept, _ in found)
    assert all(loaded for _, _, loaded in found)
