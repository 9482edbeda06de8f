"""Runs a function on several ranks over gloo: real processes, no fixed port, and an error of any rank is shown."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mufasa_rec.distributed.env import DistributedEnv, hide_library_noise

# The server imports once what every rank needs; ranks are forks of it and never of the test process with its threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torchx_apps.assembly", "torchx_apps.train", "torchx_apps.evaluate"])


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 90, on_gpus: bool = False
) -> list[Any]:
    """Run `fn(env, *args)` on each rank of a gloo process group, or of an NCCL one.

    Args:
        fn: A function of a module; its result must pickle.
        world_size: Number of ranks.
        args: Passed to every rank.
        timeout_s: After how long the ranks are ended.
        on_gpus: Whether each rank has a GPU.

    Returns:
        Every rank's result.

    Raises:
        AssertionError: A rank failed (with its traceback) or did not end in time; the other ranks are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            work = (theirs, rank, world_size, str(Path(folder) / "store"), timeout_s, on_gpus, fn, args)
            process = _CONTEXT.Process(target=_work, args=work, daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait([pipes[rank] for rank in waiting.values()], timeout=max(end - time.monotonic(), 0))
        assert ready, f"ranks {sorted(waiting.values())} did not end within {timeout_s} s: they hang"
        for pipe in ready:
            rank = waiting[id(pipe)]
            try:
                done, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert done, f"rank {rank} of {len(pipes)} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _work(
    pipe: Connection,
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    on_gpus: bool,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    hide_library_noise()
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    try:
        if on_gpus:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        env = DistributedEnv(rank=rank, world_size=world_size, local_rank=rank, device=device)
        message = (True, fn(env, *args))
    except BaseException:
        message = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))
    # A failed rank's peers may still be in a collective: leave at once, without waiting for them.
    os._exit(0)
