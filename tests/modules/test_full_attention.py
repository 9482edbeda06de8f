"""What every interest extractor promises, held by the exact one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.full_attention import FullAttentionConfig, FullAttentionExtractor, Positions
from mufasa_rec.modules.history import Candidates, History
from tests.histories import (
    WIDTH,
    make_candidates,
    make_embedding,
    make_history,
    take_candidates,
    take_users,
)
from tests.tensors import gradients, offsets_of

LENGTHS = [3, 0, 63, 1, 17, 0]
CANDIDATES = [2, 1, 3, 0, 1, 0]
every_position = pytest.mark.parametrize("positions", ["rotary", "learned", "none"])


def make_extractor(
    positions: Positions = "rotary", max_history: int = 64, dropout: float = 0.0, num_layers: int = 2
) -> FullAttentionExtractor:
    torch.manual_seed(0)
    config = FullAttentionConfig(positions=positions, dropout=dropout, num_layers=num_layers)
    extractor = FullAttentionExtractor(config, make_embedding(), max_history)
    for layer in extractor._layers():
        if layer.bias is not None:  # zero at first, which would hide mistakes
            torch.nn.init.normal_(layer.bias)
    return extractor


def rows_of(history: History, user: int) -> slice:
    return slice(int(history.offsets[user]), int(history.offsets[user + 1]))


def first_events(history: History, length: int) -> History:
    """The oldest events of a batch of one user."""
    assert history.timestamps_ms is not None
    assert history.actions is not None
    return replace(
        history,
        embedded=history.embedded[:length],
        offsets=offsets_of([length]),
        timestamps_ms=history.timestamps_ms[:length],
        actions=history.actions[:length],
        content={name: x[:length] for name, x in history.content.items()},
        present={name: x[:length] for name, x in history.present.items()},
    )


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


@every_position
def test_shapes_are_those_of_the_contract(positions: Positions) -> None:
    extractor, history, candidates = make_extractor(positions), make_history(LENGTHS), make_candidates(CANDIDATES)
    assert extractor.encode(history).shape == (sum(LENGTHS), extractor.output_dim)
    assert extractor(history).shape == (len(LENGTHS), extractor.output_dim)
    assert extractor(history, candidates).shape == (sum(CANDIDATES), extractor.output_dim)
    assert extractor.num_places >= sum(LENGTHS)


@every_position
def test_user_vector_is_the_last_state_or_the_learned_one(positions: Positions) -> None:
    extractor, history = make_extractor(positions), make_history(LENGTHS)
    states, users = extractor.encode(history), extractor(history)
    for user, length in enumerate(LENGTHS):
        expected = states[history.offsets[user + 1] - 1] if length else extractor.empty
        assert torch.equal(users[user], expected)
    assert torch.equal(extractor(make_history([0, 0])), extractor.empty.expand(2, -1))


@every_position
def test_future_event_does_not_change_past_states(positions: Positions) -> None:
    extractor, history = make_extractor(positions), make_history([5, 20, 4])
    assert history.timestamps_ms is not None
    assert history.actions is not None
    changed = rows_of(history, 1).start + 12
    after = replace(
        history,
        embedded=history.embedded.clone().index_fill_(0, torch.arange(changed, 25), 9.0),
        timestamps_ms=history.timestamps_ms + (torch.arange(29) >= changed) * (torch.arange(29) < 25) * 10**9,
        actions=history.actions.clone().index_fill_(0, torch.arange(changed, 25), 1),
    )
    before, now = extractor.encode(history), extractor.encode(after)
    same = torch.isclose(before, now, atol=1e-6).all(1)
    assert same[:changed].all()
    assert not same[changed:25].any()
    assert same[25:].all()


@every_position
def test_appending_an_event_leaves_all_earlier_states_equal(positions: Positions) -> None:
    extractor, longer = make_extractor(positions), make_history([20])
    states = extractor.encode(longer)
    for length in (1, 7, 19):
        part = first_events(longer, length)
        assert close(extractor.encode(part), states[:length])


@every_position
def test_permuting_sequences_permutes_outputs(positions: Positions) -> None:
    extractor, history = make_extractor(positions), make_history(LENGTHS)
    order = [4, 2, 0, 5, 1, 3]
    permuted = take_users(history, order)
    assert close(extractor(permuted), extractor(history)[order])
    states, moved = extractor.encode(history), extractor.encode(permuted)
    for place, user in enumerate(order):
        assert close(moved[rows_of(permuted, place)], states[rows_of(history, user)])


@every_position
def test_sequences_do_not_see_each_other(positions: Positions) -> None:
    extractor, history = make_extractor(positions), make_history(LENGTHS)
    changed = replace(history, embedded=history.embedded.clone().index_fill_(0, torch.arange(3, 66), 5.0))
    before, after = extractor(history), extractor(changed)
    assert close(before[[0, 1, 3, 4, 5]], after[[0, 1, 3, 4, 5]])
    assert not close(before[2], after[2])


@every_position
def test_candidates_see_their_users_history_and_themselves_only(positions: Positions) -> None:
    """Alone, in another order, or without the others: the same vectors."""
    extractor, history, candidates = make_extractor(positions), make_history(LENGTHS), make_candidates(CANDIDATES)
    together = extractor(history, candidates)
    swapped = [1, 0, 2, 5, 4, 3, 6]
    assert close(extractor(history, take_candidates(candidates, swapped, CANDIDATES)), together[swapped])
    fewer = [0, 4, 6]
    assert close(extractor(history, take_candidates(candidates, fewer, [1, 0, 1, 0, 1, 0])), together[fewer])
    user = take_users(history, [2])
    for row in (3, 4, 5):
        assert close(extractor(user, take_candidates(candidates, [row], [1])), together[[row]])


@every_position
def test_candidate_of_another_users_history_would_differ(positions: Positions) -> None:
    extractor, history, candidates = make_extractor(positions), make_history(LENGTHS), make_candidates(CANDIDATES)
    together = extractor(history, candidates)
    changed = replace(history, embedded=history.embedded.clone().index_fill_(0, torch.arange(3, 66), 5.0))
    same = torch.isclose(extractor(changed, candidates), together, atol=1e-5).all(1)
    assert same.tolist() == [True, True, True, False, False, False, True]


@every_position
def test_candidate_of_a_user_without_history_depends_on_itself_alone(positions: Positions) -> None:
    extractor, candidates = make_extractor(positions), make_candidates([2, 1])
    alone = extractor(replace(make_history([0, 0]), start_position=torch.zeros(2, dtype=torch.int64)), candidates)
    beside = extractor(replace(make_history([0, 9]), start_position=torch.zeros(2, dtype=torch.int64)), candidates)
    assert close(alone[:2], beside[:2])


@every_position
def test_candidate_equals_the_event_that_it_would_become(positions: Positions) -> None:
    """A candidate attends as if it were the next event, with the unknown action."""
    extractor, history = make_extractor(positions), make_history([6])
    times = torch.arange(6) * 5_000
    history = replace(history, timestamps_ms=times, actions=torch.tensor([1, 3, 0, 2, 1, 0]))
    last = Candidates(
        embedded=history.embedded[5:],
        offsets=torch.tensor([0, 1]),
        request_time_ms=times[5:],
        content={name: x[5:] for name, x in history.content.items()},
        present={name: x[5:] for name, x in history.present.items()},
    )
    before = first_events(history, 5)
    assert close(extractor(before, last), extractor.encode(history)[5:])


def test_learned_bias_changes_the_result_and_learns() -> None:
    extractor, history = make_extractor("learned"), make_history([5, 20])
    before = extractor.encode(history)
    before.square().sum().backward()
    for layer in extractor._layers():
        assert layer.bias is not None
        slopes = gradients([layer.bias])[0]
        assert (slopes[:, :20] != 0).any()
        assert (slopes[:, 20:] == 0).all()
    first = next(extractor._layers())
    assert first.bias is not None
    with torch.no_grad():
        first.bias[:, 1] += 3.0  # the event before
    changed = ~torch.isclose(extractor.encode(history), before).all(1)
    assert changed.tolist() == [False, *[True] * 4, False, *[True] * 19]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_order_of_events_matters_with_positions_only(positions: Positions) -> None:
    """In one layer: a second one also sees how much each event saw."""
    extractor, history = make_extractor(positions, num_layers=1), make_history([6])
    assert history.timestamps_ms is not None
    history = replace(history, timestamps_ms=torch.zeros(6, dtype=torch.int64))
    events = replace(history, offsets=torch.arange(7), start_position=torch.zeros(6).long())
    swapped = take_users(events, [1, 0, 2, 3, 4, 5])
    swapped = replace(swapped, offsets=history.offsets, start_position=history.start_position)
    assert not close(extractor(swapped), extractor(history))
    plain = make_extractor("none", num_layers=1)
    assert close(plain(swapped), plain(history))


@pytest.mark.parametrize("shift", [1, 1000, 1_000_000])
def test_rotary_results_do_not_depend_on_where_in_the_stream_a_history_starts(shift: int) -> None:
    extractor, history, candidates = make_extractor("rotary"), make_history(LENGTHS), make_candidates(CANDIDATES)
    later = replace(history, start_position=history.start_position + shift)
    assert close(extractor.encode(later), extractor.encode(history))
    assert close(extractor(later, candidates), extractor(history, candidates))


@every_position
@pytest.mark.parametrize("lengths", [LENGTHS, [0] * 6], ids=["events", "no events"])
@pytest.mark.parametrize("call", ["encode", "users", "candidates", "no candidates"])
def test_every_parameter_has_a_gradient_in_every_call(call: str, lengths: list[int], positions: Positions) -> None:
    """Data-parallel training waits for the gradient of every parameter, also on a rank whose users have no events."""
    extractor, history = make_extractor(positions), make_history(lengths)
    if call == "encode":
        out = extractor.encode(history)
    elif call == "users":
        out = extractor(history)
    else:
        out = extractor(history, make_candidates(CANDIDATES if call == "candidates" else [0] * 6))
    out.square().sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(extractor.parameters()))


@every_position
def test_missing_modality_has_no_influence_even_as_nan(positions: Positions) -> None:
    extractor, history, candidates = make_extractor(positions), make_history(LENGTHS), make_candidates(CANDIDATES)

    def poisoned(rows: History | Candidates) -> dict[str, Tensor]:
        return {
            name: torch.where(rows.present[name][:, None], vectors, torch.tensor(float("nan")))
            for name, vectors in rows.content.items()
        }

    expected = extractor(history, candidates)
    history, candidates = replace(history, content=poisoned(history)), replace(candidates, content=poisoned(candidates))
    out = extractor(history, candidates)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(extractor.parameters()))


@every_position
def test_bf16_autocast_stays_close_to_fp32(positions: Positions) -> None:
    extractor, history, candidates = make_extractor(positions), make_history(LENGTHS), make_candidates(CANDIDATES)
    expected = [extractor.encode(history), extractor(history), extractor(history, candidates)]
    with torch.autocast("cpu", torch.bfloat16):
        low = [extractor.encode(history), extractor(history), extractor(history, candidates)]
    for got, truth in zip(low, expected, strict=True):
        assert (got.float() - truth).norm() <= 2e-2 * truth.norm()


def test_dropout_acts_in_training_only() -> None:
    extractor, history = make_extractor(dropout=0.5), make_history(LENGTHS)
    assert not torch.equal(extractor.encode(history), extractor.encode(history))
    extractor.eval()
    assert torch.equal(extractor.encode(history), extractor.encode(history))


def fields_on(device: str, rows: History | Candidates) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    for name, value in vars(rows).items():
        if isinstance(value, dict):
            moved[name] = {key: x.to(device) for key, x in value.items()}
        else:
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return moved


@every_position
@pytest.mark.parametrize("lengths", [LENGTHS, [0] * 6], ids=["events", "no events"])
def test_off_the_cpu_no_value_is_waited_for(lengths: list[int], positions: Positions) -> None:
    """Tensors on `meta` have no values: whatever reads one fails."""
    extractor = make_extractor(positions).to("meta")
    history = History(**fields_on("meta", make_history(lengths)))
    assert extractor.encode(history).shape == (sum(lengths), WIDTH)
    assert extractor(history).shape == (6, WIDTH)
    assert extractor.num_places == (6 * 64 if sum(lengths) else 0)
    assert extractor.encode(replace(history, max_length=63)).shape == (sum(lengths), WIDTH)
    candidates = Candidates(**fields_on("meta", make_candidates(CANDIDATES)))
    assert extractor(history, candidates).shape == (7, WIDTH)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_position
def test_gpu_agrees_with_the_cpu_and_is_not_waited_for(positions: Positions) -> None:
    extractor, history, candidates = make_extractor(positions), make_history(LENGTHS), make_candidates(CANDIDATES)
    expected = [extractor.encode(history), extractor(history), extractor(history, candidates)]
    extractor = extractor.cuda()
    history, candidates = History(**fields_on("cuda", history)), Candidates(**fields_on("cuda", candidates))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = [extractor.encode(history), extractor(history), extractor(history, candidates)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, truth in zip(out, expected, strict=True):
        assert torch.allclose(got.cpu(), truth, atol=1e-4)


def test_history_longer_than_the_extractor_is_refused() -> None:
    extractor = make_extractor(max_history=16)
    with pytest.raises(ValueError, match="max_length=16: the longest sequence has 17 events"):
        extractor.encode(make_history([17, 2]))
    with pytest.raises(ValueError, match=r"History\.max_length=20: the extractor was built with max_history=16"):
        extractor.encode(replace(make_history([2]), max_length=20))


def test_full_length_history_with_candidates_has_a_learned_bias_for_every_distance() -> None:
    extractor = make_extractor("learned", max_history=16)
    assert extractor(make_history([16]), make_candidates([2])).shape == (2, WIDTH)


def test_extractor_without_content_actions_or_times_reads_ids_alone() -> None:
    extractor = FullAttentionExtractor(FullAttentionConfig(), EventEmbedding(EventEmbeddingConfig(width=WIDTH)), 8)
    history = History(
        embedded=torch.randn(5, WIDTH), offsets=torch.tensor([0, 5]), start_position=torch.zeros(1).long()
    )
    assert extractor(history).shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"ffn_ratio": 0.0}, "ffn_ratio=0.0"),
        ({"positions": "sinus"}, "positions='sinus'"),
        ({"num_heads": 3}, "num_heads=3: must divide the model width 8"),
        ({"num_heads": 8}, "num_heads=8: must divide the model width 8 into even parts"),
    ],
)
def test_bad_size_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullAttentionExtractor(FullAttentionConfig(**values), make_embedding(), 8)
    with pytest.raises(ValueError, match="max_history=0"):
        FullAttentionExtractor(FullAttentionConfig(), make_embedding(), 0)
