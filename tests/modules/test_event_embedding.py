"""The event embedding: what each of its parts may and may not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.history import History
from mufasa_rec.modules.modalities import ModalityProjections
from tests.histories import CONTENT, WIDTH, make_candidates, make_embedding, make_history
from tests.tensors import gradients, leaf, offsets_of


def buckets(times: list[int], lengths: list[int], num_buckets: int = 6) -> Tensor:
    """Time-gap bucket that each event is given, read off a table of marked rows."""
    embedding = EventEmbedding(EventEmbeddingConfig(width=16, num_gap_buckets=num_buckets))
    assert embedding.gap is not None
    with torch.no_grad():
        embedding.gap.weight.copy_(torch.eye(num_buckets, 16) * 100)
    rows = len(times)
    history = History(
        embedded=torch.zeros(rows, 16),
        offsets=offsets_of(lengths),
        start_position=torch.zeros(len(lengths), dtype=torch.int64),
        timestamps_ms=torch.tensor(times),
    )
    return embedding(history).argmax(1)


def test_gap_buckets_are_powers_of_two_of_seconds() -> None:
    gaps = [999, 1_000, 2_999, 3_000, 6_999, 7_000]
    times = [0, *torch.tensor(gaps).cumsum(0).tolist()]
    assert buckets(times, [7]).tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_longest_gap_and_a_clock_that_went_back_stay_in_the_table() -> None:
    assert buckets([10**12, 10**12 + 10**11, 0], [3]).tolist() == [0, 5, 0]


def test_first_event_of_each_user_has_no_gap() -> None:
    assert buckets([0, 7_000, 900_000, 907_000, 1], [2, 0, 2, 1]).tolist() == [0, 3, 0, 3, 0]


def test_candidate_gap_is_from_the_newest_event_to_the_request() -> None:
    embedding, history, candidates = make_embedding().eval(), make_history([2, 0, 3]), make_candidates([1, 1, 1])
    assert history.timestamps_ms is not None
    shifted = replace(history, timestamps_ms=history.timestamps_ms - torch.tensor([99, 0, 99, 99, 0]) * 1000)
    assert torch.equal(embedding.embed_candidates(history, candidates), embedding.embed_candidates(shifted, candidates))
    later = replace(candidates, request_time_ms=torch.full((3,), 10**11))
    same = (embedding.embed_candidates(history, candidates) == embedding.embed_candidates(history, later)).all(1)
    assert same.tolist() == [False, True, False]  # a user without history has no gap


def test_candidate_reads_the_unknown_action() -> None:
    embedding, history, candidates = make_embedding(), make_history([2, 1]), make_candidates([1, 2])
    embedding.embed_candidates(history, candidates).sum().backward()
    assert embedding.action is not None
    touched = gradients([embedding.action.weight])[0].abs().sum(1) > 0
    assert not touched[1:].any()


def test_unknown_action_is_code_zero_of_the_table() -> None:
    embedding, history = make_embedding(), make_history([3])
    unknown = replace(history, actions=torch.zeros(3, dtype=torch.int64))
    assert embedding.action is not None
    with torch.no_grad():
        before = embedding(unknown)
        embedding.action.weight[1:] = float("nan")
        assert torch.equal(embedding(unknown), before)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_content_of_a_missing_modality_has_no_influence_whatever_it_is(garbage: float) -> None:
    torch.manual_seed(0)
    embedding, history = make_embedding(), make_history([4, 0, 3])
    results = []
    for fill in (0.0, garbage):
        content = {
            name: torch.where(history.present[name][:, None], vectors, torch.tensor(fill))
            for name, vectors in history.content.items()
        }
        embedding.zero_grad()
        out = embedding(replace(history, content=content))
        out.square().sum().backward()
        results.append([out.detach(), *(g.clone() for g in gradients(embedding.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_event_without_any_modality_keeps_its_other_parts() -> None:
    embedding, history = make_embedding(), make_history([3])
    nothing = replace(history, present={name: torch.zeros(3, dtype=torch.bool) for name in CONTENT})
    with torch.no_grad():
        before = embedding(nothing)
        assert embedding.content is not None
        for parameter in embedding.content.parameters():
            parameter.fill_(7.0)
        assert torch.equal(embedding(nothing), before)


def test_half_precision_inputs_are_taken_as_they_are() -> None:
    history = make_history([3])
    half = replace(
        history, embedded=history.embedded.half(), content={name: x.half() for name, x in history.content.items()}
    )
    assert torch.allclose(make_embedding_output(half), make_embedding_output(history), atol=1e-2)


def make_embedding_output(history: History) -> Tensor:
    torch.manual_seed(1)
    return make_embedding()(history)


def test_every_parameter_has_a_gradient_without_events() -> None:
    embedding = make_embedding()
    embedding(make_history([0, 0])).sum().backward()
    assert all((g == 0).all() for g in gradients(embedding.parameters()))


def test_modalities_may_have_any_name() -> None:
    names = {"text.v2": 3, "text_v2": 2, "type": 2, "widths": 2, "keys": 2}
    projections = ModalityProjections(names, 4)
    content = {name: torch.randn(5, width) for name, width in names.items()}
    present = {name: torch.ones(5, dtype=torch.bool) for name in names}
    learned = {name: leaf(vectors) for name, vectors in content.items()}
    total, count = projections(learned, present)
    total.sum().backward()
    assert count.tolist() == [5] * 5
    assert all((g != 0).any() for g in gradients(learned.values()))
    assert len(list(projections.parameters())) == 2 * len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedded": torch.zeros(3, 9)}, "History.embedded: width 9, but the extractor was built for 8"),
        ({"actions": None}, "History.actions=None"),
        ({"actions": torch.tensor([0, 4, 1])}, "codes from 0 to 4, but the extractor was built with num_actions=4"),
        ({"actions": torch.tensor([0, -1, 1])}, "codes from -1 to 1"),
        ({"timestamps_ms": None}, "History.timestamps_ms=None"),
        ({"content": {"title": torch.zeros(3, 6)}}, r"content\['image'\]: missing; the model was built with"),
        ({"content": {"title": torch.zeros(3, 6), "image": torch.zeros(3, 4)}}, r"content\['image'\]: width 4"),
    ],
)
def test_history_that_the_embedding_was_not_built_for_is_refused(change: dict[str, Any], message: str) -> None:
    embedding, history = make_embedding(), replace(make_history([1, 2]), **change)
    with pytest.raises(ValueError, match=message):
        embedding(history)


def test_candidates_without_a_request_time_or_of_other_users_are_refused() -> None:
    embedding, history = make_embedding(), make_history([1, 2])
    with pytest.raises(ValueError, match=r"Candidates\.request_time_ms=None"):
        embedding.embed_candidates(history, replace(make_candidates([1, 2]), request_time_ms=None))
    with pytest.raises(ValueError, match=r"Candidates\.offsets: 3 users, but History has 2"):
        embedding.embed_candidates(history, make_candidates([1, 2, 3]))


@pytest.mark.parametrize("values", [{"width": 0}, {"num_actions": -1}, {"num_gap_buckets": -1}, {"dropout": 1.0}])
def test_bad_config_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        replace(EventEmbeddingConfig(width=WIDTH), **values)
