"""What signals and losses do to a job, by real runs of the command lines that the train component emits.

The program is `tests/helpers/short_run.py`. Times are upper bounds of a hang only.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torchx import specs

from components.train import train
from tests.helpers.short_run import PREEMPTED

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 60
PROGRAM = "tests.helpers.short_run"


class Job:
    """Nodes of one job on this machine: what TorchX would start, with another program."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        app = train(str(folder), rdzv_port=free_port(), **options)
        values = specs.macros.Values(img_root="", app_id=folder.name, replica_id="0", rank0_env="RANK0_HOST")
        self.role = values.apply(app.roles[0])
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start_node(self) -> subprocess.Popen[bytes]:
        line = self.role.args[1].replace("torchx_apps.train", PROGRAM)
        with (self.folder / "output").open("a") as output:
            # As TorchX does: a session of its own.
            node = subprocess.Popen(
                [self.role.entrypoint, "-c", line], cwd=ROOT, env={**os.environ, **self.role.env},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        return node

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = [line for path in self.folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [one for one in found if one["event"] == event]

    def training(self, start: int, world_size: int) -> list[int]:
        """Give the processes that trained together after so many restarts, in that number."""
        found = [one for one in self.events("training") if (one["start"], one["world_size"]) == (start, world_size)]
        return [one["pid"] for one in found]

    def wait_for(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end, "\n".join([(self.folder / "output").read_text()[-3000:], *self.journals()])
            time.sleep(0.05)

    def journals(self) -> list[str]:
        return [f"{path.name}: {path.read_text()}" for path in self.folder.glob("*.jsonl")]

    def end(self) -> None:
        for node in self.nodes:
            node.kill()
            node.wait()
        for one in self.events("started"):
            if is_running(one["pid"], PROGRAM):
                os.kill(one["pid"], signal.SIGKILL)


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(**options: Any) -> Job:
        jobs.append(Job(tmp_path, **options))
        return jobs[-1]

    yield make
    for job in jobs:
        job.end()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


def is_running(pid: int, command: str = "") -> bool:
    """Whether a process lives, with `command` in its command line; the command line of one that has ended is empty."""
    try:
        found = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return bool(found) and command in found


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_to_the_launcher_reaches_every_process_and_all_save(make_job: Callable[..., Job], name: str) -> None:
    job = make_job(j="1x2")
    node = job.start_node()
    job.wait_for(lambda: len(job.training(0, 2)) == 2)
    node.send_signal(getattr(signal, name))
    assert node.wait(TIMEOUT_S) == 1  # whatever the processes' own code
    saved = job.events("saved")
    assert sorted(one["rank"] for one in saved) == [0, 1]
    assert [one["signals"] for one in saved] == [[name], [name]]


def test_signal_to_one_process_makes_all_save_and_end_with_their_own_code(make_job: Callable[..., Job]) -> None:
    job = make_job(j="1x2")
    node = job.start_node()
    job.wait_for(lambda: len(job.training(0, 2)) == 2)
    os.kill(job.training(0, 2)[0], signal.SIGTERM)
    assert node.wait(TIMEOUT_S) == 1
    assert sorted(one["rank"] for one in job.events("saved")) == [0, 1]
    assert re.search(rf"exitcode *: {PREEMPTED} ", (job.folder / "output").read_text())


def test_lost_process_restarts_the_group_in_place_once(make_job: Callable[..., Job]) -> None:
    job = make_job(j="1x2", max_restarts=1)
    node = job.start_node()
    for start in (0, 1):
        job.wait_for(lambda start=start: len(job.training(start, 2)) == 2)
        os.kill(job.training(start, 2)[0], signal.SIGKILL)
    assert node.wait(TIMEOUT_S) == 1
    assert {one["start"] for one in job.events("started")} == {0, 1}


def test_without_restarts_a_lost_process_ends_the_job(make_job: Callable[..., Job]) -> None:
    job = make_job(j="1x2")
    node = job.start_node()
    job.wait_for(lambda: len(job.training(0, 2)) == 2)
    os.kill(job.training(0, 2)[1], signal.SIGKILL)
    assert node.wait(TIMEOUT_S) == 1
    assert not any(is_running(one["pid"], PROGRAM) for one in job.events("started"))


def test_no_process_outlives_a_killed_launcher(make_job: Callable[..., Job]) -> None:
    job = make_job(j="1x2")
    node = job.start_node()
    job.wait_for(lambda: len(job.training(0, 2)) == 2)
    assert {one["launcher"] for one in job.events("started")} == {node.pid}
    assert all(one["tied"] for one in job.events("started"))
    node.kill()
    job.wait_for(lambda: not any(is_running(pid, PROGRAM) for pid in job.training(0, 2)))
    assert not job.events("saved")


def test_elastic_job_starts_with_one_node_grows_and_goes_on_without_a_lost_one(make_job: Callable[..., Job]) -> None:
    # Shorter waits than torchrun's 30 s for more nodes and 15 s for a silent one.
    waits = {"PET_RDZV_CONF": "last_call_timeout=1,keep_alive_interval=1"}
    job = make_job(j="1:2x1", max_restarts=1, env=waits)
    first = job.start_node()
    job.wait_for(lambda: len(job.training(0, 1)) == 1)
    second = job.start_node()
    job.wait_for(lambda: len(job.training(0, 2)) == 2)
    (saved,) = job.events("saved")  # the one process that had to give way to two
    assert saved["signals"] == ["SIGTERM"]
    second.kill()
    job.wait_for(lambda: len(job.training(1, 1)) == 1)
    (job.folder / "finish").touch()
    assert first.wait(TIMEOUT_S) == 0
    assert [one["pid"] for one in job.events("finished")] == job.training(1, 1)
