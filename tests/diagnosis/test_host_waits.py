"""Which reads of a tensor's values a GPU would wait for, seen on a CPU, and the line that each is put down to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.diagnosis.finding import Finding
from mufasa_rec.diagnosis.host_waits import HostWaits
from mufasa_rec.ops import host_reads

CPU = torch.device("cpu")


@torch.library.custom_op("mufasa_rec_tests::halved_if_positive", mutates_args=())
def halved_if_positive(x: Tensor) -> Tensor:
    return x / 2 if float(x.sum()) > 0 else x.clone()  # inside an operator


def watched(work: Callable[[Tensor], object]) -> list[Finding]:
    """What is found when `work` is given a tensor that lies on the device."""
    x = torch.arange(6.0)
    waits = HostWaits(CPU)
    waits.mark(x)
    with waits.watching():
        work(x)
    return waits.findings()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x[1]),
    "if": lambda x: 1 if x.max() > 2 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to by name": lambda x: x.to(device="cpu", dtype=torch.float64),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "nonzero": lambda x: x.nonzero(),
    "where of one argument": lambda x: torch.where(x > 2),
    "masked_select": lambda x: x.masked_select(x > 2),
    "mask as index": lambda x: x[x > 2],
    "write to a mask": lambda x: x.__setitem__(x > 2, torch.arange(3.0)),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "inside an operator": lambda x: halved_if_positive(x),
    "of what was made on its device": lambda x: torch.ones(2, device=x.device).sum().item(),
    "of what was moved to its device": lambda x: torch.ones(2).to(x.device).sum().item(),
}
NONE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2).softmax(0)[1:].cumsum(0),
    "where": lambda x: torch.where(x > 2, x, 0.0),
    "one number into a mask": lambda x: x.__setitem__(x > 2, 0.0),
    "masked_fill": lambda x: x.masked_fill_(x > 2, 0.0),
    "index": lambda x: x[x.argsort()],
    "nonzero_static": lambda x: torch.nonzero_static(x > 2, size=3),
    "repeat_interleave of known size": lambda x: torch.repeat_interleave(x, x.long(), output_size=15),
    "shape": lambda x: len(x) + x.shape[0],
    "host tensors": lambda x: int(torch.arange(4)[2]),
    "move within the device": lambda x: x.to(x.device).mul_(2),
}


@pytest.mark.parametrize("name", WAITS)
def test_read_is_found_once_with_its_line(name: str) -> None:
    (found,) = watched(WAITS[name])
    assert found.is_fault
    assert found.where.startswith("tests/diagnosis/test_host_waits.py:")
    marker = "# inside an operator" if name == "inside an operator" else f'"{name}": lambda x'
    assert marker in found.where


@pytest.mark.parametrize("name", NONE)
def test_what_stays_on_the_device_is_no_wait(name: str) -> None:
    assert watched(NONE[name]) == []


def test_copy_on_the_host_is_read_freely_and_is_another_tensor() -> None:
    def work(x: Tensor) -> None:
        copy = x.cpu()
        assert int(copy[2]) == 2
        copy.zero_()
        assert host_reads.free(copy)
        assert not host_reads.free(x)

    (found,) = watched(work)
    assert ".cpu()" in found.what


def test_moving_within_the_device_gives_the_tensor_itself() -> None:
    def work(x: Tensor) -> None:
        assert x.to(x.device) is x
        assert x.device.type == "cpu"

    assert watched(work) == []


def test_several_reads_of_one_line_are_counted() -> None:
    (found,) = watched(lambda x: [float(value) for value in x])
    assert "6 times a step" in found.what


def test_argued_wait_is_listed_with_its_reason_and_is_no_fault() -> None:
    def work(x: Tensor) -> None:
        with host_reads.argued("once a batch"):
            x.tolist()

    (found,) = watched(work)
    assert (found.is_fault, found.remedy) == (False, "none: once a batch")


def test_backward_is_watched_too() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * float(grad.sum())  # in the backward

    x = torch.ones(3, requires_grad=True)
    waits = HostWaits(CPU)
    waits.mark(x)
    with waits.watching():
        Reading.apply(x).sum().backward()
    (found,) = waits.findings()
    assert "# in the backward" in found.where


def test_nothing_is_collected_while_only_marks_are_followed() -> None:
    x, waits = torch.ones(3), HostWaits(CPU)
    waits.mark(x)
    with waits.following():
        y = x * 2
        y.tolist()
    assert waits.findings() == []
    with waits.watching():
        y.tolist()
    assert len(waits.findings()) == 1


def test_tensors_of_batches_of_any_form_are_marked() -> None:
    @dataclass
    class Batch:
        features: KeyedJaggedTensor
        parts: dict[str, list[Tensor]]
        name: str = "batch"

    kjt = KeyedJaggedTensor(keys=["a"], values=torch.arange(3), lengths=torch.tensor([1, 2]))
    batch, waits = Batch(kjt, {"x": [torch.ones(2)]}), HostWaits(CPU)
    endless = SimpleNamespace(batch=batch)
    endless.itself = endless
    waits.mark(endless)
    assert all(map(waits.is_on_device, (kjt.values(), kjt.lengths(), batch.parts["x"][0])))
    assert not waits.is_on_device(torch.ones(2))
