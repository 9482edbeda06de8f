"""A process that ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mufasa_rec.distributed import lifetime

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
# A parent that tells its child's id and waits for it.
PARENT = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait())"
CHILD = """
import os, time
from mufasa_rec.distributed.lifetime import end_with_parent, outlive_parent
assert end_with_parent()
{then}
print(os.getpid(), flush=True)
time.sleep(60)
"""


def start_family(then: str) -> tuple[subprocess.Popen[str], int]:
    """Start a parent and a child; give the parent and the child's id, once the child has said that it is ready."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": str(ROOT)}
    environment.pop(lifetime.LAUNCHER_VARIABLE, None)
    command = [sys.executable, "-c", PARENT, CHILD.format(then=then)]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    return parent, int(parent.stdout.readline())


def ends(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    end = time.monotonic() + TIMEOUT_S
    while lifetime._is_running(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_process_ends_with_its_parent() -> None:
    parent, child = start_family(then="")
    with parent:
        parent.kill()
    assert ends(child)


def test_process_that_is_saving_outlives_its_parent() -> None:
    parent, child = start_family(then="outlive_parent()")
    try:
        with parent:
            parent.kill()
        time.sleep(0.2)  # the kernel would have killed it with the parent
        assert lifetime._is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Be started by torchrun, with no kernel to kill the test; gives what the kernel was asked for."""
    calls: list[int] = []

    def ask(number: int) -> bool:
        calls.append(number)
        return True

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.delenv(lifetime.LAUNCHER_VARIABLE, raising=False)
    monkeypatch.setattr(lifetime, "_ask_kernel", ask)
    return calls


def test_without_torchrun_nothing_is_asked(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not lifetime.end_with_parent()
    lifetime.outlive_parent()
    assert asked == []


@pytest.mark.parametrize("launcher", [None, "", "no number", os.getppid, os.getpid])
def test_running_or_unknown_launcher_is_no_reason_to_end(
    asked: list[int], monkeypatch: pytest.MonkeyPatch, launcher: Callable[[], int] | str | None
) -> None:
    if launcher is not None:
        monkeypatch.setenv(lifetime.LAUNCHER_VARIABLE, str(launcher() if callable(launcher) else launcher))
    assert lifetime.end_with_parent()
    assert asked == [signal.SIGKILL]


@pytest.mark.parametrize("reaped", [True, False])
def test_process_that_starts_after_its_launcher_was_killed_ends(
    asked: list[int], monkeypatch: pytest.MonkeyPatch, reaped: bool
) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as launcher:
        launcher.kill()
        if reaped:
            launcher.wait()
        assert ends(launcher.pid)
        monkeypatch.setenv(lifetime.LAUNCHER_VARIABLE, str(launcher.pid))
        with pytest.raises(SystemExit, match=f"torchrun, process {launcher.pid}, is gone"):
            lifetime.end_with_parent()


def test_other_systems_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not lifetime.end_with_parent()
