"""Where blocks begin: causal borders of fixed length, at long pauses, or where the content turns.

Whether a border lies before an event depends on that event, the earlier ones and the config alone. (Cutting at the
*largest* gaps of a whole history, as is sometimes done, tells a query about its future.)
"""

from __future__ import annotations

from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.ops import host_reads
from mufasa_rec.ops.jagged import positions, sequence_ids


def fixed_borders(offsets: Tensor, start_position: Tensor, num_events: int, block: int) -> Tensor:
    """Begin a block at every multiple of its length, counted from the user's first event ever.

    Args:
        offsets: Offsets of the sequences, `[B + 1]` int64.
        start_position: Position of each sequence's first event in its user's stream, `[B]` int64. A sequence that
            begins inside a block has a short first block.
        num_events: Number of events `L`.
        block: Events of a block.

    Returns:
        Whether a block begins at each event, `[L]` bool.

    Example:
        >>> fixed_borders(torch.tensor([0, 5]), torch.tensor([3]), 5, block=4).tolist()
        [True, True, False, False, False]
    """
    place = positions(offsets, num_events)
    start = start_position.index_select(0, sequence_ids(offsets, num_events))
    return (place == 0) | ((place + start) % block == 0)


def timegap_borders(offsets: Tensor, timestamps_ms: Tensor, *, gap_ms: int, shortest: int, longest: int) -> Tensor:
    """Begin a block after a pause (as SparseCTR, arXiv 2601.17836, but causally).

    Args:
        offsets: Offsets of the sequences, `[B + 1]` int64.
        timestamps_ms: Times of the events, `[L]` int64.
        gap_ms: A longer pause than this, such as a quantile of the training events' pauses, is a border.
        shortest: Fewest events of a block: earlier borders are ignored.
        longest: Most events of a block: a border comes by itself after them.

    Returns:
        Whether a block begins at each event, `[L]` bool, on the CPU.

    Example:
        >>> times = torch.tensor([0, 1, 90, 91, 92])
        >>> timegap_borders(torch.tensor([0, 5]), times, gap_ms=50, shortest=1, longest=8).tolist()
        [True, False, True, False, False]
    """
    pause = timestamps_ms.diff(prepend=timestamps_ms[:1])
    return _bounded(offsets, pause > gap_ms, shortest, longest)


def coherence_borders(offsets: Tensor, vectors: Tensor, *, cosine: float, shortest: int, longest: int) -> Tensor:
    """Begin a block where an event's content is unlike that of the event before.

    Args:
        offsets: Offsets of the sequences, `[B + 1]` int64.
        vectors: Content vectors of the events, `[L, P]`; they need no normalisation.
        cosine: A smaller cosine between consecutive events than this is a border.
        shortest: Fewest events of a block.
        longest: Most events of a block.

    Returns:
        Whether a block begins at each event, `[L]` bool, on the CPU.
    """
    alike = F.cosine_similarity(vectors[1:].float(), vectors[:-1].float(), dim=-1)
    return _bounded(offsets, F.pad(alike, (1, 0), value=1.0)[: len(vectors)] < cosine, shortest, longest)


def _bounded(offsets: Tensor, wished: Tensor, shortest: int, longest: int) -> Tensor:
    """Keep the wished borders that leave no block shorter than `shortest`, and add those that `longest` forces."""
    borders = torch.zeros(len(wished), dtype=torch.bool)
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest={shortest}, longest={longest}: choose 1 <= shortest <= longest.")
    with host_reads.argued("where a block ends depends on where the one before did, event by event; once a batch"):
        wishes = torch.nonzero(wished.cpu()).squeeze(1).tolist()
        ends = offsets.tolist()
    begins = []
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        while begin < end:
            begins.append(begin)
            following = bisect_left(wishes, begin + shortest)
            wish = wishes[following] if following < len(wishes) else end
            begin = min(begin + longest, wish)
    borders[torch.tensor(begins, dtype=torch.int64)] = True
    return borders
