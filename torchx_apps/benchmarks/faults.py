"""Faults: a run on two ranks is killed again and again, started again, and compared with one that nobody disturbed.

    python -m torchx_apps.benchmark faults [--kills 20] [--seed 0] [--json FILE] [--small] [--folder FOLDER]

The run is that of the `demo` preset on its generated catalog, shorter, with a checkpoint every ten steps and dropout.
torchrun or one of its ranks gets SIGTERM, SIGUSR1 or SIGKILL: after a random step, while a checkpoint is written, while
the run is validated, or while it starts. The same command is started again until the run is done. Then its newest and
its best checkpoint (weights, optimizer state), its metrics and the rows of every step must be those of the undisturbed
run, bit for bit. Runs of at most 25 faults follow one another until there were enough.

It prints and writes a row per fault: what, when, how it ended (the exit code of torchrun and of each rank; `-` is a
rank that could not say one), the steps that had to be trained again, and whether its run was equal at last; and a row
of totals. The exit code is 1 when a run was lost or differs. `all` leaves this benchmark out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mufasa_rec.data import paths
from mufasa_rec.data.prepare import PrepareConfig, prepare
from torchx_apps.benchmarks._attack import RANKS, Fault, Run, RunLostError, run_to_end
from torchx_apps.benchmarks._same_run import differences

EVERY_STEPS = 10
_MOST_IN_A_RUN = 25
_PHASES = {"step": 10, "save": 6, "validation": 3, "start": 2}
_SIGNALS = (("SIGTERM", None), ("SIGUSR1", None), ("SIGTERM", 0), ("SIGKILL", 0), ("SIGKILL", None))
_DELAYS_S = {"step": 0.4, "save": 0.6, "validation": 2.0, "start": 8.0}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What is attacked, and how.

    Attributes:
        arguments: What `torchx_apps.train` is told, without `--run`.
        steps: Steps of the run.
        kills: Faults in all.
        seed: Seed of the faults.
        folder: Where runs, journals and logs go.
    """

    arguments: list[str]
    steps: int
    kills: int
    seed: int
    folder: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, attack, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark faults", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=20, help="faults in all (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (0)")
    parser.add_argument("--json", metavar="FILE", help="where the rows are written")
    parser.add_argument("--small", action="store_true", help="a short run that only shows that it works")
    parser.add_argument("--folder", help="new folder that keeps runs, journals and logs; else they are removed")
    options = parser.parse_args(argv)
    if options.kills < 1:
        raise SystemExit(f"benchmark: --kills {options.kills}: choose 1 or more.")
    kept = Path(options.folder) if options.folder else None
    folder = kept or Path(tempfile.mkdtemp(prefix="mufasa-rec-faults-"))
    try:
        steps = 40 if options.small else 240
        campaign = Campaign(
            arguments=_demo(folder, steps), steps=steps, kills=options.kills, seed=options.seed, folder=folder
        )
        rows = attack(campaign)
    except RunLostError as error:
        raise SystemExit(f"benchmark: the undisturbed run {error}") from error
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        with paths.atomic_write(options.json) as path:
            path.write_text(json.dumps(rows, indent=2) + "\n")
    if not rows[-1]["equal"]:
        raise SystemExit(1)


def _demo(folder: Path, steps: int) -> list[str]:
    """Prepare the demo's data set; returns the arguments of a short run on it."""
    dataset = str(folder / "dataset")
    prepare(PrepareConfig(input="synthetic:0", output=dataset))
    return [
        "--preset", "demo", "--data.dataset", dataset, "--trainer.max-steps", str(steps),
        "--trainer.validate-every", "1", "--trainer.patience", "0", "--trainer.log-every", "4",
        "--checkpoint.every-steps", str(EVERY_STEPS),
    ]  # fmt: skip


def attack(campaign: Campaign) -> list[Row]:
    """Run undisturbed, then attack run after run; prints each row when it is known.

    Returns:
        The rows of all faults, and that of totals.
    """
    draw = random.Random(campaign.seed)
    undisturbed = Run(campaign.folder / "undisturbed", campaign.arguments)
    run_to_end(undisturbed)
    epoch_steps = sum(epoch == 0 for epoch, _ in undisturbed.steps)
    print(f"{'':3} {'fault':<20} {'when':<34} {'outcome':<58} {'lost':>4}", flush=True)
    rows: list[Row] = []
    problems: list[str] = []
    runs = 0
    while len(rows) < campaign.kills:
        runs += 1
        run = Run(campaign.folder / f"attacked-{runs}", campaign.arguments)
        faults = plan(campaign, draw, campaign.kills - len(rows), epoch_steps)
        found = attack_run(run, faults, undisturbed, first=len(rows) + 1)
        said = found.pop()["outcome"]
        rows += found
        problems += [f"run {runs}: {said}"] * bool(said)
        print(f"    run {runs}: {said or 'equal to the undisturbed one'}", flush=True)
        if not found and said:
            break  # it cannot even start
    lost = sum(row["steps_lost"] for row in rows)
    outcome = "; ".join(problems) or f"{runs} attacked runs equal the undisturbed one"
    total = {"fault": "all", "when": f"{len(rows)} faults", "outcome": outcome, "steps_lost": lost}
    rows.append({**total, "equal": not problems and all(row["equal"] for row in rows)})
    print(f"    all: {len(rows) - 1} faults, {lost} steps trained again, {outcome}", flush=True)
    return rows


def plan(campaign: Campaign, draw: random.Random, kills: int, epoch_steps: int) -> list[Fault]:
    """Faults of one run, in the order of its steps: every kind of signal in turn, moments at random."""
    kinds = draw.sample(_SIGNALS, len(_SIGNALS))
    faults = []
    for number in range(min(kills, _MOST_IN_A_RUN)):
        name, victim = kinds[number % len(kinds)]
        (phase,) = draw.choices(list(_PHASES), list(_PHASES.values()))
        step = draw.randrange(campaign.steps - EVERY_STEPS)
        if phase == "validation":
            step = min((step // epoch_steps + 1) * epoch_steps, campaign.steps)
        victim = None if victim is None else draw.randrange(RANKS)
        delay_s = draw.uniform(0, _DELAYS_S[phase])
        faults.append(Fault(signal=name, victim=victim, phase=phase, step=step, delay_s=delay_s))
    return sorted(faults, key=lambda fault: fault.step)


def attack_run(run: Run, faults: Sequence[Fault], undisturbed: Run, first: int = 1) -> list[Row]:
    """Attack one run until it is done.

    Args:
        run: The run, not begun.
        faults: What is done to it, one after the other.
        undisturbed: The run that it must be equal to.
        first: Number of the first fault.

    Returns:
        A row per fault, and one whose outcome says what is wrong with the run, empty when nothing is.
    """
    rows: list[Row] = []
    problem = ""
    try:
        for fault in faults:
            row = _one(run, fault)
            if row is None:
                break
            rows.append(row)
            _show(first + len(rows) - 1, row)
        run_to_end(run)
        problem = "; ".join(differences(run.folder, undisturbed.folder)[:5])
    except RunLostError as error:
        problem = f"lost: {error}"
    for row in rows:
        row["equal"] = not problem
    return [*rows, {"outcome": problem}]


def _one(run: Run, fault: Fault) -> Row | None:
    """Start the run and do one thing to it; None when it was done before."""
    attempt = run.start()
    try:
        when = attempt.strike(fault)
        outcome = attempt.ended()
    finally:
        attempt.end()
    if when is None:
        return None
    saved = run.saved_step()
    lost = max(attempt.done_steps - saved, 0)
    return {"fault": fault.name, "when": when, "outcome": f"{outcome}, saved at {saved}", "steps_lost": lost}


def _show(number: int, row: Row) -> None:
    print(f"{number:3} {row['fault']:<20} {row['when']:<34} {row['outcome']:<58} {row['steps_lost']:>4}", flush=True)
