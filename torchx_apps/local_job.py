"""One job on this machine by the real launcher, `torchx run -s local_cwd`, with its output made readable.

TorchX prefixes each line with role and replica, torchrun with the local rank, our logging with time and level. The
first process's lines are shown without all that; every line of every process stays in the log folder.
"""

import os
import re
import shlex
import signal
import subprocess
import sysconfig
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANK_LINE = re.compile(r"^(?:\x1b\[\d+m)?\w+/(?P<replica>\d+)(?:\x1b\[0m)? \[(?P<rank>\d+)\]:(?P<text>.*)$")
LOG_LINE = re.compile(r"^\d\d:\d\d:\d\d \[\d+\] (?P<level>[A-Z]) \S+: (?P<text>.*)$")
ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: )?(?P<text>[\w.]*(?:Error|Exception)(?:: .*)?)$")
STOP_TIMEOUT_S = 25


class JobFailedError(RuntimeError):
    """A job ended with an error; the message names it, its log and its last error lines."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one `torchx run` starts: a function of `components/<component>.py` and the arguments of its program."""

    name: str
    component: str
    program_args: Sequence[str]
    processes: int = 2

    def command(self, log_dir: Path, threads: int = 1) -> list[str]:
        """Return the command line, for processes on this machine."""
        file = os.path.relpath(ROOT / "components" / f"{self.component}.py")
        return [
            *("torchx", "run", "-s", "local_cwd", "-cfg", f"log_dir={log_dir}"),
            *(
                f"{file}:{self.component}",
                "-j",
                f"1x{self.processes}",
                "--threads",
                str(threads),
                "--",
                *self.program_args,
            ),
        ]


def run_job(job: Job, log_dir: Path, threads: int = 1) -> float:
    """Run a job to its end and show the lines of its first process, indented.

    Args:
        job: What to run.
        log_dir: Folder that takes the log of every process.
        threads: Threads of each process.

    Returns:
        The seconds it took.

    Raises:
        JobFailedError: The job ended with an error.
    """
    command = job.command(log_dir, threads)
    print(f"  $ {shlex.join(command)}", flush=True)
    output = Output()
    started = time.monotonic()
    process = subprocess.Popen(
        [str(Path(sysconfig.get_path("scripts")) / "torchx"), *command[1:]],
        # The demo is two processes on CPU, also on a machine with GPUs.
        env={**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Ctrl-C reaches the demo alone, which then ends the job in order.
        start_new_session=True,
    )
    try:
        for line in process.stdout or ():
            output.take(line.rstrip("\n"))
        status = process.wait()
    finally:
        _stop(process)
    if status:
        raise JobFailedError(
            f"job {job.name!r} failed (exit code {status}); its logs: {log_dir}\n{output.last_words()}"
        )
    return time.monotonic() - started


class Output:
    """The lines of a running job: shows those for a reader, keeps those that explain a failure."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}
        self.tail: deque[str] = deque(maxlen=15)
        self.launcher_tail: deque[str] = deque(maxlen=15)

    def take(self, line: str) -> None:
        """Take one line as TorchX prints it."""
        found = RANK_LINE.match(line)
        if not found:
            if line.strip():
                self.launcher_tail.append(line)
            return
        error = ERROR_LINE.match(found["text"])
        if error:
            self.errors.setdefault(error["text"], f"rank {found['rank']}: {error['text']}")
        if found["rank"] == "0" and found["replica"] == "0":
            if found["text"].strip():
                self.tail.append(found["text"])
            if not found["text"].startswith("[rank0]: "):
                print(f"    {readable(found['text'])}".rstrip(), flush=True)

    def last_words(self) -> str:
        """Return the errors of the processes; without any, the last lines."""
        lines = list(self.errors.values())[:3] or self.tail or self.launcher_tail
        return "\n".join(f"  {line}" for line in lines)


def readable(text: str) -> str:
    """Drop time, rank and logger from a log line; a warning or an error keeps its level."""
    found = LOG_LINE.match(text)
    if not found:
        return text
    level = {"W": "warning: ", "E": "error: ", "C": "error: "}.get(found["level"], "")
    return level + found["text"]


def _stop(process: subprocess.Popen[str]) -> None:
    """End TorchX if it still runs; on SIGTERM it ends the processes that it started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
