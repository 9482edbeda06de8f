"""Reading a tensor's values on the host: free on a CPU, a wait for the device anywhere else.

Code that looks at values only where that costs nothing asks `free` first. Whoever wants to know on a CPU how a step
would run on an accelerator (the doctor does) has `free` answer as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_elsewhere: ContextVar[Callable[[Tensor], bool] | None] = ContextVar("elsewhere", default=None)
_argument: ContextVar[str] = ContextVar("argument", default="")


def free(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read without a wait.

    Example:
        >>> import torch
        >>> free(torch.zeros(1))
        True
        >>> with as_on_accelerator(lambda tensor: True):
        ...     free(torch.zeros(1))
        False
    """
    if tensor.device.type != "cpu":
        return False
    lies_elsewhere = _elsewhere.get()
    return lies_elsewhere is None or not lies_elsewhere(tensor)


@contextmanager
def as_on_accelerator(lies_there: Callable[[Tensor], bool]) -> Iterator[None]:
    """Have `free` answer on a CPU as if some tensors lay on an accelerator.

    Args:
        lies_there: Which ones.
    """
    token = _elsewhere.set(lies_there)
    try:
        yield
    finally:
        _elsewhere.reset(token)


@contextmanager
def argued(reason: str) -> Iterator[None]:
    """Mark a wait for the device that is meant; the doctor lists it with its reason and does not call it a fault.

    Args:
        reason: Why it is worth its time, and how often it comes.
    """
    token = _argument.set(reason)
    try:
        yield
    finally:
        _argument.reset(token)


def argument() -> str:
    """The reason that holds where this is called; empty where a wait is not meant."""
    return _argument.get()
