"""Look at a model before it trains for days: build it as training would, run two steps, and say what is wrong.

    python -m torchx_apps.doctor --preset demo --data.dataset DATASET [--json]
    python -m torchx_apps.doctor --preset demo --items 2e5 --content title=384
    python -m torchx_apps.doctor --factory package.module:function

Takes a configuration with a data set, one with a catalog that is only described, or a function that returns a model of
your own and a way to make a batch (docs/doctor.md). Under torchrun or the component, on all ranks. Each fault comes
with its line, field, table or parameter, and the remedy. Exit code 0 when nothing is wrong, 1 for a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import sys
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.config import RunConfig
from mufasa_rec.diagnosis.finding import of_refusal
from mufasa_rec.diagnosis.report import Report
from mufasa_rec.distributed.env import DistributedEnv, distributed
from torchx_apps import command_line, doctor_config, doctor_factory
from torchx_apps.doctor_room import Room
from torchx_apps.imagined import add_options, described


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, examine, and print the report on rank 0."""
    parser = make_parser()
    with distributed(level=logging.WARNING) as env:
        report = _report(parser, sys.argv[1:] if argv is None else list(argv), env)
        if env.is_main:
            asked = parser.parse_known_args(argv)[0]
            print(json.dumps(report.as_json(), indent=1) if asked.json else report.page(), flush=True)
    if not report.is_healthy:
        raise SystemExit(1)


def make_parser() -> argparse.ArgumentParser:
    """The program's own options; the others are fields of the configuration."""
    parser = command_line.parser("doctor", __doc__)
    parser.add_argument("--factory", metavar="PATH", help="package.module:function that returns (model, make_batch)")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--traceback", action="store_true", help="show where an unforeseen error came from, on stderr")
    return parser


def _report(parser: argparse.ArgumentParser, argv: list[str], env: DistributedEnv) -> Report:
    """Examine what a command line names; an argument that is refused is a finding, too."""
    report = Report(subject="", device=env.device.type, world_size=env.world_size)
    try:
        options, config = _parse(parser, argv)
    except ValueError as error:
        report.subject = " ".join(argv)
        report.findings = [of_refusal("configuration", error)]
        return report
    torch.set_num_threads(config.threads)
    room = Room(env, report, show_traceback=options.traceback)
    if options.factory:
        report.subject = options.factory
        room.examine(lambda: doctor_factory.ready(options.factory, room))
        return report
    report.subject = " ".join(filter(None, (options.config or options.preset or "default", config.data.dataset)))
    manifest = room.look("configuration", lambda: described(options))
    if not report.findings:
        room.examine(lambda: doctor_config.ready(config, manifest, room))
    return report


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Parse; what the parser prints before it ends is an error as well.

    Raises:
        ValueError: For a field or value that is refused.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return command_line.parse(parser, argv, lambda given: None)
    except SystemExit as stop:
        if not stop.code:
            raise
        sys.stderr.write(said.getvalue())
        words = " ".join(re.sub("[│╭╮╰╯─]+|-{4,}", " ", said.getvalue()).split())
        raise ValueError(f"command line: {words}") from None


if __name__ == "__main__":
    main()
