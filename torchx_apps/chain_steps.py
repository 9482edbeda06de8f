"""The steps of the chain: what each program is told, where it writes, and whether it is done."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mufasa_rec.data import paths
from mufasa_rec.presets import PRESETS
from torchx_apps import evaluate, export, fuse, fuse_config, prepare, train

STEPS = ("prepare", "fuse", "train", "evaluate", "export")
RECORD_FILE = "chain.json"
DATASET_FILE = "dataset.json"
FUSED = fuse_config.FuseConfig().output
# The folder of each step inside the chain's, and the file in it that is written last.
PLACES = {
    "prepare": ("dataset", DATASET_FILE),
    "fuse": ("fusion", "summary.json"),
    "train": ("model", "summary.json"),
    "evaluate": ("evaluation", "summary.json"),
    "export": ("tables", "tables.json"),
}
# What the chain itself tells a program: its folders.
OWN = {
    "prepare": ("--input", "--output"),
    "fuse": ("--dataset", "--run"),
    "train": ("--data.dataset", "--run", "--preset"),
    "evaluate": ("--run", "--output"),
    "export": ("--run", "--output"),
}


@dataclass(frozen=True, kw_only=True)
class ChainOptions:
    """What the command line asks for.

    Attributes:
        run: Folder of everything that is written, on storage that all nodes share.
        input: What `prepare` reads.
        preset: Named configuration of the training.
        steps: The steps to do, in their order.
        more: More arguments of each step's program.
    """

    run: str
    input: str = ""
    preset: str = "default"
    steps: tuple[str, ...] = STEPS
    more: dict[str, list[str]] = field(default_factory=dict)

    def folder(self, step: str) -> str:
        """Where a step writes."""
        return paths.join(self.run, PLACES[step][0])

    def is_written(self, step: str) -> bool:
        """Whether a step has written its last file."""
        return paths.exists(paths.join(self.run, *PLACES[step]))


def parse(argv: Sequence[str] | None, description: str | None) -> ChainOptions:
    """Read a command line; each step's own arguments stand behind `STEP:`.

    Raises:
        ValueError: For an unknown step, or arguments that the chain gives itself or that a program refuses.
    """
    parser = argparse.ArgumentParser(
        prog="chain", description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of everything that is written")
    parser.add_argument("--input", default="", metavar="SOURCE", help="what prepare reads: folder, file, synthetic:0")
    parser.add_argument(
        "--preset", default="default", choices=PRESETS, metavar="NAME", help="of the training (default)"
    )
    parser.add_argument("--steps", default=",".join(STEPS), metavar="STEP,...", help=f"which ({','.join(STEPS)})")
    parser.add_argument("more", nargs="*", metavar="STEP: ARGUMENTS", help="more arguments of a step's own program")
    own, more = _sections(list(argv or []))
    given = vars(parser.parse_args(own))
    if given.pop("more"):
        raise ValueError(f"{own[-1]!r}: belongs to no step; write its arguments behind the step's name, as in `train:`")
    named = tuple(filter(None, given.pop("steps").split(",")))
    unknown = [name for name in (*named, *more) if name not in STEPS]
    if unknown:
        raise ValueError(f"step {unknown[0]!r}: unknown; the steps are {', '.join(STEPS)}")
    idle = [name for name in more if name not in named]
    if idle:
        raise ValueError(f"{idle[0]}: has arguments, but --steps leaves it out; take them away, or add the step")
    options = ChainOptions(**given, steps=tuple(name for name in STEPS if name in named), more=more)
    if "prepare" in named and not options.input:
        raise ValueError("--input: missing; give what prepare reads, or leave prepare out of --steps")
    for step, arguments in more.items():
        twice = [one for one in arguments if one.partition("=")[0].replace("_", "-") in OWN[step]]
        if twice:
            raise ValueError(f"{step}: {twice[0]} is given by the chain itself; its --run, --input, --preset say it")
    return options


def _sections(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The chain's own arguments, and those behind each `STEP:`."""
    own: list[str] = []
    more: dict[str, list[str]] = {}
    into = own
    for word in argv:
        if word.endswith(":") and word[:-1].isidentifier():
            into = more.setdefault(word[:-1], [])
        else:
            into.append(word)
    return own, more


def refuse_wrong(options: ChainOptions) -> None:
    """Have every program's own parser read what it will be told, before the first step begins.

    Raises:
        ValueError: For a field or value that a program refuses.
        SystemExit: For an argument that a program does not know; the parser has said which.
    """
    for step in options.steps:
        arguments = arguments_of(step, options, with_content=True)
        if step == "prepare":
            prepare.parse(arguments)
        elif step in ("evaluate", "export"):
            (evaluate if step == "evaluate" else export).make_parser().parse_args(arguments)
        else:  # no saved configuration is looked at: the step itself does
            (fuse if step == "fuse" else train).parse(arguments, lambda run: None)


def arguments_of(step: str, options: ChainOptions, *, with_content: bool) -> list[str]:
    """The command line of a step.

    Args:
        step: Which.
        options: What the chain is told.
        with_content: Whether the items have content vectors, which `fuse` makes one of.
    """
    more, dataset = options.more.get(step, []), options.folder("prepare")
    if step == "prepare":
        training = ["--preset", options.preset, "--run", options.folder("train"), *options.more.get("train", [])]
        _, config = train.parse(training, lambda run: None)
        return [*prepare_arguments(options.input, dataset, config.data.max_history), *more]
    if step == "fuse":
        manifest = read_manifest(dataset) if with_content and options.is_written("prepare") else {}
        chosen = options.preset if options.preset in fuse_config.PRESETS else "default"
        return [*fuse_arguments(chosen, dataset, options.folder("fuse"), manifest), *more]
    if step == "train":
        content = ["--data.modalities", FUSED] if with_content and "fuse" in options.steps else []
        places = ["--data.dataset", dataset, "--run", options.folder("train")]
        return ["--preset", options.preset, *places, *content, *more]
    return ["--run", options.folder("train"), "--output", options.folder(step), *more]


def prepare_arguments(source: str, output: str, max_history: int) -> list[str]:
    """What `prepare` is told: a row holds no more targets than the model reads, or the oldest would not be trained."""
    return ["--input", source, "--output", output, "--split.targets-per-row", str(max_history)]


def fuse_arguments(preset: str, dataset: str, run: str, manifest: dict[str, Any]) -> list[str]:
    """What `fuse` is told for a data set whose titles or genres may go by other names, or be none.

    Args:
        preset: Named configuration of the fusion.
        dataset: The data set.
        run: Folder of the fusion run.
        manifest: The data set's `dataset.json`; empty when it is not there yet.
    """
    arguments = ["--preset", preset, "--dataset", dataset, "--run", run]
    if not manifest:
        return arguments
    modalities = sorted(name for name in manifest["content"] if name != FUSED)
    if fuse_config.FuseConfig().layer.anchor not in modalities:
        arguments += ["--layer.anchor", modalities[0]]
    categoricals = [name for name, feature in manifest["features"].items() if feature["level"] == "item"]
    if not set(fuse_config.GENRES).intersection(categoricals):
        arguments += ["--genre", "none"]
    return arguments


def read_manifest(dataset: str) -> dict[str, Any]:
    """The `dataset.json` of a data set, as it stands there."""
    with paths.open_file(paths.join(dataset, DATASET_FILE)) as file:
        return json.load(file)


def has_content(dataset: str) -> bool:
    """Whether the items of a data set have vectors that can be fused."""
    return any(name != FUSED for name in read_manifest(dataset)["content"])
