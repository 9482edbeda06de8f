"""Two training steps under observation: the first as it is, the second watched for waits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mufasa_rec.diagnosis.finding import Finding, of_failure
from mufasa_rec.diagnosis.host_waits import HostWaits
from mufasa_rec.diagnosis.memory import PeakMemory, held_bytes
from mufasa_rec.diagnosis.pipelined import left_out_findings, sharded_modules, trace_findings, unwrapped
from mufasa_rec.diagnosis.source import SourceLine
from mufasa_rec.training.optim import TrainOptimizer
from mufasa_rec.training.pipelining import left_out, make_pipeline


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model that is ready to train.

    Attributes:
        model: The sharded model.
        optimizer: Updates its weights.
        batches: Two batches of this rank.
        device: Device of this rank.
        forward: Runs the model on a batch.
        prefetch: Whether rows of cached tables are fetched ahead.
        peak: Measures memory from before the model was built.
    """

    model: nn.Module
    optimizer: TrainOptimizer
    batches: Iterable[Any]
    device: torch.device
    forward: Callable[[Any], Any]
    prefetch: bool = False
    peak: PeakMemory


@dataclass
class Examination:
    """What two steps showed.

    Attributes:
        findings: What is wrong, and waits that are meant.
        modules: Sharded modules, and whether each is pipelined; empty when no two steps were done.
        parameters: Data-parallel parameters, and whether each has a gradient; empty when no step was done.
        memory: Bytes of this rank by what they are for, and `peak_growth`.
        num_steps: Steps that were done.
    """

    findings: list[Finding] = field(default_factory=list)
    modules: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, bool] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0


def examine(ready: Ready) -> Examination:
    """Run two steps and look; collective.

    A step that fails ends the examination, with its line among the findings.
    """
    seen = Examination()
    seen.findings, traceable = trace_findings(ready.model)
    seen.modules = dict.fromkeys(sharded_modules(ready.model), False)
    ready.model.train()
    waits = HostWaits(ready.device)
    waits.mark(ready.model)
    step = (_Pipelined if traceable else _Plain)(ready, waits)
    try:
        with waits.following():  # the first step looks the second one's batch up ahead
            step.run()
        seen.num_steps = 1
        _look_at_gradients(ready, seen)
        with waits.watching():
            step.run()
        seen.num_steps = 2
    except Exception as error:
        seen.findings.append(of_failure("step", f"step {seen.num_steps + 1}", error))
        seen.modules = {}  # nobody knows
        return seen
    seen.findings += waits.findings()
    if traceable:
        _look_at_pipeline(step.left_out(), seen)
    optimizers = (dict(ready.optimizer.dense.state), ready.optimizer.fused.state_dict()["state"])
    seen.memory = held_bytes(ready.model, ready.optimizer.parameters, optimizers)
    seen.memory["peak_growth"] = ready.peak.growth()
    return seen


class _Plain:
    """Steps without the pipeline, for a model that it cannot trace."""

    def __init__(self, ready: Ready, waits: HostWaits) -> None:
        self.ready, self.waits = ready, waits
        self.batches = iter(ready.batches)

    def run(self) -> None:
        """One step."""
        batch = next(self.batches).to(self.ready.device)
        self.waits.mark(batch)
        self.ready.optimizer.zero_grad()
        loss: Tensor = self.ready.forward(batch)[0]
        loss.sum().backward()
        self.ready.optimizer.step()

    def left_out(self) -> list[str]:
        """All of them."""
        return list(sharded_modules(self.ready.model))


class _Pipelined:
    """Steps in TorchRec's pipeline."""

    def __init__(self, ready: Ready, waits: HostWaits) -> None:
        self.ready, self.waits = ready, waits
        self.pipeline = make_pipeline(
            ready.model, ready.optimizer, ready.device, self._forward, prefetch=ready.prefetch
        )
        self.batches = self._marked(ready.batches)

    def run(self) -> None:
        """One step."""
        self.pipeline.progress(self.batches)

    def left_out(self) -> list[str]:
        """Those that the pipeline left out, by the names of `sharded_modules`."""
        names = set(left_out(self.ready.model, self.pipeline))
        left = {id(module) for name, module in self.ready.model.named_modules() if name in names}
        return [name for name, module in sharded_modules(self.ready.model).items() if id(module) in left]

    def _marked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, marked as lying on the device before the pipeline exchanges their ids."""
        for batch in batches:
            self.waits.mark(batch)
            yield batch

    def _forward(self, batch: Any) -> Any:
        self.waits.mark(batch)  # a batch may be copied on its way
        return self.ready.forward(batch)


def _look_at_gradients(ready: Ready, seen: Examination) -> None:
    seen.parameters = {name: p.grad is not None for name, p in ready.optimizer.parameters.items()}
    for name, has in seen.parameters.items():
        if not has:
            line = declaration(ready.model, name)
            seen.findings.append(
                Finding(
                    check="gradients",
                    what=f"parameter {name} has no gradient: nothing that the loss is made of reads it",
                    where=f"{name} ({line} `{line.text}`)" if line else name,
                    remedy="use it, delete it, or freeze it with requires_grad_(False)",
                )
            )


def _look_at_pipeline(left: list[str], seen: Examination) -> None:
    seen.modules = {name: name not in left for name in seen.modules}
    explained = " ".join(finding.what for finding in seen.findings if finding.check == "pipeline")
    seen.findings += left_out_findings([name for name in left if f"{name} is not" not in explained])


def declaration(model: nn.Module, name: str) -> SourceLine | None:
    """The line that makes a parameter: where the innermost class on its path that says `self.<attribute> =` says so.

    Args:
        model: The sharded model.
        name: Name of the parameter in it.
    """
    root, (*path, attribute) = unwrapped(model), name.split(".")
    while True:
        try:
            owner = root.get_submodule(".".join(path))
        except AttributeError:  # a wrapper has renamed it
            return None
        line = _assignment(type(owner), attribute)
        if line is not None or not path:
            return line
        *path, attribute = path


def _assignment(kind: type, attribute: str) -> SourceLine | None:
    if kind.__module__.startswith(("torch.", "torchrec.")):
        return None
    try:
        file, (lines, first) = inspect.getsourcefile(kind), inspect.getsourcelines(kind)
    except (OSError, TypeError):
        return None
    for number, text in enumerate(lines):
        if file and re.search(rf"self\.{re.escape(attribute)}\b[^=]*=(?!=)", text):
            return SourceLine(file, first + number)
    return None
