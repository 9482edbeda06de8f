"""A run on two ranks by the train component's own command line, one fault in it, and what came of that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchx import specs

from components.train import train
from mufasa_rec.training.checkpoint import find_checkpoint, list_checkpoints
from mufasa_rec.training.checkpoint_manifest import read_manifest
from torchx_apps.local_job import ROOT

PROGRAM = "torchx_apps.benchmarks._attacked_run"
RANKS = 2
PATIENCE_S = 300.0  # nothing that is waited for takes this long unless it hangs
_POLL_S = 0.004


class RunLostError(RuntimeError):
    """A run hangs, or ended with an error that nobody caused."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A signal at a moment.

    Attributes:
        signal: Its name.
        victim: A rank, or None for torchrun.
        phase: `start`, `step`, `save` or `validation`.
        step: Strikes at the first such moment once so many steps of the run are done.
        delay_s: How long after the moment's begin.
    """

    signal: str
    victim: int | None
    phase: str
    step: int
    delay_s: float

    @property
    def name(self) -> str:
        """What is done to whom."""
        return f"{self.signal} of {'torchrun' if self.victim is None else f'rank {self.victim}'}"


@dataclass
class Run:
    """A run that is started again and again until it is done.

    Attributes:
        folder: Holds the run folder, journals and logs.
        arguments: What `torchx_apps.train` is told, without `--run`.
        max_restarts: How often torchrun itself starts lost ranks again.
        attempts: How often it was started.
        steps: Index in the run of every step that was ever trained, by (epoch, step in it); filled as they are seen.
    """

    folder: Path
    arguments: list[str]
    max_restarts: int = 0
    attempts: int = 0
    steps: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def start(self) -> Attempt:
        """Start the command again."""
        self.attempts += 1
        journal = self.folder / f"journal-{self.attempts:04d}"
        arguments = (str(journal), *self.arguments, "--run", str(self.run))
        app = train(*arguments, j=f"1x{RANKS}", name="faults", max_restarts=self.max_restarts)
        values = specs.macros.Values(img_root="", app_id=journal.name, replica_id="0", rank0_env="RANK0_HOST")
        role = values.apply(app.roles[0])
        line = role.args[1].replace("torchx_apps.train", PROGRAM)
        with (self.folder / f"log-{self.attempts:04d}").open("w") as log:
            process = subprocess.Popen(
                [role.entrypoint, "-c", line], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **role.env, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
            )  # fmt: skip
        return Attempt(self, process, journal)

    def saved_step(self) -> int:
        """Step of the newest checkpoint, 0 when there is none."""
        location = self.run / "checkpoints"
        return read_manifest(find_checkpoint(location, "newest")).step if list_checkpoints(location) else 0

    def log(self) -> str:
        """The end of the last attempt's log."""
        return (self.folder / f"log-{self.attempts:04d}").read_text(errors="replace")[-4000:]


class Attempt:
    """One start of a run, from its launch until all its processes are gone.

    Args:
        run: The run.
        process: torchrun.
        journal: Beginning of the journals' names.
    """

    def __init__(self, run: Run, process: subprocess.Popen[bytes], journal: Path) -> None:
        self.run, self.process, self.journal = run, process, journal
        self.begin = time.monotonic()
        self.pids: dict[int, int] = {}
        self.codes: dict[int, Any] = {}
        self.done_steps = run.saved_step()
        self.trains = False
        self.validating: set[int] = set()
        self._read = dict.fromkeys(range(RANKS), 0)

    def look(self) -> None:
        """Take note of what the ranks have written since."""
        for rank in range(RANKS):
            for line in self._new_lines(rank):
                self.pids[rank] = line.get("pid", self.pids.get(rank, 0))
                if "exit" in line:
                    self.codes[rank] = line["exit"]
                if "rows" in line:
                    self.trains = True
                    place = (line["epoch"], line["step"])
                    self.done_steps = max(self.done_steps, self.run.steps.setdefault(place, len(self.run.steps) + 1))
                if "validation" in line:
                    (self.validating.add if line["validation"] == "begins" else self.validating.discard)(rank)

    def _new_lines(self, rank: int) -> Iterator[dict[str, Any]]:
        file = Path(f"{self.journal}.rank-{rank}")
        if not file.exists() or file.stat().st_size == self._read[rank]:
            return
        with file.open("rb") as handle:
            handle.seek(self._read[rank])
            for line in handle:
                if line.endswith(b"\n"):
                    self._read[rank] += len(line)
                    yield json.loads(line)

    def strike(self, fault: Fault) -> str | None:
        """Wait for a fault's moment and send its signal.

        Returns:
            When that was; None when the run was done before.

        Raises:
            RunLostError: The run ended with an error before, or nothing happens any more.
        """
        end = time.monotonic() + PATIENCE_S
        while not self._is_moment(fault):
            if self.process.poll() is not None:
                if self.process.returncode:
                    raise RunLostError(f"ended by itself with exit code {self.process.returncode}:\n{self.run.log()}")
                return None
            if time.monotonic() > end:
                raise RunLostError(f"does not come to {fault.phase} after step {fault.step}:\n{self.run.log()}")
            time.sleep(_POLL_S)
        time.sleep(fault.delay_s)
        when = self._when(fault)
        try:
            victim = self.process.pid if fault.victim is None else self.pids[fault.victim]
            os.kill(victim, getattr(signal, fault.signal))
        except ProcessLookupError:
            return None
        return when

    def _is_moment(self, fault: Fault) -> bool:
        self.look()
        if fault.phase == "start":
            return fault.victim is None or fault.victim in self.pids
        if self.done_steps < fault.step:
            return False
        if fault.phase == "validation":
            return bool(self.validating)
        return self.trains and (fault.phase == "step" or bool(self._saving()))

    def _saving(self) -> list[str]:
        """Temporary folders of checkpoints that are being written."""
        names = [path.name for path in (self.run.run / "checkpoints").glob(".step-*")]
        return [name for name in names if not name.endswith(".removed")]

    def _when(self, fault: Fault) -> str:
        """What the run is doing now."""
        self.look()
        if fault.phase == "start":
            trained = f", step {self.done_steps}" if self.trains else ""
            return f"{time.monotonic() - self.begin:.1f} s after its start{trained}"
        doing = ["saving"] * bool(self._saving()) + ["validating"] * bool(self.validating)
        return f"step {self.done_steps}" + (f", {' and '.join(doing)}" if doing else "")

    def ended(self) -> str:
        """Wait until torchrun and its processes are gone; returns their codes and how long that took.

        Raises:
            RunLostError: They do not end; they are killed.
        """
        begin = time.monotonic()
        try:
            self.process.wait(PATIENCE_S)
            after = time.monotonic() - begin
            while self._running():
                if time.monotonic() - begin > PATIENCE_S:
                    raise RunLostError(f"processes outlive torchrun:\n{self.run.log()}")
                time.sleep(_POLL_S)
        except subprocess.TimeoutExpired:
            raise RunLostError(f"does not end:\n{self.run.log()}") from None
        finally:
            self.end()
        self.look()
        ranks = " ".join(str(self.codes.get(rank, "-")) for rank in range(RANKS))
        more = time.monotonic() - begin - after
        tail = f", its processes {more:.1f} s later" if more > 0.5 else ""
        return f"exit {self.process.returncode} (ranks {ranks}) in {after:.1f} s{tail}"

    def _running(self) -> list[int]:
        self.look()
        return [pid for pid in self.pids.values() if _is_running(pid)]

    def end(self) -> None:
        """End whatever is left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self._running():
            os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """Whether a process is one of ours and lives; that of an ended one has no command line."""
    try:
        return PROGRAM in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def run_to_end(run: Run) -> Attempt:
    """Start a run and wait until it is done.

    Raises:
        RunLostError: It fails or hangs.
    """
    attempt = run.start()
    said = attempt.ended()
    if attempt.process.returncode:
        raise RunLostError(f"{said} although nothing was done to it:\n{run.log()}")
    return attempt


if sys.platform != "linux":
    raise ImportError("torchx_apps.benchmarks._attack: reads /proc; attack runs on Linux.")
