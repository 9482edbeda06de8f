"""`torchx run -s slurm` on a real Slurm of two nodes on this machine, with and without accounts.

Times are upper bounds of a hang only.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mufasa_rec.launch.slurm.jobs import find_job
from tests.helpers.installed import torchx
from tests.helpers.slurm_cluster import SlurmCluster, missing_programs

TIMEOUT_S = 90
# A job of shell lines: what is tested here is the scheduler alone.
COMPONENT = '''
import torchx.specs as specs


def job(line: str, nodes: int = 1, retries: int = 0, cpu: int = 1) -> specs.AppDef:
    """Run a line.

    Args:
        line: what each node runs
        nodes: number of nodes
        retries: how often it is started again
        cpu: cores of each node
    """
    resource = specs.Resource(cpu=cpu, gpu=0, memMB=100)
    role = specs.Role("shell", "", entrypoint="bash", args=["-c", line], resource=resource)
    role.num_replicas, role.max_retries = nodes, retries
    return specs.AppDef("tiny", [role])
'''


class Cluster:
    """A cluster, and TorchX as its user has it."""

    def __init__(self, slurm: SlurmCluster, site: Path, folder: Path) -> None:
        self.slurm, self.site, self.folder = slurm, site, folder
        (folder / "job.py").write_text(COMPONENT)

    def torchx(self, *arguments: str, cwd: Path | None = None) -> str:
        ran = torchx(self.site, *arguments, cwd=cwd or self.folder, env=self.slurm.env)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def run(self, line: str, options: str = "", **arguments: Any) -> str:
        given = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        line = line.replace("$", "$$")  # TorchX fills in macros
        return self.torchx(
            "run", "-s", "slurm", "-cfg", f"log_dir=logs{options}", "job.py:job", "--line", line, *given
        ).strip()

    def ended(self, handle: str) -> str:
        """Wait for the end of a job; returns what `torchx status` says."""
        return self.wait_for(handle, "SUCCEEDED|FAILED|CANCELLED")

    def wait_for(self, handle: str, states: str) -> str:
        end = time.monotonic() + TIMEOUT_S
        while not re.search(f"State: ({states})\n", status := self.torchx("status", handle)):
            assert time.monotonic() < end, f"{status}\n{self.own_output(handle)}\n{self.slurm.logs()}"
            time.sleep(0.2)
        return status

    def own_output(self, handle: str) -> str:
        file = self.folder / "logs" / f"slurm-{number(handle)}.out"
        return file.read_text() if file.exists() else ""


def number(handle: str) -> str:
    return handle.rpartition("/")[2]


def start_cluster(accounting: bool, folder: Path) -> SlurmCluster:
    missing = missing_programs(accounting)
    if missing:
        pytest.skip(f"needs Slurm on this machine; there is no {', '.join(missing)}")
    return SlurmCluster(folder, accounting)


@pytest.fixture(scope="module", params=[False, True], ids=["without accounts", "with accounts"])
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with start_cluster(request.param, tmp_path_factory.mktemp("slurm") / "c") as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: SlurmCluster, site: Path, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(slurm, site, tmp_path)
    slurm.call("scancel", "--me")


def test_job_of_two_nodes_runs_is_listed_and_its_logs_are_read_from_any_folder(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    handle = cluster.run("echo node $SLURM_NODEID of $RANK0_HOST; echo oops >&2", nodes=2)
    assert re.fullmatch(r"slurm://torchx/\d+", handle)
    status = cluster.ended(handle)
    assert "State: SUCCEEDED" in status
    assert "shell[1]:SUCCEEDED" in status
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    host = cluster.slurm.call("sinfo", "--noheader", "--Node", "--format=%N", "--partition=main").split()[0]
    lines = sorted(cluster.torchx("log", handle, cwd=elsewhere).splitlines())
    assert lines == [f"shell/{node} {text}" for node in (0, 1) for text in (f"node {node} of {host}", "oops")]
    assert cluster.torchx("log", "--regex", "of", f"{handle}/shell/1").splitlines() == [f"shell/1 node 1 of {host}"]
    listed = cluster.torchx("list", "-s", "slurm")
    assert re.search(rf"{handle} +SUCCEEDED", listed)


def test_log_is_followed_to_the_end_of_the_job(cluster: Cluster) -> None:
    handle = cluster.run("for k in 1 2 3; do echo line $k; sleep 0.7; done; printf end")
    assert cluster.torchx("log", "--tail", handle).splitlines() == [
        f"shell/0 {one}" for one in ("line 1", "line 2", "line 3", "end")
    ]


def test_cancelled_job_is_told_to_end_and_stays_cancelled(cluster: Cluster) -> None:
    handle = cluster.run("trap 'echo told; exit 75' TERM; echo begun; for k in {1..600}; do sleep 0.1; done", retries=3)
    cluster.wait_for(handle, "RUNNING")
    wait_for_text(cluster.folder / "logs" / f"slurm-{number(handle)}-shell-0.log", "begun")
    cluster.torchx("cancel", handle)
    status = cluster.ended(handle)
    time.sleep(2)
    assert cluster.torchx("status", handle) == status
    assert "State: CANCELLED" in status
    assert "Num Restarts: 0" in status
    assert "told" in cluster.torchx("log", handle)


def test_failing_job_is_started_again_as_often_as_it_may(cluster: Cluster) -> None:
    handle = cluster.run("echo attempt ${SLURM_RESTART_COUNT:-0}; exit 3", retries=2)
    status = cluster.ended(handle)
    assert "State: FAILED" in status
    assert "Num Restarts: 2" in status
    assert cluster.torchx("log", handle).splitlines() == [f"shell/0 attempt {k}" for k in range(3)]
    said = re.findall("srun ended: code 3, .*; again: .*", cluster.own_output(handle))
    assert [one.split(": ")[-1] for one in said] == ["retry", "retry", "no"]


def test_failing_job_that_is_not_to_be_requeued_fails_at_once(cluster: Cluster) -> None:
    status = cluster.ended(cluster.run("exit 3", ",requeue=False", retries=2))
    assert "State: FAILED" in status
    assert "Num Restarts: 0" in status


def test_preempted_job_that_saves_and_ends_is_started_again_without_a_retry(cluster: Cluster) -> None:
    line = (
        'echo attempt ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] && exit 0; '
        "trap 'echo saved; exit 75' TERM; echo begun; for k in {1..600}; do sleep 0.1; done"
    )
    handle = cluster.run(line, cpu=16, nodes=2)
    wait_for_text(cluster.folder / "logs" / f"slurm-{number(handle)}-shell-1.log", "begun")
    urgent = cluster.run("sleep 1", ",partition=high", cpu=16, nodes=2)
    assert "State: SUCCEEDED" in cluster.ended(urgent)
    status = cluster.ended(handle)
    assert "State: SUCCEEDED" in status, cluster.own_output(handle)
    assert "Num Restarts: 1" in status
    lines = cluster.torchx("log", f"{handle}/shell/1").splitlines()
    assert without_shell(lines) == [f"shell/1 {text}" for text in ("attempt 0", "begun", "saved", "attempt 1")]
    assert "again: preempted" in cluster.own_output(handle)


@pytest.mark.slow
def test_job_is_warned_ahead_of_the_end_of_its_time_and_started_again(cluster: Cluster) -> None:
    line = (
        'echo attempt ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] && exit 0; '
        "trap 'echo warned; exit 75' USR1; for k in {1..600}; do sleep 0.1; done"
    )
    handle = cluster.run(line, ",time=1,signal=USR1@55", retries=1)
    assert "State: SUCCEEDED" in cluster.ended(handle), cluster.own_output(handle)
    assert without_shell(cluster.torchx("log", handle).splitlines()) == [
        f"shell/0 {one}" for one in ("attempt 0", "warned", "attempt 1")
    ]


def test_script_of_a_dry_run_is_taken_by_sbatch_alone(cluster: Cluster) -> None:
    shown = cluster.torchx("run", "-s", "slurm", "--dryrun", "job.py:job", "--line", "echo by hand", "--nodes", "2")
    script = cluster.folder / "job.sbatch"
    script.write_text(shown[shown.index("#!/bin/bash") :])
    cluster.slurm.call("sbatch", "--wait", str(script))
    (log,) = cluster.folder.glob("slurm-*-shell-1.log")
    assert log.read_text() == "by hand\n"


def test_refusal_of_sbatch_is_shown_without_a_traceback(cluster: Cluster) -> None:
    options = ("-cfg", "partition=none", "job.py:job", "--line", "true")
    ran = torchx(cluster.site, "run", "-s", "slurm", *options, cwd=cluster.folder, env=cluster.slurm.env)
    assert ran.returncode == 1
    assert "sbatch refused: sbatch: error: invalid partition specified: none" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_job_that_the_controller_has_forgotten_is_found_in_the_accounts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not cluster.slurm.accounting:
        pytest.skip("needs a cluster with accounts; this test runs on one too")
    handle = cluster.run('[ -n "$SLURM_RESTART_COUNT" ]', nodes=2, retries=1)
    cluster.ended(handle)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.slurm.env[name])
    known = find_job(number(handle))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(
        f'#!/bin/sh\nPATH="{os.environ["PATH"]}"\n[ "$3" = job ] && exit 1\nexec scontrol "$@"\n'
    )
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = wait_until(lambda: (job := find_job(number(handle))) and job.state == "COMPLETED" and job)
    assert known is not None
    assert (found.name, found.num_nodes, found.hosts, found.restarts) == (known.name, 2, known.hosts, 1)
    assert find_job("999999") is None


def without_shell(lines: list[str]) -> list[str]:
    """The lines without what Slurm and bash say about a signal, on some node or none."""
    return [line for line in lines if not re.search("slurmstepd|Terminated|User defined signal", line)]


def wait_for_text(file: Path, text: str) -> None:
    wait_until(lambda: file.exists() and text in file.read_text())


def wait_until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + TIMEOUT_S
    while not (answer := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return answer
