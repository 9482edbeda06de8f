"""Losses (i) and (ii) of the fusion layer: cases by hand, gradients, and what each is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.fusion_losses import (
    CollaborativeConfig,
    SemanticConfig,
    collaborative_loss,
    cosines,
    genre_members,
    in_other_genres,
    pair_loss,
    semantic_loss,
    title_threshold,
)
from tests.tensors import gradients, leaf

EASY = SemanticConfig(temperature=1.0, threshold=0.9)
APART = torch.eye(2, dtype=torch.bool)
SAME = torch.ones(2, 1, dtype=torch.bool)
ALONE = math.log(1 + math.exp(-1))  # cosine 1 against one other item at cosine 0, temperature 1


def make_batch(num_items: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused vectors, anchors, titles with near duplicates, and genres of which some are unknown."""
    torch.manual_seed(0)
    z, anchors = torch.randn(2, num_items, 6, dtype=torch.float64)
    titles = torch.randn(3, 5, dtype=torch.float64)[torch.arange(num_items) % 3]
    titles = titles + 0.2 * torch.randn(num_items, 5, dtype=torch.float64)
    members = torch.rand(num_items, 4) < 0.3
    return z, anchors, titles, members


def slow_semantic(z: Tensor, anchors: Tensor, titles: Tensor, members: Tensor, config: SemanticConfig) -> Tensor:
    """The docstring's equation, pair by pair."""
    assert config.threshold is not None
    n, total = len(z), torch.zeros((), dtype=z.dtype)
    genres = [set(has.nonzero().flatten().tolist()) for has in members]
    for i in range(n):
        near = [j for j in range(n) if j != i and F.cosine_similarity(titles[i], titles[j], dim=0) > config.threshold]
        across = [j for j in near if genres[i] and genres[j] and not genres[i] & genres[j]]
        share = {j: (F.cosine_similarity(z[i], anchors[j], dim=0) / config.temperature).exp() for j in range(n)}
        below = sum(share[j] for j in range(n) if j not in near or j in across)
        total += sum(-(share[p] / below).log() for p in [i, *across]) / (1 + len(across))
    return total / n


def test_semantic_loss_of_two_items_by_hand() -> None:
    eye = torch.eye(2)
    loss, positives = semantic_loss(eye, eye, eye, APART, EASY)
    assert (loss.item(), positives.tolist()) == (pytest.approx(ALONE), [0, 0])
    same = torch.ones(2, 3)
    loss, positives = semantic_loss(eye, eye, same, APART, EASY)  # both are positives, at cosines 1 and 0
    assert (loss.item(), positives.tolist()) == (pytest.approx(ALONE + 0.5), [1, 1])
    loss, positives = semantic_loss(eye, eye, same, SAME, EASY)  # a copy in the same genre is no negative
    assert (loss.item(), positives.tolist()) == (pytest.approx(0.0), [0, 0])
    loss, positives = semantic_loss(eye, eye, same, APART & ~APART, EASY)  # nor where the genres are not known
    assert (loss.item(), positives.tolist()) == (pytest.approx(0.0), [0, 0])


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.9, 1.0])
def test_semantic_loss_is_its_equation(threshold: float) -> None:
    config, batch = SemanticConfig(temperature=0.3, threshold=threshold), make_batch()
    assert semantic_loss(*batch, config)[0].item() == pytest.approx(slow_semantic(*batch, config).item())


def test_semantic_loss_falls_when_near_duplicates_of_two_genres_come_together() -> None:
    torch.manual_seed(0)
    titles, z, away = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)
    titles[1] = titles[0]
    config = SemanticConfig(threshold=0.95)
    members = F.one_hot(torch.tensor([0, 1, 0, 1, 0, 1])).bool()
    anchors = titles @ torch.randn(8, 8)
    apart = []
    for distance in (2.0, 1.0, 0.0):
        z[:2] = anchors[:2] + distance * torch.stack([away, -away])
        apart.append(semantic_loss(z, anchors, titles, members, config)[0].item())
    assert apart[0] > apart[1] > apart[2]
    positives = semantic_loss(z, anchors, titles, members, config)[1]
    assert positives.tolist() == [1, 1, 0, 0, 0, 0]


def test_gradient_pulls_across_genres_and_leaves_copies_of_the_same_genre_alone() -> None:
    titles = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    anchors = leaf(torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.2], [0.2, 0.0, 1.0]]))
    z = torch.eye(3)
    pulls = []
    for members in (F.one_hot(torch.tensor([0, 1, 1])).bool(), F.one_hot(torch.tensor([0, 0, 1])).bool()):
        anchors.grad = None
        semantic_loss(z[:1], anchors[:1], titles[:1], members[:1], EASY)  # one item alone works
        semantic_loss(z, anchors, titles, members, EASY)[0].backward()
        pulls.append(-gradients([anchors])[0][1, 0].item())  # of item 1's anchor towards item 0's vector
    assert pulls[0] > 1e-2
    assert abs(pulls[1]) < abs(pulls[0]) / 2


def test_equal_titles_are_near_duplicates_at_any_threshold() -> None:
    """A tenth of a percent of the pairs may be equal, or a batch's own quantile may be 1; rounding decides nothing."""
    torch.manual_seed(0)
    titles = torch.randn(1, 64).expand(2, 64) * torch.tensor([[1.0], [3.7]])
    for threshold in (1.0, 1.0001):
        config = SemanticConfig(temperature=1.0, threshold=threshold)
        assert semantic_loss(torch.eye(2), torch.eye(2), titles, SAME, config)[0].item() == pytest.approx(0.0)
        assert semantic_loss(torch.eye(2), torch.eye(2), titles, APART, config)[1].tolist() == [1, 1]


def test_batch_of_one_genre_has_no_positives_but_a_loss_and_a_batch_of_nothing_a_zero() -> None:
    z, anchors, titles, _ = make_batch()
    loss, positives = semantic_loss(z, anchors, titles, torch.ones(9, 1, dtype=torch.bool), EASY)
    assert positives.sum() == 0
    assert loss > 0
    empty = leaf(z[:0])
    loss, _ = semantic_loss(empty, anchors[:0], titles[:0], torch.ones(0, 0, dtype=torch.bool), SemanticConfig())
    loss.backward()
    assert loss.item() == 0.0
    assert gradients([empty])[0].shape == (0, 6)


def test_gradients_are_those_of_the_functions() -> None:
    z, anchors, titles, members = make_batch(5)
    x, y = leaf(z), leaf(anchors)
    config = CollaborativeConfig(temperature=0.4)
    together = torch.rand(5, 5) < 0.3
    wide = SemanticConfig(temperature=0.4, threshold=0.5)
    assert torch.autograd.gradcheck(lambda a, b: semantic_loss(a, b, titles, members, wide)[0], (x, y))
    assert torch.autograd.gradcheck(lambda a, b: collaborative_loss(a, b, config), (x, y))
    assert torch.autograd.gradcheck(lambda a: pair_loss(a, together | together.T, config), (x,))


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_threshold_is_the_quantile_of_all_pairs(quantile: float) -> None:
    titles = make_batch(20)[2]
    pairs = cosines(titles, titles)[torch.triu_indices(20, 20, 1).unbind()]
    assert title_threshold(titles, quantile) == pytest.approx(pairs.quantile(quantile).item())
    assert title_threshold(titles[:1], quantile) == math.inf


def test_threshold_of_a_thinned_catalog_is_close_and_a_batch_takes_its_own() -> None:
    torch.manual_seed(0)
    titles = torch.randn(1500, 8)
    assert title_threshold(titles, 0.99, max_items=500) == pytest.approx(title_threshold(titles, 0.99), abs=0.02)
    z = torch.randn(100, 4)
    _, positives = semantic_loss(z, z, titles[:100], torch.eye(100, dtype=torch.bool), SemanticConfig(quantile=0.9))
    assert positives.sum().item() == 2 * 495  # a tenth of 4,950 pairs, seen from both sides


def test_genres_of_sets_that_meet_are_not_other_genres() -> None:
    members = genre_members(torch.tensor([4, 7, 7, 9]), torch.tensor([2, 1, 0, 1]))
    assert members.int().tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert in_other_genres(members).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]


def test_collaborative_loss_by_hand() -> None:
    config = CollaborativeConfig(temperature=1.0)
    assert collaborative_loss(torch.eye(2), torch.eye(2), config).item() == pytest.approx(ALONE)
    assert collaborative_loss(torch.eye(2), torch.eye(2).flip(0), config).item() == pytest.approx(ALONE + 1)
    assert collaborative_loss(torch.eye(2)[:1], torch.eye(2)[1:], config).item() == 0.0
    half = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # rows: log 2 each; columns: one sees 1 and 1, the other 0 and 0
    assert collaborative_loss(half, torch.eye(2), config).item() == pytest.approx((2 * ALONE + 1 + 2 * math.log(2)) / 4)


def test_collaborative_loss_falls_when_items_of_one_audience_come_together() -> None:
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(4, 6), dim=1)[torch.arange(8) % 4]
    z = torch.randn(8, 6)
    config = CollaborativeConfig()
    losses = [collaborative_loss(torch.lerp(z, vectors, share), vectors, config).item() for share in (0.0, 0.5, 1.0)]
    assert losses[0] > losses[1] > losses[2]


def test_pair_loss_by_hand() -> None:
    config = CollaborativeConfig(kind="pairs", temperature=1.0)
    z, together = torch.eye(3), torch.zeros(3, 3, dtype=torch.bool)
    assert pair_loss(z, together, config).item() == 0.0
    together[0, 1] = together[1, 0] = together[2, 2] = True  # an item is no positive of itself
    assert pair_loss(z, together, config).item() == pytest.approx(math.log(2))
    z[1] = z[0]
    assert pair_loss(z, together, config).item() == pytest.approx(ALONE)
    everyone = torch.ones(3, 3, dtype=torch.bool)
    assert pair_loss(torch.ones(3, 2), everyone, config).item() == pytest.approx(math.log(2))


def test_pair_loss_falls_when_items_that_were_chosen_together_come_together() -> None:
    torch.manual_seed(0)
    z, together = torch.randn(8, 6), torch.zeros(8, 8, dtype=torch.bool)
    together[0, 5] = together[5, 0] = True
    losses = []
    for share in (0.0, 0.5, 1.0):
        moved = z.clone()
        moved[5] = torch.lerp(z[5], z[0], share)
        losses.append(pair_loss(moved, together, CollaborativeConfig(kind="pairs")).item())
    assert losses[0] > losses[1] > losses[2]


def test_nobody_with_behaviour_is_a_zero_that_keeps_the_graph() -> None:
    nobody, pairs = leaf(torch.zeros(0, 4)), torch.zeros(0, 0, dtype=torch.bool)
    config = CollaborativeConfig()
    loss = collaborative_loss(nobody, torch.zeros(0, 4), config) + pair_loss(nobody, pairs, config)
    loss.backward()
    assert loss.item() == 0.0


def test_wrong_configurations_are_refused_by_name() -> None:
    wrong: list[tuple[str, Any]] = [("temperature", 0.0), ("quantile", 1.5)]
    for field, value in wrong:
        with pytest.raises(ValueError, match=rf"semantic\.{field}={value}"):
            SemanticConfig(**{field: value})
    wrong = [("temperature", -1.0), ("min_events", 0)]
    for field, value in wrong:
        with pytest.raises(ValueError, match=rf"collaborative\.{field}={value}"):
            CollaborativeConfig(**{field: value})
    with pytest.raises(ValueError, match=r"collaborative\.kind='clicks': choose 'vectors' or 'pairs'"):
        CollaborativeConfig(kind="clicks")  # type: ignore[arg-type]
