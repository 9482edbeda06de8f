"""Look at a job before it is queued: would its program begin, and end, on the machines that it asks for?

    python -m torchx_apps.preflight --nodes 2 --processes 8 --gpus 8 --accelerator H100 -- torchx_apps.train --run RUN

Our schedulers call it before they submit; by hand it does the same for a job on this machine. What is wrong goes to
stderr, a line each with field and remedy, and the program ends with 1. What was looked at, and what cannot be seen from
here, goes to stdout. Nothing is written but an empty file, at once removed, where a URL is to take checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Sequence

from torchx_apps.preflight_findings import Findings, Machines, lines
from torchx_apps.preflight_programs import CHECKS

_FRAME = " ╭╮╰╯│─-"  # that parsers draw around what they say


def main(argv: Sequence[str] | None = None) -> int:
    """Check a job.

    Returns:
        0, or 1 when the job would fail.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    machines, program = parse(argv)
    findings = Findings(machines)
    check(program[0], program[1:], findings)
    said = {"checked": findings.checked, "later": findings.later, "not checked": findings.unseen}
    for title, texts in said.items():
        print(*lines(title, texts), sep="\n", end="\n" * bool(texts))
    for problem in dict.fromkeys(findings.problems):
        print(problem, file=sys.stderr)
    return 1 if findings.problems else 0


def parse(argv: Sequence[str] | None = None) -> tuple[Machines, list[str]]:
    """What the job asks for, and its program with its arguments."""
    parser = argparse.ArgumentParser(
        prog="preflight", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of a node (1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of a node (0)")
    parser.add_argument("--accelerator", metavar="NAME", help="make of the GPUs, such as H100")
    parser.add_argument("--memory-mb", type=int, default=0, metavar="MB", help="memory of a node")
    parser.add_argument("--patience-s", type=float, metavar="S", help="seconds that the launcher lets processes save")
    parser.add_argument("--save-s", type=float, metavar="S", help="seconds that the cluster lets a job save")
    parser.add_argument("--elsewhere", action="store_true", help="paths of this machine are not those of the job")
    parser.add_argument("--mounts", default="", metavar="FOLDER[:ro],...", help="folders that outlive a container")
    parser.add_argument("program", nargs="+", metavar="PROGRAM", help="module, and behind it its arguments; after a --")
    given = list(sys.argv[1:] if argv is None else argv)
    # By hand: argparse would take a `--` out of the program's own arguments too.
    border = given.index("--") if "--" in given else len(given)
    options = vars(parser.parse_args([*given[:border], *given[border + 1 :][:1]]))
    program = [*options.pop("program"), *given[border + 2 :]]
    options["mounts"] = tuple(filter(None, options["mounts"].split(",")))
    return Machines(**options), program


def check(module: str, arguments: Sequence[str], findings: Findings) -> None:
    """Look at one program.

    Args:
        module: As `python -m` takes it.
        arguments: Its command line.
        findings: Takes what is found.
    """
    if module not in CHECKS:
        try:
            there = importlib.util.find_spec(module) is not None
        except ImportError:
            there = False
        text = f"program {module}: none of this project's, its arguments are its own affair"
        if there or findings.machines.elsewhere:
            findings.unseen.append(text)
        else:
            findings.problems.append(
                f"program {module}: there is no such module; check its name, or the working folder"
            )
        return
    said = io.StringIO()
    try:
        with findings.guard(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            CHECKS[module](list(arguments), findings)
    except SystemExit as ended:  # the program's own parser refuses its arguments, or explains them
        if ended.code not in (0, None):
            text = said.getvalue() if isinstance(ended.code, int) else str(ended.code)
            findings.problems.append(f"arguments of {module}: {_last_words(text)}")


def _last_words(text: str) -> str:
    """What a parser says is wrong, without how the program is used."""
    said = [line.strip(_FRAME) for line in text.splitlines()]
    said = [line for line in said if line and not line.startswith("For full helptext")]
    first = next((number for number, line in enumerate(said) if "error: " in line), 0)
    return "; ".join(dict.fromkeys(said[first : first + 8])) or "refused"


if __name__ == "__main__":
    sys.exit(main())
