"""The program that the fault campaign attacks: `torchx_apps.train`, which also writes down what it does.

    torchrun ... -m torchx_apps.benchmarks._attacked_run JOURNAL [arguments of torchx_apps.train]

Each rank appends lines of JSON to `JOURNAL.rank-R`: its process, every row that it has trained, when it validates, and
its exit code. A line is one write to the kernel, so it is whole or not there when the process is killed.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any


class Writer:
    """Appends lines to a rank's journal.

    Args:
        journal: Beginning of the file's name.
    """

    def __init__(self, journal: str) -> None:
        self._file = os.open(f"{journal}.rank-{os.environ['RANK']}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, **line: Any) -> None:
        """Append one line."""
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def watch(self, batch: Any) -> None:
        """Note the rows of a batch that was trained: user, and how many of the user's events the row ends after."""
        ends = (batch.start_position + batch.offsets.diff()).tolist()
        rows = list(zip(batch.user.tolist(), ends))[: batch.num_rows]
        self.write(epoch=batch.epoch, step=batch.step, rows=rows)


def main() -> None:
    """Train, and keep the journal."""
    writer = Writer(sys.argv[1])
    writer.write(pid=os.getpid())  # before the long imports: start-up is attacked too
    from mufasa_rec.evaluation.retrieval import Evaluator
    from torchx_apps import train

    validate = Evaluator.metrics

    def noted(*args: Any, **kwargs: Any) -> dict[str, float]:
        writer.write(validation="begins")
        found = validate(*args, **kwargs)
        writer.write(validation="ends")
        return found

    Evaluator.metrics = noted  # type: ignore[method-assign]
    train.train = partial(train.train, watch=writer.watch)  # type: ignore[assignment]
    code = 1
    try:
        train.main(sys.argv[2:])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        writer.write(exit=code)


if __name__ == "__main__":
    main()
