"""What training programs share of their command lines: `--preset`, `--config`, any field of `RunConfig` by its path."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import tyro

from mufasa_rec.config import RunConfig, load_config
from mufasa_rec.presets import PRESETS, preset


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `--preset` and `--config`, to which a program adds its own options."""
    made = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, add_help=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("-h", "--help", action="store_true", help="show this, and every field of the configuration")
    made.add_argument("--preset", metavar="NAME", help=f"start from one of {', '.join(PRESETS)}")
    made.add_argument("--config", metavar="FILE", help="a YAML file with some or all fields of the configuration")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None, saved: Callable[[argparse.Namespace], str | None]
) -> tuple[argparse.Namespace, RunConfig]:
    """Parse a program's own options, and the remaining ones as fields of the configuration.

    Args:
        made: The parser.
        argv: The command line.
        saved: Gives the configuration file of the run that is continued, None for a new run; where neither a preset nor
            a file is named it is what fields are changed from.

    Raises:
        ValueError: For an unknown preset, or a field or value that is refused.
    """
    options, rest = made.parse_known_args(argv)
    if options.help:
        made.print_help()
        print()
        rest = ["--help"]
    file = saved(options)
    if file and not options.preset and not options.config:
        config = load_config(file)
    else:
        config = preset(options.preset or "default")
    if options.config:
        config = load_config(options.config, config)
    config = tyro.cli(RunConfig, args=rest, default=config, prog=made.prog, config=(tyro.conf.FlagConversionOff,))
    return options, config
