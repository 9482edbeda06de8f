"""Being asked to stop: signals, and how all ranks agree on the step at which they do.

A launcher that needs the machine sends SIGTERM (or SIGUSR1 ahead of time) to every process, but not at the same
moment, and more than once. A rank that stopped on its own would leave the others in a collective. So ranks tell each
other beside every step, and stop after the same one.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mufasa_rec.distributed.lifetime import outlive_parent

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_CODE = 75  # EX_TEMPFAIL: try again; every launcher retries it, as any code but 0


class Preempted(SystemExit):
    """The run was asked to stop and has saved, where it could; the program ends with `EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopAgreed(Exception):
    """All ranks stop here."""


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C instead of dying from them, for the length of a `with` block.

    A second Ctrl-C ends the program without a save. From the first signal on the process has `grace_s` seconds. Then
    it ends itself with `EXIT_CODE`, saved or not, before the launcher kills it: a peer may be gone, and a save that
    waits for it would never end.

    Args:
        grace_s: Seconds from the signal to the end.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.received: str | None = None
        self._before: dict[int, Any] = {}
        self._left = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there only
            # Inside a collective the main thread runs no handler. The number still arrives in the pipe at once.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._keep_deadline, args=self._pipe[:1], name="deadline", daemon=True).start()
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if isinstance(error, Preempted) else handler)
        # While the program ends the deadline stays: leaving the process group can hang too.
        if self._pipe is None or isinstance(error, Preempted):
            return
        signal.set_wakeup_fd(self._wakeup_before)
        self._left.set()
        os.close(self._pipe[1])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        if self.received is None:
            outlive_parent()  # a launcher may lose patience earlier; the deadline bounds this process's life
            self.received = signal.Signals(number).name

    def _keep_deadline(self, pipe: int) -> None:
        """In a thread of its own: wait for the first signal, then for the end of the block or of the grace."""
        number = b"\0"
        while number and number[0] not in SIGNALS:
            number = os.read(pipe, 1)
        os.close(pipe)
        if number and not self._left.wait(self.grace_s):
            self._give_up(signal.Signals(number[0]).name)

    def _give_up(self, name: str) -> None:
        text = f"{name}: not saved within {self.grace_s:g} s; the last complete checkpoint stands\n"
        os.write(2, text.encode())  # logging may wait for a lock that the main thread holds
        os._exit(EXIT_CODE)


class Agreement:
    """Lets every rank know what any rank wants, one call later and without waiting for the slowest.

    Each call sends this rank's wishes and returns what all ranks wished at the call before: the exchange runs beside
    the step in between. Every rank must call equally often.

    Args:
        group: A gloo group of its own.
        num_wishes: Wishes per call.

    Example:
        >>> agreement = Agreement(None, 2)  # one rank alone
        >>> agreement.ask(True, False), agreement.ask(False, False)
        ([False, False], [True, False])
    """

    def __init__(self, group: dist.ProcessGroup | None, num_wishes: int) -> None:
        self.group = group
        self._wishes = torch.zeros(num_wishes, dtype=torch.int32)
        self._work: Any = None

    def ask(self, *wishes: bool) -> list[bool]:
        """Send wishes; returns what anybody wished at the call before."""
        if self._work is not None:
            self._work.wait()
        answer = self._wishes.bool().tolist()
        self._wishes = torch.tensor(wishes, dtype=torch.int32)
        if self.group is not None:
            self._work = dist.all_reduce(self._wishes, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer

    def close(self) -> None:
        """Wait for the last exchange."""
        if self._work is not None:
            self._work.wait()
            self._work = None
