"""How far a run has come: what decides its next step and is no tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mufasa_rec.data.loader import LoaderState
from mufasa_rec.data.randomness import generator

_DROPOUT_STREAM = 7


@dataclass
class Progress:
    """Where the loop stands.

    Attributes:
        epoch: Epoch that is being read.
        step: Steps trained in it.
        validated: Whether the run was validated after that step.
        best: Metrics of the best validation, its step and epoch, and the name of its checkpoint; empty before one.
        poor: Validations since the best one.
        seconds: Seconds of training and validation so far, over all attempts.
    """

    epoch: int = 0
    step: int = 0
    validated: bool = False
    best: dict[str, Any] = field(default_factory=dict)
    poor: int = 0
    seconds: float = 0.0


def run_state(
    progress: Progress, data: LoaderState, *, seed: int, intervals: list[dict[str, float]], metrics_bytes: int
) -> dict[str, Any]:
    """The part of a checkpoint that is no tensor, as JSON knows it.

    Args:
        progress: Where the loop stands.
        data: Where the data stands.
        seed: Seed of the run. With the step it is the whole state of the random numbers: each draw is keyed.
        intervals: The open accounting interval of each rank.
        metrics_bytes: Length of `metrics.jsonl`.
    """
    return {
        "progress": asdict(progress),
        "data": {**asdict(data), "readers": [list(place) for place in data.readers]},
        "seed": seed,
        "intervals": intervals,
        "metrics_bytes": metrics_bytes,
    }


def check_data(state: dict[str, Any], data: LoaderState, seed: int) -> None:
    """Refuse to continue on rows in another order.

    Raises:
        ValueError: When the seed or the readers' places are not those of the checkpoint.
    """
    if state["seed"] != seed:
        raise ValueError(f"seed={seed}: the checkpoint was written with seed {state['seed']}; continue with that one.")
    saved = [tuple(place) for place in state["data"]["readers"]]
    if saved == data.readers:
        return
    if len(saved) != len(data.readers):
        raise ValueError(
            f"data.num_readers={len(data.readers)}: the checkpoint was written with {len(saved)}; the order of the "
            "data depends on it, so continue with that number."
        )
    differ = sum(a != b for a, b in zip(saved, data.readers, strict=True))
    raise ValueError(
        f"data: {differ} of {len(saved)} readers would not continue where the checkpoint stopped; the rows of the data "
        "set or data.batch_size were changed. Continue with the old ones, or train in another folder."
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key this rank's random draws of one step (dropout), so that they need not be saved and no other code moves them.

    Args:
        seed: Seed of the run.
        step: Optimizer steps done.
        rank: This rank; ranks draw differently.
    """
    torch.manual_seed(int(generator(seed, step, rank, _DROPOUT_STREAM).integers(1 << 63)))
