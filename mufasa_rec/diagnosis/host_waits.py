"""Where a step waits for the device: reads of a device tensor's values on the host, each with the line that asks.

Every such read stops the host until the device has done all that was queued, and the device then idles until the host
has queued more. On a GPU PyTorch itself says when that happens (`torch.cuda.set_sync_debug_mode`). On a CPU it can be
seen too: the batch and the weights are marked as lying on the device, what is computed of them is marked in turn, and
a read of a marked tensor is one that a GPU would wait for. What is copied to the host explicitly (`.cpu()`,
`.tolist()`, `.to("cpu")`) is one wait, and its copy is no longer marked. The `device` of a marked tensor is `cpu:0`,
PyTorch's other name of the CPU, so that what is made on it or moved to it is known to be on the device.

Not seen on a CPU: `.to(torch.device("cpu"))`, and reads inside operators that are no Python. What PyTorch's and
TorchRec's own training code waits for (the exchange of lengths, the optimizer) is not listed: no line of the user's
changes it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from mufasa_rec.diagnosis.finding import Finding
from mufasa_rec.diagnosis.source import SourceLine, is_library, running_line
from mufasa_rec.ops import host_reads

# Operators whose result has a size, or is a number, that only the device knows.
_READS = {
    "_local_scalar_dense": "a value is read (.item(), int(), float(), bool() or an `if` on a tensor)",
    "item": "a value is read (.item(), int(), float(), bool() or an `if` on a tensor)",
    "is_nonzero": "a value is read (.item(), int(), float(), bool() or an `if` on a tensor)",
    "nonzero": "nonzero: the number of results is read",
    "nonzero_numpy": "nonzero: the number of results is read",
    "argwhere": "argwhere: the number of results is read",
    "masked_select": "masked_select: the number of results is read",
    "_unique2": "unique: the number of results is read",
    "unique_dim": "unique: the number of results is read",
    "unique_consecutive": "unique_consecutive: the number of results is read",
    "unique_dim_consecutive": "unique_consecutive: the number of results is read",
    "bincount": "bincount: the largest value is read",
    "equal": "torch.equal: the answer is read",
}
_COPIES = {
    Tensor.cpu: ".cpu(): copied to the host",
    Tensor.tolist: ".tolist(): copied to the host",
    Tensor.numpy: ".numpy(): copied to the host",
    Tensor.__array__: "made a numpy array: copied to the host",
}
_DEVICE = torch.device("cpu", 0)  # what a marked tensor says; tensors themselves are always on `cpu`
_DEPTH = 6  # containers within containers of a batch
_HOST = torch.device("cpu")
_REMEDY = (
    "compute it in collate, keep it on the device (torch.where, nonzero_static, repeat_interleave with output_size), "
    "or mark it as meant with mufasa_rec.ops.host_reads.argued"
)


class HostWaits:
    """Collects what one step reads of the device's values.

    Args:
        device: Device of the step.

    Example:
        >>> waits = HostWaits(torch.device("cpu"))
        >>> x = torch.ones(3)
        >>> waits.mark(x)
        >>> with waits.watching():
        ...     _ = float((2 * x).sum())
        >>> len(waits.findings())
        1
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[tuple[SourceLine, str, str], int] = {}
        self._marked: dict[int, StorageWeakRef] = {}
        self._idle = self._collects = False

    def mark(self, *values: Any) -> None:
        """Count the tensors in batches and modules as lying on the device."""
        if self.device.type == "cpu":
            for value in values:
                for tensor in _tensors(value):
                    self._mark(tensor)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Mark what is computed of marked tensors, and collect nothing."""
        with ExitStack() as stack:
            if self.device.type == "cpu":
                stack.enter_context(_Operators(self))
                stack.enter_context(_Functions(self))
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect what happens inside, running on a CPU what would run on an accelerator."""
        self._collects = True
        try:
            with ExitStack() as stack:
                stack.enter_context(host_reads.as_on_accelerator(self.is_on_device))
                stack.enter_context(self._told_by_cuda() if self.device.type == "cuda" else self.following())
                yield
        finally:
            self._collects = False

    def findings(self) -> list[Finding]:
        """A finding for each line that waits; what is marked as meant is none to correct."""
        return [
            Finding(
                check="host waits",
                what=f"{what}: the host waits for the device" + (f", {count} times a step" if count > 1 else ""),
                where=f"{line} `{line.text}`",
                remedy=f"none: {reason}" if reason else _REMEDY,
                is_fault=not reason,
            )
            for (line, what, reason), count in self.found.items()
        ]

    def is_on_device(self, tensor: Tensor) -> bool:
        """Whether a tensor would lie on an accelerator."""
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._marked

    def note(self, what: str) -> None:
        """Remember a wait with the line of the user's that asked for it, if one did."""
        if self._idle or not self._collects:
            return
        line = running_line(sys._getframe(1), by_itself=True)
        if line is not None:
            key = (line, what, host_reads.argument())
            self.found[key] = self.found.get(key, 0) + 1

    def _mark(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            # The weak reference keeps the key from being given to another storage.
            self._marked.setdefault(storage._cdata, StorageWeakRef(storage))

    def copied(self, made: Any) -> Any:
        """What a copy to the host gives: on a CPU the tensor itself came back, and its copy must be another one."""
        if not isinstance(made, Tensor):
            return made
        self._idle = True
        try:
            return made.clone()
        finally:
            self._idle = False

    def after(self, operator: Any, arguments: tuple[Any, ...], result: Any) -> None:
        """Mark what an operator made of marked tensors."""
        if self._idle:
            return
        given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if not any(self.is_on_device(tensor) for tensor in given):
            return
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if operator.namespace == "c10d":  # exchanges write into tensors that they are given
            made += given
        for tensor in made:
            self._mark(tensor)

    @contextmanager
    def _told_by_cuda(self) -> Iterator[None]:
        """Have PyTorch warn at each wait, and take the line from the stack at that moment."""
        before = torch.cuda.get_sync_debug_mode()

        def told(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if "synchroniz" in str(message):
                self.note("the device is waited for")
            else:
                shown(message, category, *place, **more)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            shown, warnings.showwarning = warnings.showwarning, told
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)


class _Operators(TorchDispatchMode):
    """Sees every operator below autograd, that of the backward included."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note a read, run the operator, and mark what it made."""
        named = kwargs or {}
        what = self._read(func, args, named)
        if what:
            self.waits.note(what)
        inside = _python_of(func)
        if inside is None:
            result = func(*args, **named)
        else:
            with ExitStack() as stack:
                stack.enter_context(self)
                if not any(isinstance(mode, _Functions) for mode in _get_current_function_mode_stack()):
                    stack.enter_context(_Functions(self.waits))
                result = inside(*args, **named)
        self.waits.after(func, (args, named), result)
        return result

    def _read(self, func: Any, args: tuple, named: dict[str, Any]) -> str:
        """What a call would have to know on the host; empty for none."""
        name = func.overloadpacket.__name__
        on_device = self.waits.is_on_device
        if name in _READS:
            return _READS[name] if isinstance(args[0], Tensor) and on_device(args[0]) else ""
        if name == "repeat_interleave" and named.get("output_size") is None:
            repeats = args[0] if func._overloadname == "Tensor" else args[1]
            counted = isinstance(repeats, Tensor) and on_device(repeats)
            return "repeat_interleave without output_size: a sum is read" if counted else ""
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
            # A single number is written into a mask without counting it.
            if any(on_device(x) for x in masks) and not (name != "index" and args[2].numel() == 1):
                return "a boolean mask as index: the number of its places is read"
        return ""


def _python_of(operator: Any) -> Callable[..., Any] | None:
    """The Python behind an operator of `torch.library.custom_op`, whose inside would not be seen else."""
    defined = OPDEFS.get(operator._schema.name)
    return None if defined is None or defined._backend_fns.keys() - {None} else defined._init_fn


class _Functions(TorchFunctionMode):
    """Sees copies to the host, which on a CPU are no operators."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note a copy of a marked tensor to the host; mark what is made on the device or moved there."""
        named = kwargs or {}
        of_marked = bool(args) and isinstance(args[0], Tensor) and self.waits.is_on_device(args[0])
        if func == Tensor.device.__get__:
            asks = sys._getframe(1).f_code.co_filename
            return _DEVICE if of_marked and not is_library(asks) else func(*args)
        if of_marked and (what := _COPIES.get(func) or _to_host(func, args, named)):
            self.waits.note(what)
            return self.waits.copied(func(*args, **named))
        if not any(isinstance(x, torch.device) and x == _DEVICE for x in (*args, *named.values())):
            return func(*args, **named)
        if of_marked and func is Tensor.to:  # it is there: no copy
            args = tuple(_HOST if isinstance(x, torch.device) else x for x in args)
            named = {name: _HOST if isinstance(x, torch.device) else x for name, x in named.items()}
        made = func(*args, **named)
        self.waits.mark(made)
        return made


def _to_host(func: Any, args: tuple, named: dict[str, Any]) -> str:
    """Whether a tensor is moved to the CPU by name; a `torch.device` may as well be that of the model."""
    if func is not Tensor.to or "cpu" not in [x for x in (*args[1:], named.get("device")) if isinstance(x, str)]:
        return ""
    return '.to("cpu"): copied to the host'


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors of a batch: in dataclasses, containers, jagged tensors and plain objects; of a module, all it has."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, (KeyedJaggedTensor, JaggedTensor)):
        parts = (value.values(), value.lengths_or_none(), value.offsets_or_none(), value.weights_or_none())
        yield from (part for part in parts if part is not None)
    elif depth < _DEPTH:  # an object may refer to itself
        for part in _parts(value):
            yield from _tensors(part, depth + 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if is_dataclass(value):
        return [getattr(value, entry.name) for entry in fields(value)]
    return vars(value).values() if hasattr(value, "__dict__") else ()
