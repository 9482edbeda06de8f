"""The sparse extractor keeps what every extractor promises, for every segmentation, option and ablation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mufasa_rec.modules.full_attention import FullAttentionConfig, FullAttentionExtractor
from mufasa_rec.modules.history import Candidates, History
from mufasa_rec.modules.interest import SparseInterestExtractor
from mufasa_rec.modules.segmentation import BorderConfig, borders_of
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from mufasa_rec.ops.sparse_attention.api import Backend
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern, ablate
from tests.histories import WIDTH, make_candidates, make_embedding, make_history, take_candidates, take_users
from tests.tensors import assert_close, gradients, offsets_of

LENGTHS = [3, 0, 63, 1, 17, 0, 8]
CANDIDATES = [2, 1, 3, 0, 1, 0, 1]
BORDERS = BorderConfig(gap_seconds=100.0, cosine=0.0, modality="title")
FIXED = SparsePattern(window=6, block=4, num_selected=4, selection_stride=2)
PATTERNS = {
    "fixed": FIXED,
    "timegap": replace(FIXED, segmentation="timegap", selection_stride=1),
    "coherence": replace(FIXED, segmentation="coherence"),
    "capped": replace(FIXED, block=2, max_blocks=8),
    "overlapping": replace(FIXED, stride=2, selected_block=4),
    "window only": ablate(FIXED, "window only"),
    "window and first block": ablate(FIXED, "window and first block"),
    "no selected": ablate(FIXED, "no selected"),
    "no block": ablate(FIXED, "no block"),
    "no mixer": replace(FIXED, block_mixer=False),
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)


def make_extractor(
    name: str = "fixed", *, max_history: int = 64, backend: Backend | None = None, **fields: Any
) -> SparseInterestExtractor:
    torch.manual_seed(0)
    config = SparseAttentionConfig(pattern=PATTERNS[name], borders=BORDERS, dropout=0.0)
    extractor = SparseInterestExtractor(replace(config, **fields), make_embedding(), max_history, backend=backend)
    for layer in extractor._layers():
        if layer.tokens is not None:  # zero at first, which would hide mistakes
            torch.nn.init.normal_(layer.tokens.logits)
            torch.nn.init.normal_(layer.tokens.places)
    return extractor


def history_of(lengths: list[int]) -> History:
    """Random histories that begin at whole blocks, as loaders cut them."""
    history = make_history(lengths)
    return replace(history, start_position=history.start_position // 8 * 8)


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


def changed_from(history: History, first: int, last: int) -> History:
    """Other items, contents, times and actions for some events."""
    assert history.timestamps_ms is not None
    assert history.actions is not None
    rows = torch.arange(first, last)
    return replace(
        history,
        embedded=history.embedded.index_fill(0, rows, 9.0),
        timestamps_ms=history.timestamps_ms.index_add(0, rows, torch.arange(1, len(rows) + 1) * 10**9),
        actions=history.actions.index_fill(0, rows, 1),
        content={name: x.index_fill(0, rows, -1.0) for name, x in history.content.items()},
        present={name: x.index_fill(0, rows, True) for name, x in history.present.items()},
    )


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


@every_pattern
def test_shapes_are_those_of_the_contract_and_nothing_is_padded(name: str) -> None:
    extractor, history, candidates = make_extractor(name), history_of(LENGTHS), make_candidates(CANDIDATES)
    states, users = extractor.encode(history), extractor(history)
    assert states.shape == (sum(LENGTHS), extractor.output_dim)
    assert extractor(history, candidates).shape == (sum(CANDIDATES), extractor.output_dim)
    assert extractor.num_places == sum(LENGTHS)
    for user, length in enumerate(LENGTHS):
        expected = states[history.offsets[user + 1] - 1] if length else extractor.empty
        assert torch.equal(users[user], expected)
    assert torch.equal(extractor(history_of([0, 0])), extractor.empty.expand(2, -1))


@every_pattern
def test_future_events_change_no_past_state_also_through_the_choice_of_blocks(name: str) -> None:
    extractor, history = make_extractor(name), history_of([5, 30, 9])
    before = extractor.encode(history)
    for first in (5, 18, 22, 31):
        same = torch.isclose(before, extractor.encode(changed_from(history, first, 35)), atol=1e-5).all(1)
        assert same[:first].all()
        assert not same[first:35].any()
        assert same[35:].all()


@every_pattern
def test_appending_events_leaves_all_earlier_states_equal(name: str) -> None:
    extractor, longer = make_extractor(name), history_of([40])
    states = extractor.encode(longer)
    for length in (1, 4, 5, 15, 16, 17, 39):
        assert close(extractor.encode(first_events(longer, length)), states[:length])


@every_pattern
def test_users_do_not_see_each_other_and_may_come_in_any_order(name: str) -> None:
    extractor, history = make_extractor(name), history_of(LENGTHS)
    order = [4, 2, 0, 6, 5, 1, 3]
    users = extractor(history)
    assert close(extractor(take_users(history, order)), users[order])
    others = torch.tensor([user for user in range(len(LENGTHS)) if user != 2])
    after = extractor(changed_from(history, 3, 66))
    assert close(after[others], users[others])
    assert not close(after[2], users[2])


@every_pattern
def test_candidates_see_their_users_history_and_themselves_only(name: str) -> None:
    extractor, history, candidates = make_extractor(name), history_of(LENGTHS), make_candidates(CANDIDATES)
    together = extractor(history, candidates)
    swapped = [1, 0, 2, 5, 4, 3, 6, 7]
    assert close(extractor(history, take_candidates(candidates, swapped, CANDIDATES)), together[swapped])
    fewer = [0, 4, 6]
    assert close(extractor(history, take_candidates(candidates, fewer, [1, 0, 1, 0, 1, 0, 0])), together[fewer])
    for row in (3, 4, 5):
        alone = extractor(take_users(history, [2]), take_candidates(candidates, [row], [1]))
        assert close(alone, together[[row]])
    same = torch.isclose(extractor(changed_from(history, 3, 66), candidates), together, atol=1e-5).all(1)
    assert same.tolist() == [True, True, True, False, False, False, True, True]


@pytest.mark.parametrize("name", ["timegap", "exact", "window only", "no selected"])
@pytest.mark.parametrize("length", [5, 9, 22])
def test_candidate_equals_the_event_that_it_would_become(name: str, length: int, monkeypatch: Any) -> None:
    """Where each query chooses for itself (candidates never share a tile's choice) and completes no block by itself."""
    monkeypatch.setitem(PATTERNS, "exact", replace(FIXED, selection_stride=1))
    extractor, history = make_extractor(name), history_of([length])
    assert history.timestamps_ms is not None
    assert history.actions is not None
    history = replace(history, actions=history.actions.index_fill(0, torch.tensor([length - 1]), 0))
    last = Candidates(
        embedded=history.embedded[-1:],
        offsets=torch.tensor([0, 1]),
        request_time_ms=history.timestamps_ms[-1:],  # type: ignore[index]
        content={name: x[-1:] for name, x in history.content.items()},
        present={name: x[-1:] for name, x in history.present.items()},
    )
    if name == "timegap":  # a candidate joins the open block, as does an event without a pause before it
        times = torch.arange(length) * 1000
        history = replace(history, timestamps_ms=times)
        last = replace(last, request_time_ms=times[-1:])
    assert close(extractor(first_events(history, length - 1), last), extractor.encode(history)[-1:])


@every_pattern
@pytest.mark.parametrize("lengths", [LENGTHS, [2, 3, 0, 1, 1, 0, 0], [0] * 7], ids=["blocks", "no block", "no events"])
@pytest.mark.parametrize("call", ["encode", "users", "candidates", "no candidates"])
def test_every_parameter_has_a_gradient_in_every_call(call: str, lengths: list[int], name: str) -> None:
    """Data-parallel training waits for the gradient of every parameter, also on a rank whose users have no events."""
    extractor, history = make_extractor(name), history_of(lengths)
    if call == "encode":
        out = extractor.encode(history)
    elif call == "users":
        out = extractor(history)
    else:
        out = extractor(history, make_candidates(CANDIDATES if call == "candidates" else [0] * 7))
    out.square().sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(extractor.parameters()))


def outputs_and_gradients(extractor: SparseInterestExtractor) -> list[Tensor]:
    torch.manual_seed(1)
    history, candidates = history_of([3, 0, 30, 9]), make_candidates([1, 1, 2, 0])
    states, scored = extractor.encode(history), extractor(history, candidates)
    (states.sin().sum() + scored.square().sum()).backward()
    return [states, scored, *(torch.zeros_like(p) if p.grad is None else p.grad for p in extractor.parameters())]


@every_pattern
@pytest.mark.parametrize("options", [{"kv_groups": 1}, {"shared_kv": True}, {"positions": "none"}], ids=str)
def test_fast_path_agrees_with_the_reference(name: str, options: dict[str, Any]) -> None:
    fast = outputs_and_gradients(make_extractor(name, **options))
    truth = outputs_and_gradients(make_extractor(name, backend="reference", **options))
    assert_close(fast, truth, 2e-4)


def test_recomputation_changes_nothing() -> None:
    kept, again = (outputs_and_gradients(make_extractor(recompute=recompute)) for recompute in (False, True))
    assert_close(again, kept, 1e-6)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_full_causal_pattern_with_open_gates_equals_the_full_extractor(positions: Any) -> None:
    config = SparseAttentionConfig(positions=positions, dropout=0.0, pattern=ablate(FIXED, "full causal"))
    sparse = SparseInterestExtractor(config, make_embedding(), 64)
    full = FullAttentionExtractor(FullAttentionConfig(positions=positions, dropout=0.0), sparse.embedding, 64)
    weights = {k: v for k, v in sparse.state_dict().items() if ".gate." not in k}
    full.load_state_dict(weights)
    with torch.no_grad():
        for layer in sparse._layers():
            layer.gate.weight.zero_()
            layer.gate.bias.fill_(100.0)
    history, candidates = history_of(LENGTHS), make_candidates(CANDIDATES)
    assert close(sparse.encode(history), full.encode(history))
    assert close(sparse(history, candidates), full(history, candidates))


@every_pattern
def test_bf16_autocast_stays_close_to_fp32(name: str) -> None:
    torch.manual_seed(3)
    extractor, history, candidates = make_extractor(name), history_of(LENGTHS), make_candidates(CANDIDATES)
    expected = [extractor.encode(history), extractor(history), extractor(history, candidates)]
    with torch.autocast("cpu", torch.bfloat16):
        low = [extractor.encode(history), extractor(history), extractor(history, candidates)]
        sum(x.float().sum() for x in low).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(g).all() for g in gradients(extractor.parameters()))
    for got, truth in zip(low, expected, strict=True):
        rows = (got.float() - truth).norm(dim=1) / truth.norm(dim=1)
        assert rows.median() <= 2e-2
        assert (rows > 0.1).float().mean() <= 0.1  # a close choice of blocks may fall the other way


def test_mixer_tells_blocks_in_another_order_apart() -> None:
    plain = make_extractor("no mixer", num_layers=1, positions="none")
    mixed = make_extractor("fixed", num_layers=1)
    assert mixed.encode(history_of([20])).shape == plain.encode(history_of([20])).shape
    layer = next(mixed._layers())
    assert layer.tokens is not None
    assert layer.tokens.mixer is not None
    assert next(plain._layers()).tokens.mixer is None  # type: ignore[union-attr]


def test_cut_at_whole_blocks_leaves_the_blocks_of_the_uncut_history() -> None:
    """Two layers' windows and the blocks before the cut are gone; what a query reads of the rest is the same."""
    extractor, history = make_extractor("no selected", num_layers=1), history_of([40])
    history = replace(history, start_position=torch.tensor([0]))
    cut = take_users(replace(history, offsets=torch.arange(41), start_position=torch.zeros(40).long()), range(8, 40))
    cut = replace(cut, offsets=torch.tensor([0, 32]), start_position=torch.tensor([8]))
    for layer in extractor._layers():
        assert layer.tokens is not None
        batch, whole = extractor._start(cut)[1], extractor._start(history)[1]
        assert torch.equal(batch.layout.tokens.begin + 8, whole.layout.tokens.begin[2:])


def test_cap_on_blocks_is_resolved_from_the_longest_history_once() -> None:
    extractor = make_extractor("capped", max_history=64)
    assert (extractor.pattern.block, extractor.pattern.max_blocks) == (8, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 4, "kv_groups": 3}, "kv_groups=3: must divide num_heads=4"),
        ({"num_heads": 3}, f"num_heads=3: must divide the model width {WIDTH}"),
        ({"positions": "learned"}, "positions='learned': sparse attention has no bias by distance"),
        ({"pattern": PATTERNS["timegap"]}, "gap_seconds=None: segmentation='timegap' needs it"),
        ({"pattern": PATTERNS["coherence"]}, "cosine=None: segmentation='coherence' needs it"),
    ],
)
def test_bad_config_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseInterestExtractor(SparseAttentionConfig(**values), make_embedding(), 8)


@pytest.mark.parametrize(("name", "message"), [("timegap", "timestamps_ms=None"), ("coherence", "'title'.: missing")])
def test_history_without_what_borders_are_found_by_is_refused(name: str, message: str) -> None:
    extractor, history = make_extractor(name), history_of([5])
    history = replace(history, timestamps_ms=None) if name == "timegap" else replace(history, content={}, present={})
    with pytest.raises(ValueError, match=message):
        borders_of(history, extractor.pattern, extractor.config.borders)
