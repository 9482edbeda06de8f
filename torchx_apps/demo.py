"""The whole way on one page: prepare, fuse, train, evaluate, each a job of 2 processes by `torchx run`, and a table.

    python -m torchx_apps.demo [--data FOLDER] [--columns FILE] [--run FOLDER] [--preset NAME] [--task NAME] [--seed N]

`make demo` calls it; for the ranking task see `torchx_apps.demo_ranking`. Without data it takes a generated catalog,
whose oracle (its true distribution) joins the table.
Where the data set has content vectors, `fuse` makes one of all that an item has, which the model reads, and the same
model is trained once more without content.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mufasa_rec.config import RunConfig
from mufasa_rec.presets import preset
from torchx_apps import demo_ranking, fuse_config
from torchx_apps.chain_steps import FUSED, fuse_arguments, prepare_arguments
from torchx_apps.demo_table import format_table
from torchx_apps.local_job import Job, JobFailedError, run_job

TASKS = ("retrieval", "ranking")
MARKER = "demo.json"
CREATED_BY = "torchx_apps.demo"
# All that the demo and its jobs write into the run folder, and so all that it replaces.
OUTPUTS = (
    "dataset",
    "fusion",
    "model",
    "model_without_content",
    "logs",
    "summary.json",
    "evaluation.json",
    "ranks.safetensors",
    "report.html",
    *demo_ranking.OUTPUTS,
    MARKER,
)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the command line asks for."""

    data: str = ""
    columns: str = ""
    run: Path = Path("runs/demo")
    preset: str = "demo"
    task: str = "retrieval"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(
                f"task is {self.task!r}: the tasks that exist are {', '.join(TASKS)}; give TASK={TASKS[0]}"
            )
        if self.config().task != self.task:
            raise ValueError(f"preset is {self.preset!r}, which is for {self.config().task}; give TASK= or PRESET=")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give SEED=0 or more")
        if any(character in str(self.run) for character in ",;="):
            raise ValueError(
                f"run is '{self.run}': TorchX takes no log folder with ',', ';' or '='; give another RUN=<folder>"
            )
        if self.data and "://" not in self.data and not os.path.isdir(self.data):
            raise ValueError(f"data is {self.data!r}: no such folder; give DATA=<folder with interactions.*, items.*>")
        if self.columns and not self.data:
            raise ValueError(f"columns is {self.columns!r} without data: the generated catalog needs none; give DATA=")
        if self.columns and "://" not in self.columns and not os.path.isfile(self.columns):
            raise ValueError(f"columns is {self.columns!r}: no such file; give COLUMNS=<a columns.json>")
        if self.data and Path(self.data).resolve().is_relative_to(self.run.resolve()):
            raise ValueError(f"data is {self.data!r}, inside the run folder '{self.run}': give another RUN=<folder>")

    def config(self) -> RunConfig:
        """The preset's configuration; a ``ValueError`` lists the presets there are."""
        return preset(self.preset)

    @property
    def source(self) -> str:
        """What `prepare` is given as input."""
        return self.data or f"synthetic:{'clicks:' if self.task == 'ranking' else ''}{self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0, or 1 when a job failed, 2 for a wrong argument, 130 when it was interrupted.
    """
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    try:
        options = parse_options(argv)
        claim_run_folder(options)
        run_demo(options)
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except JobFailedError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; its processes are ended", file=sys.stderr)
        return 130
    return 0


def parse_options(argv: Sequence[str] | None) -> DemoOptions:
    """Read the command line; an empty text means the default, as `make` passes variables that are not set."""
    parser = argparse.ArgumentParser(
        "torchx_apps.demo", description="Prepare, fuse, train, evaluate: the whole way with a table."
    )
    parser.add_argument(
        "--data", default="", help="folder with interactions.*, items.* and vectors (default: generated)"
    )
    parser.add_argument("--columns", default="", help="a columns.json that lies elsewhere than beside the data")
    parser.add_argument("--run", default="", help="folder for everything that is written (default: runs/demo)")
    parser.add_argument("--preset", default="", help="named configuration of the training (default: demo)")
    parser.add_argument("--task", default="", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument("--seed", default="", help="seed of the generated catalog (default: 0)")
    given: dict[str, Any] = {name: text for name, text in vars(parser.parse_args(argv)).items() if text}
    if "run" in given:
        given["run"] = Path(given["run"])
    if "seed" in given:
        if not given["seed"].lstrip("-").isdecimal():
            raise ValueError(f"seed is {given['seed']!r}: give a whole number, SEED=0")
        given["seed"] = int(given["seed"])
    if given.get("task") == "ranking":
        own: dict[str, Any] = {"run": Path("runs/demo-ranking"), "preset": "demo-ranking"}
        given = own | given
    return DemoOptions(**given)


def claim_run_folder(options: DemoOptions) -> None:
    """Make the run folder the demo's own: remove what an earlier demo wrote, refuse a folder that holds anything else.

    Raises:
        ValueError: The folder holds files and no marker of an earlier demo.
    """
    run = options.run
    if run.exists() and not run.is_dir():
        raise ValueError(f"run is '{run}', a file: give another RUN=<folder>")
    held = sorted(path.name for path in run.iterdir()) if run.exists() else []
    if held and not _is_marker(run / MARKER):
        raise ValueError(
            f"run is '{run}': the folder holds {', '.join(held[:4])}{' ...' if held[4:] else ''}, which no demo wrote; "
            "give another with RUN=<folder>, or move it away"
        )
    for path in (run / name for name in OUTPUTS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    marker = {"created_by": CREATED_BY, "data": options.source, "preset": options.preset, "task": options.task}
    (run / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def run_demo(options: DemoOptions) -> None:
    """Run the jobs one after another and print the table."""
    run = options.run
    what = f"your data in {options.data}" if options.data else f"a generated catalog (seed {options.seed})"
    print(f"mufasa_rec: {options.task} on {what}, preset {options.preset}, into {run}", flush=True)
    seconds = {"prepare": _run(options, prepare_job(options))}
    if options.task == "ranking":
        _rank(options, seconds)
        return
    fuse = fuse_job(options, _read_json(run / "dataset" / "dataset.json"))
    with_content = fuse is not None
    if fuse is None:
        print("\nfuse is left out: the data has no content vectors", flush=True)
    for job in [*([fuse] if fuse else []), *train_jobs(options, with_content), evaluate_job(options, with_content)]:
        seconds[job.name] = _run(options, job)
    print()
    print(format_table(_read_json(run / "summary.json")))
    print()
    print(format_places(run, with_content))
    print(format_seconds(seconds))


def _rank(options: DemoOptions, seconds: dict[str, float]) -> None:
    """Run the jobs of the ranking task behind `prepare`, and print the table."""
    dataset = _read_json(options.run / "dataset" / "dataset.json")
    for job in demo_ranking.jobs(options.preset, options.run, has_content=bool(dataset["content"])):
        seconds[job.name] = _run(options, job)
    print()
    print(demo_ranking.format_table(_read_json(options.run / "summary.json")))
    print(f"\nrun folder   {options.run}\nlogs         {options.run / 'logs'}")
    print(format_seconds(seconds))


def format_seconds(seconds: dict[str, float]) -> str:
    """Say how long each job took."""
    each = " · ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return f"seconds      {each} · together {sum(seconds.values()):.0f}"


def prepare_job(options: DemoOptions) -> Job:
    """Return the job that makes the data set."""
    max_history = options.config().data.max_history
    arguments = prepare_arguments(options.source, str(options.run / "dataset"), max_history)
    if options.columns:
        arguments += ["--columns-file", options.columns]
    return Job(name="prepare", component="prepare", program_args=arguments)


def fuse_job(options: DemoOptions, dataset: dict[str, Any]) -> Job | None:
    """Return the job that fuses an item's content vectors into one; None for a data set that has none.

    Args:
        options: What the command line asks for.
        dataset: The data set's `dataset.json`.
    """
    if not dataset["content"]:
        return None
    chosen = options.preset if options.preset in fuse_config.PRESETS else "default"
    arguments = fuse_arguments(chosen, str(options.run / "dataset"), str(options.run / "fusion"), dataset)
    return Job(name="fuse", component="fuse", program_args=arguments)


def train_jobs(options: DemoOptions, with_content: bool) -> list[Job]:
    """Return the training of the model and, where there is content, of the same model without it.

    The model reads the fused vectors alone: that is how its `data.modalities` names them.
    """
    common = ["--preset", options.preset, "--data.dataset", str(options.run / "dataset")]
    content = ["--data.modalities", FUSED] if with_content else []
    jobs = [Job(name="train", component="train", program_args=[*common, *content, "--run", str(options.run / "model")])]
    if with_content:
        arguments = [*common, "--run", str(options.run / "model_without_content"), "--model.use_content", "False"]
        jobs.append(Job(name="train without content", component="train", program_args=arguments))
    return jobs


def evaluate_job(options: DemoOptions, with_content: bool) -> Job:
    """Return the job that ranks the catalog with every trained model and writes the report."""
    arguments = ["--run", str(options.run / "model"), "--output", str(options.run)]
    if with_content:
        arguments += ["--compare", f"model_without_content={options.run / 'model_without_content'}"]
    return Job(name="evaluate", component="evaluate", program_args=arguments)


def format_places(run: Path, with_content: bool) -> str:
    """Say where things lie."""
    models = [run / "model", *([run / "model_without_content"] if with_content else [])]
    reports = [run / "report.html", *([run / "fusion" / "report.html"] if with_content else [])]
    places = {
        "run folder": str(run),
        "TensorBoard": "tensorboard --logdir " + str(run) + f"   ({', '.join(str(m / 'tensorboard') for m in models)})",
        "reports" if with_content else "report": ", ".join(str(report) for report in reports),
        "logs": str(run / "logs"),
    }
    return "\n".join(f"{name:<13}{place}" for name, place in places.items())


def _run(options: DemoOptions, job: Job) -> float:
    print(f"\n{job.name}", flush=True)
    # A process has half of the cores; small models gain nothing beyond four.
    threads = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
    seconds = run_job(job, options.run / "logs" / job.name.replace(" ", "_"), threads)
    print(f"    ({seconds:.0f} s)", flush=True)
    return seconds


def _is_marker(path: Path) -> bool:
    try:
        return json.loads(path.read_text()).get("created_by") == CREATED_BY
    except (OSError, ValueError, AttributeError):
        return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise JobFailedError(f"'{path}' is missing though the job that writes it ended well: {error}") from error


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
