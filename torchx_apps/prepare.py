"""Raw events, items and vectors to a data set that trains, or the check of one that was written elsewhere.

python -m torchx_apps.prepare --input FOLDER --output DATASET
python -m torchx_apps.prepare --input synthetic:0 --output DATASET
python -m torchx_apps.prepare --check DATASET
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import tyro
from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.data import paths
from mufasa_rec.data.check import check_dataset
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.data.prepare_report import REPORT_TEXT
from mufasa_rec.data.ranks import PeerError
from mufasa_rec.distributed.env import init_distributed, shutdown

logger = logging.getLogger("prepare")


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program; the arguments are those of ``PrepareConfig``, or ``--check DATASET``."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--check" in args:
        _check(args)
        return
    try:
        # Nested dataclasses are made while the flags are read, so what they refuse comes from here too.
        _prepare(parse(args))
    except (ValueError, OSError, PeerError) as error:
        raise SystemExit(f"prepare: {error}") from error


def parse(args: Sequence[str]) -> PrepareConfig:
    """Read a command line without ``--check``.

    Raises:
        ValueError: For a value that is refused.
    """
    return tyro.cli(PrepareConfig, args=list(args), prog="prepare", description=__doc__)


def _prepare(config: PrepareConfig) -> None:
    env = init_distributed()
    try:
        prepare(config)
        if env.is_main:
            with paths.open_file(paths.join(config.output, REPORT_TEXT), "rb") as file:
                print(file.read().decode())
            print(f"written: {config.output}")
    finally:
        shutdown()


def _check(args: list[str]) -> None:
    place = args.index("--check")
    if len(args) != 2 or place != 0:
        raise SystemExit("--check takes one data set and nothing else: --check DATASET")
    problems = check_dataset(args[1])
    for problem in problems:
        print(f"{problem.file}: {problem.message}")
    print(f"{args[1]}: {len(problems)} problem(s)" if problems else f"{args[1]}: keeps the contract")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
