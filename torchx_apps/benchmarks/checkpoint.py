"""Checkpoints: what a save in the background costs the steps beside it, and how long it takes.

One process with one thread trains the `demo` preset's model, whose item table is grown so that a checkpoint is a few
hundred MiB. Steps without a save and steps beside one are measured in turn. A save begins with a copy of the state, for
which the training waits: the first step beside a save has it in its time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mufasa_rec.data import paths
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.prepare import PrepareConfig, prepare
from mufasa_rec.training.checkpoint import load_tensors, model_state
from mufasa_rec.training.checkpoint_manifest import Manifest
from mufasa_rec.training.saver import CheckpointConfig, Saver
from torchx_apps import assembly
from torchx_apps.benchmarks._demo_training import DemoTraining, demo_training
from torchx_apps.benchmarks._measure import Measured, Settings, measured

_WARM_UP = 5
_STATE = {"progress": {"best": {}}}


def run(settings: Settings) -> list[Measured]:
    """Measure steps with and without a save, in turn."""
    torch.set_num_threads(1)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="mufasa-rec-benchmark-") as folder:
        dataset = str(Path(folder) / "dataset")
        prepare(PrepareConfig(input="synthetic:0", output=dataset))
        training = demo_training(dataset, device, 10_000, num_rows=0 if settings.small else 400_000)
        saver = Saver(str(Path(folder) / "checkpoints"), CheckpointConfig(keep_last=1), {})
        return _measure(training, saver, 1 if settings.small else settings.rounds)


def _measure(training: DemoTraining, saver: Saver, rounds: int) -> list[Measured]:
    stream = training.batches()
    for _ in range(_WARM_UP):
        _step(training, stream)
    _save(training, saver, wait=True)
    size = check(training, saver)
    quiet, beside, ratios, copies, spans, costs = [], [], [], [], [], []
    for _ in range(rounds):
        alone = [_step(training, stream) for _ in range(12)]
        begin = time.perf_counter()
        copies.append(1000 * _save(training, saver, wait=False))
        with_save = [_step(training, stream) + copies[-1]]
        while saver.busy:
            with_save.append(_step(training, stream))
        spans.append(time.perf_counter() - begin)
        usual = sorted(alone)[len(alone) // 2]
        quiet += alone
        beside += with_save
        ratios.append(sorted(with_save)[len(with_save) // 2] / usual)
        costs.append(sum(with_save) - usual * len(with_save))
    waiting = [1000 * _save(training, saver, wait=True) for _ in range(max(1, rounds // 3))]
    shape = {"checkpoint MiB": size >> 20, "steps beside a save": len(beside) // rounds}
    return [
        measured("step without a save", "ms", quiet, shape),
        measured("step beside a save", "ms", beside),
        measured("step beside a save, of one without (medians of a round)", "x", ratios),
        measured("copy of the state, for which training waits", "ms", copies),
        measured("save, from its begin to the complete checkpoint", "s", spans),
        measured("time that a save in the background costs the training", "ms", costs),
        measured("time that a save in the foreground costs the training", "ms", waiting),
    ]


def _step(training: DemoTraining, stream: Iterator[Batch]) -> float:
    """Milliseconds of one step."""
    begin = time.perf_counter()
    training.pipeline.progress(stream)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


def _tensors(training: DemoTraining) -> dict[str, Any]:
    state = model_state(training.model, assembly.content_tables(training.data))
    return {"model": state, "optimizer": training.optimizer.tensors()}


def _save(training: DemoTraining, saver: Saver, *, wait: bool) -> float:
    """Seconds that training waits for a save."""
    begin = time.perf_counter()
    step = training.optimizer.num_steps
    manifest = Manifest(name=saver.name(step), step=step, state=_STATE, about={})
    saver.save(manifest, _tensors(training), wait=wait)
    return time.perf_counter() - begin


def check(training: DemoTraining, saver: Saver) -> int:
    """Compare the state with what the newest checkpoint gives back; returns its bytes.

    Raises:
        AssertionError: When a tensor differs.
    """
    manifest = saver.newest()
    assert manifest is not None
    before = {name: tensor.clone() for name, tensor in _local(_tensors(training), "")}
    for _, tensor in _local(_tensors(training), ""):
        tensor.fill_(-7.0)
    load_tensors(paths.join(saver.location, manifest.name), _tensors(training))
    assert all(torch.equal(tensor, before[name]) for name, tensor in _local(_tensors(training), ""))
    return sum(facts.bytes for facts in manifest.files.values())


@torch.no_grad()
def _local(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's tensors of a state."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _local(inner, f"{name}/{key}")
    elif isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield f"{name}/{shard.metadata.shard_offsets}", shard.tensor.detach()
    else:
        yield name, value.detach()
