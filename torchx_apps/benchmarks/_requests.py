"""Generated batches for a ranker: requests with several candidates each, and the same impressions one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mufasa_rec.models.ranker import Ranker
from mufasa_rec.models.ranker_build import build_arch
from mufasa_rec.models.ranker_config import RankerConfig, RankingFeatures
from mufasa_rec.modules.sparse_arch import ContentTableConfig, SparseArch, TableConfig
from mufasa_rec.ops.jagged import lengths_of, sequence_ids

_ROWS = {"user": 50, "item.kind": 7, "item.tags": 9, "event.device": 4, "context.hour": 24}


@dataclass
class Requests:
    """A batch as `mufasa_rec.models.ranker.RankingInputs` wants it; `ids` are the lists of `features`."""

    ids: dict[str, Tensor]
    event_item: Tensor
    offsets: Tensor
    start_position: Tensor
    timestamps_ms: Tensor | None
    actions: Tensor | None
    candidate_item: Tensor
    candidate_offsets: Tensor
    request_time_ms: Tensor | None
    content: dict[str, Tensor]
    present: dict[str, Tensor]
    category_lengths: dict[str, Tensor]
    dense: Tensor
    labels: Tensor
    weight: Tensor
    logit_offset: Tensor
    features: KeyedJaggedTensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor([len(ids) for ids in self.ids.values()], dtype=torch.int32)
        values = torch.cat(list(self.ids.values()))
        self.features = KeyedJaggedTensor(keys=list(self.ids), values=values, lengths=lengths, stride=1)


def ranking_features(modalities: Mapping[str, int], *, max_history: int) -> RankingFeatures:
    """What the generated batches have."""
    return RankingFeatures(
        item={"kind": False, "tags": True},
        event=("device",),
        request=("user",),
        context=("hour",),
        modalities=modalities,
        num_dense=3,
        tasks=("click", "like"),
        num_actions=3,
        has_time=True,
        max_history=max_history,
    )


def ranker_of(config: RankerConfig, features: RankingFeatures, num_items: int) -> Ranker:
    """An unsharded ranker for generated batches, with random content."""
    contents = [
        ContentTableConfig(modality=name, num_embeddings=num_items, width=width)
        for name, width in features.modalities.items()
    ]
    tables = [TableConfig(name="item", num_embeddings=num_items)]
    tables += [TableConfig(name=name, num_embeddings=rows, dim=config.dims.get(name)) for name, rows in _ROWS.items()]
    sparse = SparseArch(tables, config.width, contents, torch.device("cpu"))
    with torch.no_grad():
        for parameter in sparse.content.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return Ranker(sparse, build_arch(config, features))


def make_requests(
    lengths: Sequence[int], candidates: Sequence[int], features: RankingFeatures, *, num_items: int, seed: int = 0
) -> Requests:
    """Random requests.

    Args:
        lengths: Events of each request's history.
        candidates: Candidates of each request.
        features: What the batch has, from `ranking_features`.
        num_items: Items of the batch.
        seed: Seed of everything.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(name: str, count: int) -> Tensor:
        return torch.randint(0, _ROWS[name], (count,), generator=draw)

    events, asked, rows = sum(lengths), sum(candidates), len(lengths)
    tags = torch.randint(0, 3, (num_items,), generator=draw)
    items = torch.arange(num_items)
    day = 86_400_000
    looked_up = {
        "item": items,
        "item.kind": ids("item.kind", num_items),
        "item.tags": ids("item.tags", int(tags.sum())),
        **{f"content.{name}": items for name in features.modalities},
        "event.device": ids("event.device", events),
        "user": ids("user", rows),
        "context.hour": ids("context.hour", asked),
    }
    owner = sequence_ids(_offsets(candidates), asked)
    return Requests(
        ids=looked_up,
        event_item=torch.randint(0, num_items, (events,), generator=draw),
        offsets=_offsets(lengths),
        start_position=torch.randint(0, 9, (rows,), generator=draw),
        timestamps_ms=torch.randint(0, 9 * day, (events,), generator=draw).sort().values,
        actions=torch.randint(0, features.num_actions, (events,), generator=draw),
        candidate_item=torch.randint(0, num_items, (asked,), generator=draw),
        candidate_offsets=_offsets(candidates),
        request_time_ms=torch.randint(10 * day, 11 * day, (rows,), generator=draw)[owner],
        content={},
        present={name: torch.rand(num_items, generator=draw) < 0.8 for name in features.modalities},
        category_lengths={"tags": tags},
        dense=torch.randn(asked, features.num_dense, generator=draw),
        labels=torch.randint(0, 2, (asked, len(features.tasks)), generator=draw).float(),
        weight=0.5 + torch.rand(asked, generator=draw),
        logit_offset=torch.rand(asked, generator=draw),
    )


def one_by_one(batch: Requests) -> Requests:
    """The same impressions, each a request of its own with a copy of the history."""
    owner = sequence_ids(batch.candidate_offsets, len(batch.candidate_item))
    return _taken(batch, owner, torch.arange(len(owner)), torch.arange(len(owner) + 1))


def part_of(batch: Requests, first: int, last: int) -> Requests:
    """The requests `first` to `last`, the latter excluded."""
    borders = batch.candidate_offsets[first : last + 1]
    candidates = torch.arange(int(borders[0]), int(borders[-1]))
    return _taken(batch, torch.arange(first, last), candidates, borders - borders[0])


def _taken(batch: Requests, requests: Tensor, candidates: Tensor, candidate_offsets: Tensor) -> Requests:
    """Requests `[r]`, perhaps several times, with candidates `[c]`."""
    lengths = lengths_of(batch.offsets)[requests]
    offsets = _offsets(lengths.tolist())
    before = batch.offsets[requests] - offsets[:-1]
    events = torch.repeat_interleave(before, lengths) + torch.arange(int(lengths.sum()))
    assert batch.timestamps_ms is not None
    assert batch.actions is not None
    assert batch.request_time_ms is not None
    levels = {"event.device": events, "user": requests, "context.hour": candidates}
    return replace(
        batch,
        ids={name: ids[levels[name]] if name in levels else ids for name, ids in batch.ids.items()},
        event_item=batch.event_item[events],
        offsets=offsets,
        start_position=batch.start_position[requests],
        timestamps_ms=batch.timestamps_ms[events],
        actions=batch.actions[events],
        candidate_item=batch.candidate_item[candidates],
        candidate_offsets=candidate_offsets,
        request_time_ms=batch.request_time_ms[candidates],
        dense=batch.dense[candidates],
        labels=batch.labels[candidates],
        weight=batch.weight[candidates],
        logit_offset=batch.logit_offset[candidates],
    )


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))
