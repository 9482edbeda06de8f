"""Places among peers: read from torchrun's variables, checked, and joined for real."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from mufasa_rec.distributed import env
from mufasa_rec.distributed.env import TORCHRUN_VARIABLES, distributed, init_distributed, setup_logging, shutdown

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without torchrun's variables; leave no group and no log handler behind."""
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    shutdown()
    root.handlers[:] = handlers
    root.setLevel(level)


def set_variables(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**COMPLETE, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)


def test_program_without_torchrun_is_a_world_of_one() -> None:
    place = init_distributed()
    assert (place.rank, place.world_size, place.local_rank, place.is_main) == (0, 1, 0, True)
    assert dist.is_initialized()
    assert dist.get_world_size() == 1


def test_group_is_left_on_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), distributed():
        assert dist.is_initialized()
        raise RuntimeError("stop")
    assert not dist.is_initialized()


def test_shutdown_may_be_called_twice() -> None:
    init_distributed()
    shutdown()
    shutdown()
    assert not dist.is_initialized()


@pytest.mark.parametrize("missing", TORCHRUN_VARIABLES)
def test_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_variables(monkeypatch, **{missing: None})
    with pytest.raises(ValueError, match=f"{missing} missing: start the program with torchrun"):
        init_distributed()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK is -1"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3 and RANK is 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    ],
)
def test_contradiction_is_named(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str) -> None:
    set_variables(monkeypatch, **changes)
    with pytest.raises(ValueError, match=message):
        init_distributed()


def test_more_processes_than_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch)
    monkeypatch.setattr(env.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(env.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 1 but this node has 1 GPU\(s\): start one process per"):
        init_distributed()


def test_log_lines_carry_the_rank_and_other_libraries_stay_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=3)
    logging.getLogger("mufasa_rec.data").info("ours")
    logging.getLogger("someone.else").info("theirs")
    lines = capsys.readouterr().err
    assert "[3] I mufasa_rec.data: ours" in lines
    assert "theirs" not in lines


def test_two_processes_meet() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    program = (
        "import torch, torch.distributed as dist\n"
        "from mufasa_rec.distributed.env import distributed\n"
        "with distributed(timeout_s=60) as env:\n"
        "    total = torch.tensor([env.rank + 1])\n"
        "    dist.all_reduce(total)\n"
        "    print(env.rank, env.device.type, total.item())\n"
    )
    places = [{**COMPLETE, "RANK": str(r), "LOCAL_RANK": str(r), "MASTER_PORT": port} for r in range(2)]
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **place, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    outputs = [peer.communicate(timeout=120)[0].strip() for peer in peers]
    assert outputs == ["0 cpu 3", "1 cpu 3"]
