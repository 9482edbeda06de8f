"""Which sharded modules TorchRec's pipeline can look up ahead, and which line of the user's forward keeps it from it.

The pipeline traces everything above a sharded module. What reaches the module must be an argument of the model's
forward, or an attribute or entry of one: a KeyedJaggedTensor that is built or changed on the way makes TorchRec warn
once and look the module up without the pipeline. Here the same is traced with the line of every call.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

from torch import fx, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedModule

from mufasa_rec.diagnosis.finding import Finding
from mufasa_rec.diagnosis.source import SourceLine, failing_line, running_line

_REMEDY = (
    "build the finished KeyedJaggedTensor where batches are made (collate) and hand it to the sharded module as it is"
)
_PASSED_ON = (getattr, operator.getitem)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside TorchRec's and DDP's wrappers."""
    return model.module if isinstance(model, DistributedModelParallel) else model


def sharded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The sharded modules of a sharded model by name, without those inside others."""
    root = unwrapped(model)
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if isinstance(module, ShardedModule) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def trace_findings(model: nn.Module) -> tuple[list[Finding], bool]:
    """Trace a sharded model as its pipeline will.

    Args:
        model: The sharded model.

    Returns:
        What keeps its modules from the pipeline, and whether the pipeline can trace it at all.
    """
    modules = sharded_modules(model)
    tracer = _LineTracer(modules)
    try:
        graph = tracer.trace(unwrapped(model))
    except Exception as error:
        return [_untraceable(error)], False
    findings = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in modules:
            for argument in (*node.args, *node.kwargs.values()):
                change = _change(argument)
                if argument is not None and change is not None:
                    findings.append(_changed(str(node.target), tracer.lines.get(change)))
    return findings, True


def left_out_findings(names: list[str]) -> list[Finding]:
    """Findings for modules that the pipeline left out and that no line was found for."""
    return [
        Finding(
            check="pipeline",
            what=f"{name} is not pipelined: its ids are exchanged while the step waits",
            where=name,
            remedy=_REMEDY,
        )
        for name in names
    ]


def _untraceable(error: Exception) -> Finding:
    line = failing_line(error)
    return Finding(
        check="pipeline",
        what=f"the forward above the sharded modules cannot be traced, so nothing is pipelined: {_first(error)}",
        where=str(line) if line else type(error).__name__,
        remedy="move what depends on values into a child module without sharded descendants, which is not traced",
    )


def _changed(name: str, line: SourceLine | None) -> Finding:
    text = f" by `{line.text}`" if line and line.text else ""
    return Finding(
        check="pipeline",
        what=f"{name} is not pipelined: its input is built or changed in forward{text}",
        where=str(line) if line else name,
        remedy=_REMEDY,
    )


def _change(argument: Any) -> fx.Node | None:
    """The last call that made an argument of a sharded module, when it is more than a look into the batch."""
    while isinstance(argument, fx.Node) and argument.op != "placeholder":
        looks = argument.op == "call_function" and argument.target in _PASSED_ON
        if not looks and not (argument.op == "call_method" and argument.target == "get"):
            return argument
        argument = argument.args[0]
    return None


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _LineTracer(fx.Tracer):
    """Traces what lies above sharded modules, with the user's line of every call."""

    proxy_buffer_attributes = False

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.lines: dict[fx.Node, SourceLine] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that are sharded, and modules without a sharded one inside."""
        if module_qualified_name in self.modules:
            return True
        above = any(name.startswith(f"{module_qualified_name}.") for name in self.modules)
        return not above and not getattr(m, "_is_pytorch_fx_traceable", False)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Remember the line that makes a node."""
        node = super().create_node(*args, **kwargs)
        line = running_line(sys._getframe())
        if line is not None:
            self.lines[node] = line
        return node
