"""Programs that cannot go on: a run whose second save never ends, a rank whose peer does not join a collective.

    python -m tests.helpers.stuck save [arguments of torchx_apps.train]
    python -m tests.helpers.stuck collective STORE RANK GRACE_S

Each prints `stuck` when it is.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from mufasa_rec.training import saver
from mufasa_rec.training.preemption import StopSignals
from torchx_apps.train import main as train


def run_with_a_save_that_hangs(arguments: list[str]) -> None:
    real, names = saver.write_checkpoint, []

    def write(location: Any, manifest: Any, *rest: Any) -> Any:
        names.append(manifest.name)
        if len(names) == 2:
            print("stuck", flush=True)
            time.sleep(300)
        return real(location, manifest, *rest)

    saver.write_checkpoint = write  # type: ignore[assignment]
    train(arguments)


def wait_for_a_peer(store: str, rank: int, grace_s: float) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        time.sleep(300)
    with StopSignals(grace_s):
        print("stuck", flush=True)
        dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    if sys.argv[1] == "save":
        run_with_a_save_that_hangs(sys.argv[2:])
    else:
        wait_for_a_peer(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
