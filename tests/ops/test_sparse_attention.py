"""The tiled path against the definition in float64: selection and arithmetic apart, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mufasa_rec.ops.sparse_attention import heads as heads_module
from mufasa_rec.ops.sparse_attention import tiles
from mufasa_rec.ops.sparse_attention.api import attend_and_select
from mufasa_rec.ops.sparse_attention.heads import Scratch, for_each_part
from mufasa_rec.ops.sparse_attention.layout import Layout
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.ops.sparse_attention.projected import FIELDS, Projected
from mufasa_rec.ops.sparse_attention.reference import reference_attention, reference_scores
from tests.sparse import BASE, LENGTHS, PATTERNS, WIDTH, as_leaves, copies_of, make_layout, make_rows, make_tokens
from tests.tensors import gradient

RATIOS = [(2, 2), (4, 2), (4, 1), (3, 1)]
OUTPUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SCORE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(
    x: Projected, tokens: tuple[Tensor, Tensor], layout: Layout, weight: Tensor, selected: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Output and gradients of all inputs, by the definition when `selected` is handed in; and the scored blocks."""
    leaves = [*{id(t): t for t in (*x.tensors().values(), *tokens)}.values()]
    if selected is None:
        out, chosen = attend_and_select(x, *tokens, layout)
    else:
        out, chosen = reference_attention(x, *tokens, layout, selected)
    (out * weight.to(out.dtype)).sum().backward()
    return [out, *(torch.zeros_like(t) if t.grad is None else gradient(t) for t in leaves)], chosen


def check_arithmetic(got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    """Compare by the norm of the difference; a gradient that vanishes in truth has the scale of the largest."""
    scale = max(float(t.detach().double().norm()) for t in truth)
    for mine, right in zip((t.detach() for t in got), (t.detach() for t in truth), strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - right.double()).norm() <= tolerance * max(float(right.double().norm()), 0.1 * scale)


def check_selection(chosen: Tensor, truth: Tensor, scores: list[Tensor], layout: Layout, tolerance: float) -> None:
    """A block that the definition does not choose may be chosen only where the scores are practically equal."""
    tiles = layout.tiles
    for row, (mine, right) in enumerate(zip(chosen.tolist(), truth.tolist(), strict=True)):
        sequence = int(tiles.sequence[row])
        query = int(tiles.begin[row] - layout.offsets[sequence])
        for group, (a, b) in enumerate(zip(mine, right, strict=True)):
            assert len(set(a) - {-1}) == len(set(b) - {-1})
            of_block = scores[sequence][group, query]
            for wrong, missed in zip(sorted(set(a) - set(b)), sorted(set(b) - set(a)), strict=True):
                gap = abs(float(of_block[wrong] - of_block[missed]))
                assert gap <= tolerance * float(of_block[missed])


def check(
    lengths: Sequence[int], pattern: SparsePattern, heads: tuple[int, int], *, shared: bool, dtype: torch.dtype
) -> None:
    unit = pattern.selection_block if torch.rand(()) < 0.5 else 1  # sequences that begin with a block, or anywhere
    starts = [unit * int(start) for start in torch.randint(0, 20, (len(lengths),))]
    layout = make_layout(lengths, pattern, starts)
    x = as_leaves(make_rows(sum(lengths), *heads, shared=shared), dtype)
    tokens = copies_of(make_tokens(layout, heads[1]), dtype)
    weight = torch.randn(x.q.shape, dtype=torch.float64)
    got, chosen = run(x, tokens, layout, weight, None)
    exact, exact_tokens = as_leaves(x, torch.float64), copies_of(tokens, torch.float64)
    truth, _ = run(exact, exact_tokens, layout, weight, chosen)
    check_arithmetic(got, truth, OUTPUT_ERROR[dtype])
    with torch.no_grad():
        _, expected = reference_attention(exact, *exact_tokens, layout)
        scores = reference_scores(exact, exact_tokens[0], layout)
    check_selection(chosen, expected, scores, layout, SCORE_ERROR[dtype])


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), max_size=3),
    heads=st.sampled_from(RATIOS),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_tiled_path_equals_the_definition(
    name: str, lengths: list[int], heads: tuple[int, int], shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    check(lengths, PATTERNS[name], heads, shared=shared, dtype=torch.float32)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_all_awkward_lengths_in_one_batch_equal_the_definition(name: str, shared: bool, seed: int) -> None:
    torch.manual_seed(seed)  # at 0 sequences begin with a block, at 1 anywhere
    check(LENGTHS, PATTERNS[name], (4, 2), shared=shared, dtype=torch.float32)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("heads", RATIOS, ids=str)
def test_bf16_stays_close_to_the_definition(heads: tuple[int, int], shared: bool) -> None:
    torch.manual_seed(0)
    check([63, 0, 111, 9], BASE, heads, shared=shared, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["tiles of 2", "overlapping tokens", "timegap", "no block", "no own block"])
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=str)
def test_gradients_equal_finite_differences(name: str, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    lengths = [0, 1, 14]
    pattern = replace(PATTERNS[name], window=5, num_selected=3)
    layout = make_layout(lengths, pattern, [0, 3, 6])
    x = as_leaves(make_rows(sum(lengths), *heads, width=2), torch.float64)
    tokens = copies_of(make_tokens(layout, heads[1], width=2), torch.float64)
    _, chosen = attend_and_select(x, *tokens, layout)

    def function(*inputs: Tensor) -> Tensor:
        rows = Projected(**dict(zip(FIELDS, inputs)))
        k_block, v_block = inputs[len(FIELDS) :]
        return attend_and_select(rows, k_block, v_block, layout, selected=chosen)[0]

    assert torch.autograd.gradcheck(function, [*x.tensors().values(), *tokens], eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)], ids=str)
def test_logits_hundreds_of_nats_apart_neither_overflow_nor_underflow(heads: tuple[int, int]) -> None:
    """The selected branch of the last query lies 300 nats below the window branch, and heads lie far apart too."""
    torch.manual_seed(0)
    layout = make_layout([111], BASE)
    x = make_rows(111, *heads)
    with torch.no_grad():
        x.k_window.mul_(20)
        x.k_selected.mul_(40).sub_(x.q[-1].mean(0) * 40)
        x.q_block[:, 0] *= 60
    tokens = make_tokens(layout, heads[1])
    got, chosen = run(x, tokens, layout, torch.ones(x.q.shape), None)
    exact, exact_tokens = as_leaves(x, torch.float64), copies_of(tokens, torch.float64)
    truth, _ = run(exact, exact_tokens, layout, torch.ones(x.q.shape), chosen)
    check_arithmetic(got, truth, 1e-4)  # a logit of 500 has an absolute error of 3e-5 in fp32
    with torch.no_grad():
        _, expected = reference_attention(exact, *exact_tokens, layout)
        check_selection(chosen, expected, reference_scores(exact, exact_tokens[0], layout), layout, 1e-3)


@pytest.mark.parametrize("low", ["window", "selected"])
def test_branches_of_one_key_list_may_lie_hundreds_of_nats_apart(low: str) -> None:
    """Keys are shared and read in one pass: the blocks before the window lie 300 nats above or below it."""
    torch.manual_seed(0)
    layout = make_layout([64], PATTERNS["window of whole blocks"])
    x = make_rows(64, 2, 2, shared=True)
    with torch.no_grad():
        x.q[..., 0] = 8.0
        x.k_window[..., 0] = 0.0
        x.k_window[:24, :, 0] = 106.0 if low == "window" else -106.0
    tokens, weight = make_tokens(layout, 2), torch.randn(x.q.shape)
    got, chosen = run(x, tokens, layout, weight, None)
    truth, _ = run(as_leaves(x, torch.float64), copies_of(tokens, torch.float64), layout, weight, chosen)
    check_arithmetic(got, truth, 1e-3)  # two nearly equal sums of keys of 106 leave little of a query's gradient


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (3, 3), (4, 2), (2, 1)], ids=str)
def test_threads_change_no_bit_where_each_has_heads_of_its_own(
    heads: tuple[int, int], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_module, "_SMALL", 0)  # one by one, as those of a large batch
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, PATTERNS["window of whole blocks"])
    x, tokens = make_rows(sum(LENGTHS), *heads, shared=shared), make_tokens(layout, heads[1])
    weight, before = torch.randn(x.q.shape), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            copy = as_leaves(x)
            found.append(run(copy, copies_of(tokens, torch.float32), layout, weight, None))
            assert torch.get_num_threads() == threads
            with torch.inference_mode():
                again = attend_and_select(copy, *tokens, layout)[0]
            assert torch.equal(again, found[-1][0][0])
        finally:
            torch.set_num_threads(before)
    for one, two in zip((*found[0][0], found[0][1]), (*found[1][0], found[1][1]), strict=True):
        assert torch.equal(one, two) if heads[1] > 1 else torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 1 << 10])
def test_chunks_of_any_size_equal_the_definition(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    for name in ("window of whole blocks", "timegap"):
        check(LENGTHS, PATTERNS[name], (4, 2), shared=True, dtype=torch.float32)


@pytest.mark.parametrize("name", ["window of whole blocks", "timegap", "no block"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 3)], ids=str)
def test_heads_taken_together_equal_heads_one_by_one(
    name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layout = make_layout(LENGTHS, PATTERNS[name])
    x, tokens = make_rows(sum(LENGTHS), *heads), make_tokens(layout, heads[1])
    weight, found = torch.randn(x.q.shape), []
    for small in (0, 2 * sum(LENGTHS), 1 << 20):  # one, two, all
        monkeypatch.setattr(heads_module, "_SMALL", small)
        found.append(run(as_leaves(x), copies_of(tokens, torch.float32), layout, weight, None))
    for together in found[1:]:
        for one, two in zip((*found[0][0], found[0][1]), (*together[0], together[1]), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_an_error_in_a_thread_is_raised_and_the_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fail(part: range, scratch: Scratch) -> None:
        raise RuntimeError(f"head {part.start}")

    try:
        with pytest.raises(RuntimeError, match="head"):
            for_each_part(fail, [range(1), range(1, 2)], torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_negative_and_zero_gates_are_weights_like_any_other() -> None:
    torch.manual_seed(0)
    layout = make_layout([40, 3], BASE)
    x = make_rows(43, 2, 1)
    with torch.no_grad():
        x.gates.sub_(0.5)[:, :, 0].zero_()
    tokens, weight = make_tokens(layout, 1), torch.randn(43, 2, WIDTH)
    got, chosen = run(x, tokens, layout, weight, None)
    truth, _ = run(as_leaves(x, torch.float64), copies_of(tokens, torch.float64), layout, weight, chosen)
    check_arithmetic(got, truth, 1e-5)
