"""The three units of DMAE by hand: buckets, products, histograms, divergences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mufasa_rec.modules.candidate_pairs import Similarities
from mufasa_rec.modules.similarity_distribution import InterestDecoder, divergence, histograms, joint_histograms
from mufasa_rec.modules.similarity_encoding import SimilarityEncoding
from tests.tensors import gradient


def similar_of(r: Tensor, has: Tensor | None = None) -> Similarities:
    """One candidate, `r [M, n]`."""
    has = torch.ones_like(r, dtype=torch.bool) if has is None else has
    return Similarities(r[None], has[None], torch.ones(1, r.shape[1], dtype=torch.bool))


def make_encoding(scale: float, shift: float) -> SimilarityEncoding:
    """Four buckets whose vectors are (1, 10), (2, 20), (3, 30), (4, 40), and no projection."""
    encoding = SimilarityEncoding(1, 2, num_buckets=4, num_time_buckets=0)
    with torch.no_grad():
        encoding.scale.fill_(scale)
        encoding.shift.fill_(shift)
        encoding.buckets.copy_(torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]]))
        encoding.null.copy_(torch.tensor([[-5.0, -6.0]]))
        encoding.project.copy_(torch.eye(2)[None])
    return encoding


def test_mieu_by_hand() -> None:
    encoding = make_encoding(2.0, -0.5)
    r = torch.tensor([[0.1, 0.25, 0.5, 0.75, 0.9, 0.3]])
    has = torch.tensor([[True, True, True, True, True, False]])
    # r^ = -0.3 (bucket 0), 0.0 (0), 0.5 (2), exactly 1.0 (3, the last), 1.3 (3); the last event lacks the modality
    expected = [[-0.3, -3.0], [0.0, 0.0], [1.5, 15.0], [4.0, 40.0], [5.2, 52.0], [-5.0, -6.0]]
    torch.testing.assert_close(encoding(similar_of(r, has), None)[0, 0], torch.tensor(expected))


def test_gradient_reaches_scale_and_shift_through_the_product_alone() -> None:
    encoding = make_encoding(1.0, 0.0)
    r = torch.tensor([[0.1, 0.6, 0.9]])
    encoding(similar_of(r), None).sum().backward()
    sums = torch.tensor([11.0, 33.0, 44.0])  # of the vectors of buckets 0, 2, 3: d(r^ E)/d r^, buckets held fixed
    torch.testing.assert_close(gradient(encoding.scale), (sums * r[0]).sum()[None])
    torch.testing.assert_close(gradient(encoding.shift), sums.sum()[None])


def test_missing_pairs_have_no_part_in_the_gradient_of_scale_and_buckets() -> None:
    encoding = make_encoding(1.0, 0.0)
    encoding(similar_of(torch.tensor([[0.9]]), torch.tensor([[False]])), None).sum().backward()
    assert float(gradient(encoding.scale)) == 0.0
    assert float(gradient(encoding.buckets).abs().sum()) == 0.0
    assert gradient(encoding.null).tolist() == [[1.0, 1.0]]


def test_last_bin_is_closed_and_values_outside_count_in_the_nearest() -> None:
    r = torch.tensor([0.0, 0.0499, 0.05, 0.95, 1.0, 1.0000001, -1e-7])
    shares = histograms(r, torch.ones(7, dtype=torch.bool), 20) * 7
    assert shares.round().tolist() == [3.0, 1.0, *[0.0] * 17, 3.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-0.1, 1.1), st.booleans()), max_size=30), st.integers(1, 25))
def test_histograms_sum_to_one_or_are_empty(values: list[tuple[float, bool]], bins: int) -> None:
    r, has = torch.tensor([v for v, _ in values]), torch.tensor([h for _, h in values], dtype=torch.bool)
    for shares in (histograms(r, has, bins), joint_histograms(r, r.flip(0), has, bins)):
        assert float(shares.sum()) == pytest.approx(1.0 if bool(has.any()) else 0.0, abs=1e-5)
        assert (shares >= 0).all()


def test_joint_histogram_keeps_what_goes_together() -> None:
    first, second = torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1])
    shares = joint_histograms(first, second, torch.ones(2, dtype=torch.bool), 2).view(2, 2)
    assert shares.tolist() == [[0.0, 0.5], [0.5, 0.0]]


def test_divergence_is_zero_for_a_perfect_decoder_and_known_by_hand() -> None:
    p = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64)
    assert float(divergence(p, (p + 1e-300).log())) == pytest.approx(0.0, abs=1e-12)
    expected = 0.25 * math.log(0.25 * 3) + 0.75 * math.log(0.75 * 3)
    assert float(divergence(p, torch.zeros(3, dtype=torch.float64))) == pytest.approx(expected)


def test_decoder_that_restores_the_histograms_has_no_loss() -> None:
    r = torch.tensor([[0.1, 0.3, 0.35, 0.9], [0.6, 0.7, 0.8, 0.9]], dtype=torch.float64)
    similar = similar_of(r)
    decoder = InterestDecoder(2, 3, num_bins=5, joint=(0, 1)).double()
    target = histograms(similar.r, similar.has, 5)
    joint = joint_histograms(r[0], r[1], similar.has[0, 0], 5)
    with torch.no_grad():
        assert decoder.out_joint is not None
        for layer, bias in ((decoder.out, target.flatten()), (decoder.out_joint, joint)):
            layer.weight.zero_()
            layer.bias.copy_((bias + 1e-300).log())
    loss, pairs = decoder(torch.randn(1, 3, dtype=torch.float64), similar)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert int(pairs) == 3


def test_target_is_built_of_raw_similarities_and_carries_no_gradient() -> None:
    """The decoder sees the similarities before scale and shift, so no choice of those changes what must be restored."""
    r = torch.rand(2, 6, requires_grad=True)
    similar = similar_of(r)
    assert not histograms(similar.r, similar.has, 4).requires_grad
    decoder, u = InterestDecoder(2, 3, num_bins=4, joint=(0, 1)), torch.randn(1, 3, requires_grad=True)
    loss, _ = decoder(u, similar)
    loss.backward()
    assert r.grad is None
    assert float(gradient(u).abs().sum()) > 0


def test_rows_without_the_modality_are_masked_from_the_loss() -> None:
    decoder, u = InterestDecoder(2, 3, num_bins=4), torch.randn(1, 3)
    r, has = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool)
    both, pairs = decoder(u, similar_of(r, has))
    has[1] = False
    one, fewer = decoder(u, similar_of(r, has))
    assert (int(pairs), int(fewer)) == (2, 1)
    assert 0 < float(one.detach()) < float(both.detach())
    has[0] = False
    assert [float(x.detach()) for x in decoder(u, similar_of(r, has))] == [0.0, 0.0]
