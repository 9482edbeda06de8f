"""What a user's own factory hands the doctor: a model that is not sharded yet, and a way to make a batch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints


@dataclass(frozen=True)
class Subject:
    """A user's own model.

    Attributes:
        model: The unsharded model with TorchRec's collections, on `meta` or the CPU. Its forward takes a batch and
            returns (loss, anything), as TorchRec's pipeline wants.
        make_batch: Makes a batch, on the CPU, as TorchRec's pipeline wants it (`torchrec.streamable.Pipelineable`).
        constraints: What the planner may do with each table, by name; what none is said of is left to it.
    """

    model: nn.Module
    make_batch: Callable[[], Any]
    constraints: Mapping[str, ParameterConstraints] = field(default_factory=dict)


def load_subject(path: str) -> Subject:
    """Call a factory by its import path.

    Args:
        path: `package.module:function`, found from the present folder too; the function takes nothing and returns a
            `Subject`, or (model, make_batch) or (model, make_batch, constraints).

    Raises:
        ValueError: When there is no such function, or it returns something else.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"--factory {path}: no import path; give package.module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"--factory {path}: {error}; give package.module:function as Python would import it from here."
        ) from error
    made = factory()
    if isinstance(made, Subject):
        return made
    fits = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module) and callable(made[1])
    if not fits:
        raise ValueError(
            f"--factory {path}: returned {type(made).__name__}; return (model, make_batch), the unsharded model and a "
            "function that makes a batch."
        )
    return Subject(*made)
