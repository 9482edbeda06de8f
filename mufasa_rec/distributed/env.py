"""The process among its peers: rank, device, process group and log format, taken from the environment torchrun sets.

A program that is started without torchrun is a world of one process and needs no free port: its store is in memory.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mufasa_rec.distributed.lifetime import end_with_parent

# What torchrun sets for each process; all of them or none.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A program that is run with `python -m` logs as __main__.
OWN_LOGGERS = ("mufasa_rec", "torchx_apps", "__main__")
REMEDY = "start the program with torchrun or a TorchX component, or unset {} to run it as one process"


@dataclass(frozen=True, kw_only=True)
class DistributedEnv:
    """Where this process stands: rank 0 of 1 without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports, rank 0."""
        return self.rank == 0


def init_distributed(timeout_s: float = 600, level: int = logging.INFO) -> DistributedEnv:
    """Join the process group (gloo on CPU, NCCL on CUDA) and put the rank into every log line.

    Args:
        timeout_s: After how long a collective that a peer does not join fails, in seconds.
        level: Lowest level that is logged.

    Returns:
        The place of this process.

    Raises:
        ValueError: torchrun's variables are incomplete or contradict one another, or processes outnumber GPUs.
    """
    end_with_parent()
    rank, world_size, local_rank = _read_place()
    setup_logging(rank, level)
    hide_library_noise()
    device = _own_device(local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A world of one needs no meeting point: a store in memory cannot collide with another run's port.
    alone = world_size == 1 and "MASTER_ADDR" not in os.environ
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        store=dist.HashStore() if alone else None,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return DistributedEnv(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


@contextmanager
def distributed(timeout_s: float = 600, level: int = logging.INFO) -> Iterator[DistributedEnv]:
    """Be in the process group for the length of a `with` block; it is left on an error too."""
    try:
        yield init_distributed(timeout_s, level)
    finally:
        shutdown()


def shutdown() -> None:
    """Leave the process group; torch's CUDA build aborts at exit when a program does not. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def setup_logging(rank: int, level: int = logging.INFO) -> None:
    """Log to stderr with time, rank, level and message; replaces the handlers of an earlier call.

    Args:
        rank: Rank of this process; it enters every line.
        level: Lowest level of our own loggers; other libraries log from WARNING on.
    """
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s [{rank}] %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)


def hide_library_noise() -> None:
    """Hide the warnings that TorchRec and torch raise about each other, which nobody here could change.

    Each is named exactly, so that a new one is seen; look through them when torch or TorchRec moves.
    """
    # TorchRec wraps the model in DDP with an argument that torch has renamed, and its tables are ShardedTensors.
    warnings.filterwarnings("ignore", message=r"`broadcast_buffers` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"Please use DTensor instead and we are deprecating ShardedTensor")
    # TorchRec's pipeline asks torch.fx by a name that is now meant for export too.
    hidden = "is_fx_tracing will return true for both"
    logger = logging.getLogger("torch.fx._symbolic_trace")
    if not any(getattr(known, "hidden", None) == hidden for known in logger.filters):
        logger.addFilter(_Hide(hidden))


class _Hide(logging.Filter):
    """Drops records that begin with a text."""

    def __init__(self, hidden: str) -> None:
        super().__init__()
        self.hidden = hidden

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.hidden)


def _read_place() -> tuple[int, int, int]:
    """Read rank, world size and local rank of this process, checked against one another."""
    present = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if not any(name in present for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return 0, 1, 0
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: {REMEDY.format(', '.join(present))}"
        )
    rank, world_size, local_rank = (_read_int(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}: the rank must be at least 0 and below the world size; "
            + REMEDY.format("both")
        )
    if not 0 <= local_rank <= rank:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} and RANK is {rank}: the local rank must be at least 0 and at most the rank; "
            + REMEDY.format("both")
        )
    return rank, world_size, local_rank


def _read_int(name: str) -> int:
    value = os.environ[name]
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, not a number: {REMEDY.format(name)}") from None


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {local_rank} but this node has {torch.cuda.device_count()} GPU(s): start one process per "
            "GPU (-j NODESxGPUS), or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
