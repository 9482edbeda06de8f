"""The processes of one job doing different things together: results are shared, and one rank's error reaches them all.

Where only one rank works, the others wait in a collective; so an error has to be told, or they would wait until the
timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank failed; its own message is the one that matters."""


class Ranks:
    """This process and its peers; a world of one needs no process group."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """Runs ``work`` on every rank and gives everybody all results, by rank.

        Raises:
            Exception: The rank's own error, unchanged.
            PeerError: Another rank failed; says which and how.
        """
        if self.size == 1:
            return [work()]
        error: BaseException | None = None
        mine: tuple[str | None, T | None] = (None, None)
        try:
            mine = (None, work())
        except Exception as caught:
            error, mine = caught, (f"{type(caught).__name__}: {caught}", None)
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, mine)
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(everybody):
            if message is not None:
                raise PeerError(f"rank {rank} failed, so this rank stops too: {message}")
        return [result for _, result in everybody]

    def first(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0 and gives everybody its result."""
        results: list[Any] = self.together(lambda: work() if self.rank == 0 else None)
        return results[0]
