"""A training step of the demo preset: its time, its wait for data, and its softmax beside plain cross-entropy.

The data set is the demo's generated catalog; one process trains the `demo` preset's model. The softmax is measured
alone on the shape of such a step, forward and backward, against `torch.nn.functional.cross_entropy` on materialised
scores.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.ops.softmax import full_softmax_loss
from mufasa_rec.presets import preset
from mufasa_rec.training.accounting import Waiting
from mufasa_rec.training.optim import TrainOptimizer
from torchx_apps import assembly
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
    config = preset("demo")
    config = replace(config, data=replace(config.data, dataset=dataset), threads=1)
    env = DistributedEnv(rank=0, world_size=1, local_rank=0, device=device)
    data, exchange = assembly.open_dataset(config), RankExchange()
    loader = assembly.make_loader(config, data, "train", env)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), device)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, _WARM_UP + num_steps)
    pipeline = TrainPipelineSparseDist(model=model, optimizer=optimizer, device=device, execute_all_batches=True)  # type: ignore[arg-type]
    model.train()
    targets, events = [], []

    def batches():  # noqa: ANN202  of the loader, over as many epochs as it takes
        for epoch in range(_WARM_UP + num_steps):
            for batch in loader.batches(epoch):
                targets.append(batch.num_targets)
                events.append(batch.num_events)
                yield batch

    waiting, step_ms, shares = Waiting(), [], []
    stream = waiting.timed(batches())
    for step in range(_WARM_UP + num_steps):
        waiting.seconds, begin = 0.0, time.perf_counter()
        pipeline.progress(stream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if step >= _WARM_UP:
            step_ms.append(1000 * seconds)
            shares.append(100 * waiting.seconds / seconds)
    shape = {
        "rows": config.data.batch_size,
        "events": sum(events) // len(events),
        "targets": sum(targets) // len(targets),
        "items": int(data.catalog.available.sum()),
        "width": config.model.width,
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
