"""The demo's training on two nodes of a real Slurm: preempted, then failing, it ends as if nothing had been.

Its preset on generated data, with fewer steps. Pre-flight looks at every job before it is queued.

Times are upper bounds of a hang only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.installed import torchx
from tests.helpers.slurm_cluster import SlurmCluster, free_ports, missing_programs
from torchx_apps.benchmarks._same_run import differences

STEPS = 100
# So many steps, and a line for each; otherwise the run is the demo's.
LONGER = (
    "--trainer.epochs",
    "500",
    "--trainer.patience",
    "0",
    "--trainer.log-every",
    "1",
    "--trainer.validate-every",
    "10",
)
TIMEOUT_S = 180
URGENT = "#!/bin/sh\n#SBATCH --partition=high --nodes=2 --ntasks-per-node=1 --cpus-per-task=16\nsrun sleep 1\n"


class Training:
    """One run folder, whichever jobs train it."""

    def __init__(self, slurm: SlurmCluster, site: Path, dataset: str, folder: Path) -> None:
        self.slurm, self.site, self.folder = slurm, site, folder
        folder.mkdir(exist_ok=True)
        self.dataset = dataset

    def start(self, retries: int = 0) -> str:
        """Queue the job on two nodes, of one process each; returns its handle."""
        job = ("components.train:train", "-j", "2x1", "--cpu", "16", "--max_retries", str(retries))
        port = ("--rdzv_port", str(free_ports(1)[0]))
        told = ("--preset", "demo", "--data.dataset", self.dataset, "--trainer.max-steps", str(STEPS), *LONGER)
        arguments = (*told, "--run", str(self.folder / "run"))
        return self.torchx("run", "-s", "slurm", *job, *port, "--", *arguments).strip()

    def torchx(self, *arguments: str) -> str:
        ran = torchx(self.site, *arguments, cwd=self.folder, env={**self.slurm.env, "CUDA_VISIBLE_DEVICES": ""})
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def wait_for(self, handle: str, state: str) -> str:
        end = time.monotonic() + TIMEOUT_S
        while f"State: {state}\n" not in (status := self.torchx("status", handle)):
            assert time.monotonic() < end, f"{status}\n{self.said()}"
            assert "State: FAILED" not in status, self.said()
            time.sleep(0.5)
        return status

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + TIMEOUT_S
        while self.step() < step:
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def step(self) -> int:
        file = self.folder / "run" / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def said(self, last: int = 2500) -> str:
        """The end of every log; all of it for 0."""
        files = sorted(self.folder.glob("slurm-*"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-last:]}" for file in files)


def slurm_of(accounting: bool, folder: Path) -> Iterator[SlurmCluster]:
    missing = missing_programs(accounting)
    if missing:
        pytest.skip(f"needs Slurm on this machine; there is no {', '.join(missing)}")
    with SlurmCluster(folder, accounting) as cluster:
        yield cluster


@pytest.fixture(params=[False, True], ids=["without accounts", "with accounts"])
def slurm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlurmCluster]:
    yield from slurm_of(request.param, tmp_path / "c")


@pytest.fixture(scope="module")
def undisturbed(site: Path, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that nobody disturbed, on the same kind of cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for slurm in slurm_of(False, tmp_path_factory.mktemp("slurm") / "c"):
        training = Training(slurm, site, dataset, folder)
        training.wait_for(training.start(), "SUCCEEDED")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_run_that_is_preempted_and_loses_a_process_ends_as_the_undisturbed_one(
    slurm: SlurmCluster, site: Path, dataset: str, undisturbed: Path, tmp_path: Path
) -> None:
    training = Training(slurm, site, dataset, tmp_path / "disturbed")
    handle = training.start(retries=2)
    training.wait_for_step(10)
    (tmp_path / "urgent").write_text(URGENT)
    urgent = slurm.call("sbatch", "--parsable", f"--output={tmp_path}/urgent.out", str(tmp_path / "urgent"))
    training.wait_for(f"slurm://torchx/{urgent}", "SUCCEEDED")
    stopped_at = training.step()
    assert 10 <= stopped_at < STEPS
    training.wait_for_step(stopped_at + 10)
    os.kill(trainer_of(training.folder), signal.SIGKILL)
    status = training.wait_for(handle, "SUCCEEDED")
    assert re.search(r"Num Restarts: 2\b", status)
    outcome = re.findall("again: (.*)", training.said())
    assert outcome == ["preempted", "retry"]
    assert f"continues from checkpoint step-{stopped_at:08d}" in training.said(0)  # saved when it was told to end
    assert differences(training.folder, undisturbed) == []


def trainer_of(folder: Path) -> int:
    """One of the two processes that train."""
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                words = (place / "cmdline").read_text().split("\0")
                parent = (place / "status").read_text().split("PPid:\t")[1].split("\n")[0]
                of_launcher = "torch.distributed.run" in (Path("/proc") / parent / "cmdline").read_text()
            except OSError:
                continue
            if of_launcher and str(folder / "run") in words:
                return int(place.name)
    raise AssertionError(f"nothing trains {folder}")
