"""A stand-in for training: steps in which all ranks meet and, on a signal, a save and exit code 75.

    torchrun ... -m tests.helpers.short_run FOLDER

Each process writes what befalls it to `FOLDER/<restart count>-<process id>.jsonl`; `FOLDER/finish` ends all.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mufasa_rec.distributed.lifetime import end_with_parent

PREEMPTED = 75
GO_ON, FINISH, SAVE = range(3)


def main() -> None:
    folder, asked = Path(sys.argv[1]), []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    note(folder, "started", tied=end_with_parent())
    dist.init_process_group("gloo")
    note(folder, "training")
    wish = GO_ON
    while wish == GO_ON:
        time.sleep(0.05)
        wish = highest(SAVE if asked else FINISH if (folder / "finish").exists() else GO_ON)
    time.sleep(0.5)  # a save takes its time; so does a signal that is on its way to this rank too
    note(folder, "saved" if wish == SAVE else "finished", signals=asked)
    sys.exit(PREEMPTED if wish == SAVE else 0)


def highest(value: int) -> int:
    """Give the highest value of all ranks; an error where one of them is gone."""
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def note(folder: Path, event: str, **more: Any) -> None:
    place = {name.lower(): int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")}
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    line = {"event": event, "pid": os.getpid(), "launcher": os.getppid(), "start": start, **place, **more}
    with (folder / f"{start}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
