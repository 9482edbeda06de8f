"""A training step of the demo preset: its time, its wait for data, and its softmax beside plain cross-entropy.

The data set is the demo's generated catalog; one process trains the `demo` preset's model. The softmax is measured
alone on the shape of such a step, forward and backward, against `torch.nn.functional.cross_entropy` on materialised
scores.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.ops.softmax import full_softmax_loss
from mufasa_rec.training.accounting import Waiting
from torchx_apps.benchmarks._demo_training import demo_training
from torchx_apps.benchmarks._measure import Measured, Settings, in_turn, measured

_WARM_UP = 5


def run(settings: Settings) -> list[Measured]:
    """Measure steps, then the softmax alone."""
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-benchmark-") as folder:
        dataset = str(Path(folder) / "dataset")
        prepare(PrepareConfig(input="synthetic:0", output=dataset))
        rows, shape = _steps(dataset, device, 10 if settings.small else 60)
    return rows + _softmax(shape, device, settings.rounds)


def _steps(dataset: str, device: torch.device, num_steps: int) -> tuple[list[Measured], dict[str, int]]:
    """Train some steps; returns step time and wait, and the shape of a step."""
    training = demo_training(dataset, device, _WARM_UP + num_steps)
    waiting, step_ms, shares = Waiting(), [], []
    stream = waiting.timed(training.batches())
    for step in range(_WARM_UP + num_steps):
        waiting.seconds, begin = 0.0, time.perf_counter()
        training.pipeline.progress(stream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if step >= _WARM_UP:
            step_ms.append(1000 * seconds)
            shares.append(100 * waiting.seconds / seconds)
    shape = {
        "rows": training.config.data.batch_size,
        "events": sum(training.events) // len(training.events),
        "targets": sum(training.targets) // len(training.targets),
        "items": int(training.data.catalog.available.sum()),
        "width": training.config.model.width,
    }
    rate = [1000 * shape["events"] / ms for ms in step_ms]
    found = [
        measured("step, demo preset", "ms", step_ms, shape),
        measured("step, demo preset, events trained", "events/s", rate),
        measured("step, demo preset, wait for data", "% of the step", shares),
    ]
    return found, shape


def _softmax(shape: dict[str, int], device: torch.device, rounds: int) -> list[Measured]:
    """The full softmax beside cross-entropy on materialised scores, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    query = (20 * F.normalize(torch.randn(shape["targets"], shape["width"], generator=generator), dim=1)).to(device)
    vectors = F.normalize(torch.randn(shape["items"], shape["width"], generator=generator), dim=1).to(device)
    target = torch.randint(0, shape["items"], (shape["targets"],), generator=generator).to(device)
    weight = torch.ones(shape["targets"], device=device)
    query.requires_grad_()
    vectors.requires_grad_()

    def fast() -> torch.Tensor:
        return _gradients(full_softmax_loss(query, vectors, target, weight), query, vectors)

    def plain() -> torch.Tensor:
        return _gradients(F.cross_entropy(query @ vectors.T, target, reduction="sum"), query, vectors)

    torch.testing.assert_close(fast(), plain(), rtol=1e-4, atol=1e-5)
    seconds = in_turn({"fast": fast, "plain": plain}, rounds)
    ratio = [a / b for a, b in zip(seconds["fast"], seconds["plain"], strict=True)]
    return [
        measured("full softmax, forward and backward", "ms", [1000 * s for s in seconds["fast"]]),
        measured("plain cross_entropy, forward and backward", "ms", [1000 * s for s in seconds["plain"]]),
        measured("full softmax over plain cross_entropy", "x the time", ratio),
    ]


def _gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Loss and gradients, flat."""
    return torch.cat([loss.detach()[None], *(g.flatten() for g in torch.autograd.grad(loss, inputs))])
