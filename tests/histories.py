"""Random histories and candidates with everything that an extractor may read, and their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.history import Candidates, History
from tests.tensors import offsets_of

WIDTH, CONTENT, NUM_ACTIONS = 8, {"title": 6, "image": 3}, 4


def make_embedding() -> EventEmbedding:
    return EventEmbedding(
        EventEmbeddingConfig(width=WIDTH, content=CONTENT, num_actions=NUM_ACTIONS, num_gap_buckets=30)
    )


def _content(rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    content = {name: torch.randn(rows, width) for name, width in CONTENT.items()}
    return content, {name: torch.rand(rows) < 0.7 for name in CONTENT}


def make_history(lengths: Sequence[int]) -> History:
    rows = sum(lengths)
    content, present = _content(rows)
    return History(
        embedded=torch.randn(rows, WIDTH),
        offsets=offsets_of(lengths),
        start_position=torch.randint(0, 50, (len(lengths),)),
        timestamps_ms=torch.randint(0, 10_000_000, (rows,)).sort().values,
        actions=torch.randint(0, NUM_ACTIONS, (rows,)),
        content=content,
        present=present,
    )


def make_candidates(per_user: Sequence[int]) -> Candidates:
    rows = sum(per_user)
    content, present = _content(rows)
    return Candidates(
        embedded=torch.randn(rows, WIDTH),
        offsets=offsets_of(per_user),
        request_time_ms=torch.randint(10_000_000, 20_000_000, (rows,)),
        content=content,
        present=present,
    )


def take_users(history: History, users: Sequence[int]) -> History:
    """The history of some of the users, in the order given."""
    ranges = [range(int(history.offsets[u]), int(history.offsets[u + 1])) for u in users]
    rows = torch.tensor([i for one in ranges for i in one], dtype=torch.int64)
    assert history.timestamps_ms is not None
    assert history.actions is not None
    return replace(
        history,
        embedded=history.embedded[rows],
        offsets=offsets_of([len(one) for one in ranges]),
        start_position=history.start_position[list(users)],
        timestamps_ms=history.timestamps_ms[rows],
        actions=history.actions[rows],
        content={name: x[rows] for name, x in history.content.items()},
        present={name: x[rows] for name, x in history.present.items()},
    )


def take_candidates(candidates: Candidates, rows: Sequence[int], per_user: Sequence[int]) -> Candidates:
    """Some of the candidates, in the order given, dealt to the users."""
    index = torch.tensor(rows, dtype=torch.int64)
    assert candidates.request_time_ms is not None
    return replace(
        candidates,
        embedded=candidates.embedded[index],
        offsets=offsets_of(per_user),
        request_time_ms=candidates.request_time_ms[index],
        content={name: x[index] for name, x in candidates.content.items()},
        present={name: x[index] for name, x in candidates.present.items()},
    )
