"""Which line of a user's own code is at work: the innermost frame outside of PyTorch, TorchRec and the doctor."""

from __future__ import annotations

import importlib.util
import linecache
import os
import sysconfig
import traceback
from dataclasses import dataclass
from types import FrameType

from mufasa_rec.distributed import cpu_tables

_DOCTOR = os.path.dirname(__file__) + os.sep
_WATCH = _DOCTOR + "host_waits.py"  # stands between a line and what it calls, and never calls one itself
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return os.path.dirname(spec.origin) + os.sep if spec is not None and spec.origin else f"<no {package}>"


_TORCH, _TORCHREC, _FBGEMM = (_folder(name) for name in ("torch", "torchrec", "fbgemm_gpu"))
_LIBRARIES = (_TORCH, _TORCHREC, _FBGEMM)
# What these do they do by themselves, whatever line of the user's called them.
_BY_THEMSELVES = (
    os.path.join(_TORCHREC, "distributed", ""),
    os.path.join(_TORCH, "distributed", ""),
    os.path.join(_TORCH, "optim", ""),
    os.path.join(_TORCH, "nn", "parallel", ""),
    cpu_tables.__file__,  # lookups in a CPU's memory: on an accelerator none of it runs
)


@dataclass(frozen=True)
class SourceLine:
    """A line of a file.

    Attributes:
        file: The file.
        line: Its number, from 1.
    """

    file: str
    line: int

    @property
    def text(self) -> str:
        """What stands there."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        shown = os.path.relpath(self.file)
        return f"{self.file if shown.startswith(os.pardir) else shown}:{self.line}"


def running_line(frame: FrameType | None, *, by_itself: bool = False) -> SourceLine | None:
    """The innermost line of the user's code on a stack.

    Args:
        frame: The innermost frame; the doctor's own at its end are passed over.
        by_itself: Whether what the libraries for training do by themselves has no line: exchanges between ranks, the
            optimizer, the pipeline.

    Returns:
        The line; None when there is none below the doctor's call.
    """
    inside = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_DOCTOR):
            if inside and file != _WATCH:
                return None
        elif by_itself and file.startswith(_BY_THEMSELVES):
            return None
        elif not is_library(file):
            return SourceLine(file, frame.f_lineno)
        else:
            inside = True
        frame = frame.f_back
    return None


def failing_line(error: BaseException) -> SourceLine | None:
    """The innermost line of the user's code that an error came through."""
    found = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith(_DOCTOR) and not is_library(file):
            found = SourceLine(file, number)
    return found


def is_library(file: str) -> bool:
    """Whether a file is PyTorch's, TorchRec's, FBGEMM's or Python's own."""
    if file.startswith(("<", *_LIBRARIES)):
        return True
    return file.startswith(_STANDARD) and "-packages" not in file.removeprefix(_STANDARD)
