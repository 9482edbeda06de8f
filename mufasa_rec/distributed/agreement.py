"""Steps that succeed on all ranks or are an error on all of them, so that no rank waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mufasa_rec.distributed.collectives import RankExchange

Result = TypeVar("Result")


def on_all_ranks(exchange: RankExchange, work: Callable[[], Result]) -> Result:
    """Do something on every rank; collective.

    Args:
        exchange: Reaches the other ranks.
        work: What to do; it must not wait for other ranks.

    Returns:
        This rank's result.

    Raises:
        ValueError: When a rank refused something.
        OSError: When a rank's reading or writing failed.
    """
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = (isinstance(error, OSError), str(error), error)
    found = next((said for said in exchange.objects(problem and problem[:2]) if said), None)
    if found is not None:
        raise (OSError if found[0] else ValueError)(found[1]) from (problem and problem[2])
    return result  # type: ignore[return-value]
