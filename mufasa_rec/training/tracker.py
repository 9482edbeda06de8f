"""Where metrics go: `metrics.jsonl` (the truth), TensorBoard, the log, and a progress bar where somebody watches."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger(__name__)


@contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk into an error that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: metrics cannot be written ({error.strerror}); free space or mend the folder; the run's "
            "last checkpoint is as it was",
        ) from error


class Tracker:
    """Writes the metrics of a run; every rank but the first gets a silent one.

    Args:
        folder: Run folder; None for a silent tracker.
        total_steps: Steps that the progress bar counts to.
        first_step: Steps that were done before, when a run is continued.
        keep_bytes: Length of `metrics.jsonl` at that step: what was written behind it is written again. None to keep
            all.
    """

    def __init__(
        self, folder: Path | None, total_steps: int, *, first_step: int = 0, keep_bytes: int | None = None
    ) -> None:
        self.folder = folder
        self._bar: tqdm | None = None
        if folder is None:
            return
        self._path = folder / "metrics.jsonl"
        if keep_bytes is not None and self._path.exists():
            _cut(self._path, keep_bytes)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    @property
    def position(self) -> int:
        """Length of `metrics.jsonl`, bytes, all of them on the disk; 0 for a silent tracker."""
        if self.folder is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(steps)

    def record(self, kind: str, step: int, metrics: dict[str, Any], line: str) -> None:
        """Write one set of metrics.

        Args:
            kind: `train` or `validation`.
            step: Optimizer steps done.
            metrics: Numbers by name.
            line: The same for a reader of the log.
        """
        if self.folder is None:
            return
        with _named_disk_errors(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
            self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()
        if self._bar is None:
            logger.info("%s", line)
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Close files and bar."""
        if self.folder is None:
            return
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()


def _cut(file: Path, keep_bytes: int) -> None:
    """Cut a file of lines to a length, and to whole lines where a crash of the machine left fewer bytes."""
    with file.open("rb+") as handle:
        kept = handle.read(keep_bytes)
        handle.truncate(kept.rfind(b"\n") + 1)
