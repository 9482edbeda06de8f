"""When a run saves, and that it costs the training little: state is copied, then a thread writes the copy."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from mufasa_rec.data import paths
from mufasa_rec.distributed.collectives import RankExchange, host_group
from mufasa_rec.training.checkpoint import (
    list_checkpoints,
    load_tensors,
    new_name,
    newest_intact,
    remove_checkpoint,
    remove_left_overs,
)
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.checkpoint_writer import write_checkpoint
from mufasa_rec.training.host_copy import HostCopy

logger = logging.getLogger(__name__)
FOLDER = "checkpoints"
_LOWEST_PRIORITY = 19


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and where.

    Besides these times it is saved at every validation that is the best so far, at its end, and on SIGTERM or SIGUSR1.

    Attributes:
        folder: Folder or URL of the checkpoints, on storage that all ranks share; None for `checkpoints` in the run
            folder.
        every_steps: Steps between saves; None for no such rule.
        every_minutes: Minutes between saves; None for no such rule.
        keep_last: Newest checkpoints that are kept, beside the best one.
        background: Write beside the training; False stops the training until a checkpoint is written.
        grace_s: Seconds from SIGTERM or SIGUSR1 until the process has ended, saved; the launcher must wait longer.
    """

    folder: str | None = None
    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep_last: int = 2
    background: bool = True
    grace_s: float = 25.0

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name}={value}: choose 1 or more.")
        for name in ("every_minutes", "grace_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"checkpoint.{name}={value}: choose above 0.")

    def location(self, run: paths.Location) -> str:
        """Where the checkpoints of a run lie."""
        return self.folder or paths.join(run, FOLDER)


class Saver:
    """Saves and restores a run; all calls are collective.

    Args:
        location: Where the run's checkpoints lie.
        config: When they are saved.
        about: What every manifest says about the run.
    """

    def __init__(self, location: str, config: CheckpointConfig, about: dict[str, Any]) -> None:
        self.location, self.config, self.about = location, config, about
        # The writing thread's exchanges must not get between those of the training: a group of its own.
        self.exchange = RankExchange(host_group())
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._name = ""
        self._saved_s = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the time since the last save asks for another one; ranks' clocks differ."""
        minutes = self.config.every_minutes
        return minutes is not None and not self.busy and time.monotonic() - self._saved_s >= 60.0 * minutes

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last save came to nothing; the same on every rank once it has ended."""
        return self._failure is not None

    @property
    def lost(self) -> str | None:
        """The name of the last checkpoint when it came to nothing; the same on every rank once that has ended."""
        return self._name if self.failed else None

    def due_at(self, step: int) -> bool:
        """Whether the number of steps asks for a save; the same on every rank."""
        return self.config.every_steps is not None and step % self.config.every_steps == 0

    def name(self, step: int) -> str:
        """The name of a coming checkpoint of `step`."""
        begin = time.perf_counter()
        self.wait()  # one that is being written has a name already
        waited = time.perf_counter() - begin
        if waited > 1.0 and self.exchange.rank == 0:
            logger.warning("steps waited %.1f s for the checkpoint before; raise checkpoint.every_steps", waited)
        mine = new_name(self.location, step) if self.exchange.rank == 0 else None
        return self.exchange.objects(mine)[0]

    def save(self, manifest: Manifest, tensors: dict[str, Any], *, wait: bool = False) -> None:
        """Save a state; the one before must be written first.

        Args:
            manifest: Name, step and state; `about` is added.
            tensors: Tensors, sharded tensors and nested dicts of them.
            wait: Return when the checkpoint is complete; else when the state is copied.

        Raises:
            OSError: With `wait`, when it cannot be written. In the background that is logged as an error, and
                training goes on.
        """
        self.wait()
        copied = self._copy.take(tensors)
        whole = Manifest(
            name=manifest.name,
            step=manifest.step,
            state=manifest.state,
            about=self.about,
            world_size=self.exchange.world_size,
        )
        self._saved_s = time.monotonic()
        if self.config.background and not wait:
            self._thread = threading.Thread(target=self._in_background, args=(whole, copied), name="saver", daemon=True)
            self._thread.start()
            return
        self._write(whole, copied)
        if wait and self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _in_background(self, manifest: Manifest, tensors: dict[str, Any]) -> None:
        # A thread has a priority of its own on Linux: the steps come first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        self._write(manifest, tensors)

    def _write(self, manifest: Manifest, tensors: dict[str, Any]) -> None:
        """Write, then drop what need not be kept."""
        begin = time.perf_counter()
        self._failure, self._name = None, manifest.name
        try:
            whole = write_checkpoint(self.location, manifest, tensors, self.exchange)
        except Exception as error:
            self._failure = error
            if self.exchange.rank == 0:
                logger.error("checkpoint of step %d was not saved: %s", manifest.step, error)
            return
        if self.exchange.rank == 0:
            size = sum(facts.bytes for facts in whole.files.values()) / 2**20
            logger.info("checkpoint %s: %.1f MiB in %.1f s", whole.name, size, time.perf_counter() - begin)
            self._drop_old(whole)

    def _drop_old(self, newest: Manifest) -> None:
        """Remove what need not be kept; when that fails there is one more than asked for, which the next save tries."""
        names = list_checkpoints(self.location)
        kept = {*names[-self.config.keep_last :], newest.name, newest.state["progress"]["best"].get("checkpoint")}
        for name in names:
            if name in kept:
                continue
            try:
                remove_checkpoint(self.location, name)
            except OSError as error:
                logger.warning("checkpoint %s cannot be removed: %s", name, error)

    def newest(self) -> Manifest | None:
        """The newest whole checkpoint; a damaged one is named and set aside. None when there is none at all."""
        if self.exchange.rank == 0:
            remove_left_overs(self.location)
        return newest_intact(self.location, self.exchange)

    def load(self, manifest: Manifest, tensors: dict[str, Any]) -> None:
        """Fill tensors in place from a checkpoint that `newest` found."""
        load_tensors(paths.join(self.location, manifest.name), tensors)
