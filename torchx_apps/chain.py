"""Prepare, fuse, train, evaluate and export, one after the other on the same processes.

    python -m torchx_apps.chain --input SOURCE --run RUN [--preset NAME] [--steps STEP,...] [STEP: ARGUMENTS ...]
    python -m torchx_apps.chain --input shop --run runs/shop train: --trainer.epochs 5 export: --tables item

Each step is the program of that name, started beside every process that torchrun started, with its folders inside RUN:
dataset, fusion, model, evaluation, tables. A step that is done is not done again: given the same command a chain that
was interrupted goes on with the step that it was in, from that step's own checkpoint. `fuse` is left out where items
have no content vectors. Asked to stop (SIGTERM, SIGUSR1) it has the step save, and ends with exit code 75.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.data import paths
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import setup_logging, shutdown
from mufasa_rec.distributed.lifetime import LAUNCHER_VARIABLE, end_with_parent
from mufasa_rec.training.preemption import EXIT_CODE, SIGNALS
from torchx_apps import run_folder
from torchx_apps.chain_steps import (
    RECORD_FILE,
    ChainOptions,
    arguments_of,
    has_content,
    parse,
    refuse_wrong,
)

logger = logging.getLogger("torchx_apps.chain")  # not __main__, as each step calls itself
# The longest step of all may keep other processes waiting.
TIMEOUT = timedelta(days=30)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do the steps that are left."""
    end_with_parent()
    setup_logging(int(os.environ.get("RANK", "0")))
    alone = "RANK" not in os.environ
    dist.init_process_group(
        "gloo", timeout=TIMEOUT, store=dist.HashStore() if alone else None,
        rank=0 if alone else -1, world_size=1 if alone else -1,
    )  # fmt: skip
    runner = StepRunner()
    try:
        options = parse(sys.argv[1:] if argv is None else argv, __doc__)
        run_folder.local_folder(options.run)
        refuse_wrong(options)
        run_chain(options, runner, RankExchange())
    except (ValueError, OSError) as error:
        raise SystemExit(f"chain: {error}") from error
    except RuntimeError:  # a peer that was asked to stop has left first
        if not runner.asked_to_stop:
            raise
        raise SystemExit(EXIT_CODE) from None
    finally:
        shutdown()


def run_chain(options: ChainOptions, runner: StepRunner, exchange: RankExchange) -> None:
    """Do the steps that are left; collective.

    Args:
        options: What the command line asks for.
        runner: Runs a step's program.
        exchange: Reaches the processes beside this one.

    Raises:
        SystemExit: A step has failed, or the chain was asked to stop.
    """
    lead = Lead(options) if exchange.rank == 0 else None
    for step in options.steps:
        # One process decides: the others may see files of the shared folder a little later.
        command, port = exchange.objects((lead.next(step), free_port()) if lead else None)[0]
        if command is None:
            continue
        begin = time.monotonic()
        code = runner.run(step, command, port)
        if runner.asked_to_stop:
            raise SystemExit(EXIT_CODE)
        if code:  # at once: the others may wait for the program that is gone, and torchrun ends them
            raise SystemExit(f"chain: step {step} failed (exit code {code}); what it said stands above")
        exchange.objects(None)  # all have ended well
        if lead:
            lead.done(step, command, time.monotonic() - begin)


class StepRunner:
    """Starts a step's program beside this process, and passes signals on to it.

    Args:
        package: Where the programs are.
    """

    def __init__(self, package: str = "torchx_apps") -> None:
        self.package = package
        self.asked_to_stop = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def run(self, step: str, arguments: list[str], port: int) -> int:
        """Run a program to its end.

        Args:
            step: Name of the program.
            arguments: What it is told.
            port: Where its processes meet, on the first node.

        Returns:
            Its exit code.
        """
        if self.asked_to_stop:
            return EXIT_CODE
        env = {
            **os.environ,
            # Where this process and its peers meet is taken, and holds what they said.
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            LAUNCHER_VARIABLE: str(os.getpid()),
        }
        self._process = subprocess.Popen([sys.executable, "-m", f"{self.package}.{step}", *arguments], env=env)
        if self.asked_to_stop:  # between the look above and now
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)


class Lead:
    """Knows which steps are done: kept in the chain's folder, by the first process alone."""

    def __init__(self, options: ChainOptions) -> None:
        self.options = options
        self.file = Path(options.run) / RECORD_FILE
        self.record: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.redone = False

    def next(self, step: str) -> list[str] | None:
        """What a step's program is told; None for a step that is done or has nothing to do."""
        options = self.options
        with_content = options.is_written("prepare") and has_content(options.folder("prepare"))
        if step == "fuse" and not with_content:
            logger.info("step fuse is left out: the data has no content vectors")
            return None
        arguments = arguments_of(step, options, with_content=with_content)
        known = self.record.get(step, {})
        done = known.get("arguments") == arguments and "seconds" in known and options.is_written(step)
        if done and not self.redone:
            logger.info("step %s is done already, in %.0f s", step, known["seconds"])
            return None
        self.redone = True
        if step == "export" and known:  # an export is written once; this one is the chain's own
            paths.remove_folder(options.folder(step))
        self._write(step, {"arguments": arguments})
        logger.info("step %s, %d of %d", step, options.steps.index(step) + 1, len(options.steps))
        return arguments

    def done(self, step: str, arguments: list[str], seconds: float) -> None:
        """Note that a step is done."""
        self._write(step, {"arguments": arguments, "seconds": round(seconds, 1)})
        logger.info("step %s done in %.0f s", step, seconds)

    def _write(self, step: str, facts: dict[str, Any]) -> None:
        self.record[step] = facts
        with paths.atomic_write(self.file) as path:
            path.write_text(json.dumps(self.record, indent=1))


def free_port() -> int:
    """A port of this node that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


if __name__ == "__main__":
    main()
