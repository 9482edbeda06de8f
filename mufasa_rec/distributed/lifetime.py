"""The life of a process that torchrun started: it ends with torchrun.

torchrun puts its processes into sessions of their own. When it is killed itself, by the out-of-memory killer or by a
scheduler that has lost patience, they would go on training, and write into a run folder that the next job has taken
over; the processes of other nodes would not even notice. Linux can kill a process with its parent, at once and whatever
it is busy with; it only has to be asked.
"""

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

logger = logging.getLogger(__name__)
# Set by the components' shell line: the process id that torchrun has on its node.
LAUNCHER_VARIABLE = "LAUNCHER_PID"
_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> bool:
    """Have the kernel kill this process (SIGKILL) as soon as torchrun is gone; call it first thing in the main thread.

    Without torchrun (in a shell, a debugger, a notebook, a test) and on a system other than Linux it does nothing.
    Processes that this one starts, such as readers of data, are not covered: they see to themselves.

    Returns:
        Whether this process now ends with its parent.

    Raises:
        SystemExit: torchrun is gone already.
    """
    if _TORCHRUN_VARIABLE not in os.environ or not _ask_kernel(signal.SIGKILL):
        return False
    # The kernel reports a death from now on only; imports before this call take seconds.
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if launcher.isdecimal() and os.getppid() != int(launcher) and not _is_running(int(launcher)):
        raise SystemExit(f"torchrun, process {launcher}, is gone: this process ends too.")
    return True


def outlive_parent() -> None:
    """Take `end_with_parent` back, once this process has been told to save and end by itself within a bounded time.

    A launcher may lose patience before a program's own grace is over: `torchx run -s local_cwd` kills torchrun 10
    seconds after it asked for an end. Call it in the main thread; a Python signal handler is run there.
    """
    if _TORCHRUN_VARIABLE in os.environ:
        _ask_kernel(0)


def _ask_kernel(signal_number: int) -> bool:
    """Choose the signal that the parent's death sends to this process, 0 for none; false where that cannot be had."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0):
        logger.warning(
            "cannot be tied to torchrun's life (%s): end this process yourself if torchrun is killed",
            os.strerror(ctypes.get_errno()),
        )
        return False
    return True


def _is_running(pid: int) -> bool:
    """Whether a process does more than wait for its own parent to take note of its end."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
