"""The next-item objective: bounds, equality of its two forms, and ranks that add up to the global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mufasa_rec.modules.next_item import NextItemConfig, NextItemObjective, Questions
from tests.tensors import assert_close, gradients, leaf

NUM_ITEMS, WIDTH = 12, 8


def make_questions(num_targets: int = 9) -> Questions:
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(NUM_ITEMS, WIDTH), dim=1)
    target = torch.randint(0, NUM_ITEMS, (num_targets,))
    return Questions(
        states=torch.randn(num_targets, WIDTH) * 3,
        positive=vectors[target],
        target_row=target * 10,  # rows are not columns
        weight=torch.rand(num_targets),
        candidates=vectors,
        candidate_row=torch.arange(NUM_ITEMS) * 10,
        candidate_bias=torch.zeros(NUM_ITEMS),
    )


class FakeExchange:
    """One of several ranks, told beforehand what all of them bring."""

    def __init__(self, ranks: Sequence[Questions]) -> None:
        self.world_size = len(ranks)
        self.everything = {
            name: [getattr(rank, name) for rank in ranks] for name in ("candidates", "candidate_row", "candidate_bias")
        }
        self.sizes = [[len(rank.states), len(rank.candidates)] for rank in ranks]

    def counts(self, values: Sequence[int]) -> list[list[int]]:
        assert list(values) in self.sizes
        return self.sizes

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        assert list(sizes) == [size for _, size in self.sizes]
        found = [parts for parts in self.everything.values() if any(x is part for part in parts)]
        return torch.cat(found[0])


def split(asked: Questions, targets: int, candidates: int) -> list[Questions]:
    """Two ranks' shares of a global batch."""
    ranks = []
    for mine, brought in ((slice(targets), slice(candidates)), (slice(targets, None), slice(candidates, None))):
        ranks.append(
            Questions(
                states=asked.states[mine],
                positive=asked.positive[mine],
                target_row=asked.target_row[mine],
                weight=asked.weight[mine],
                candidates=asked.candidates[brought],
                candidate_row=asked.candidate_row[brought],
                candidate_bias=asked.candidate_bias[brought],
            )
        )
    return ranks


@pytest.mark.parametrize("full", [False, True])
def test_loss_is_the_weighted_mean_of_cross_entropies_of_cosines(full: bool) -> None:
    asked = make_questions()
    loss, total = NextItemObjective(NextItemConfig(temperature=0.1), full=full)(asked)
    scores = F.normalize(asked.states, dim=1) @ asked.candidates.T / 0.1
    losses = F.cross_entropy(scores, asked.target_row // 10, reduction="none") * asked.weight
    assert loss.item() == pytest.approx(losses.sum().item() / 9, rel=1e-5)
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    assert not total.requires_grad


def test_full_equals_sampled_with_every_item_and_no_bias() -> None:
    """The positive is dropped from the negatives, so it counts once in both."""
    results = []
    for full in (True, False):
        asked = make_questions()
        states, vectors = leaf(asked.states), leaf(asked.candidates)
        asked = replace(asked, states=states, candidates=vectors, positive=vectors[asked.target_row // 10])
        objective = NextItemObjective(NextItemConfig(), full=full)
        loss, _ = objective(asked)
        loss.backward()
        results.append([loss, *gradients([states, vectors, objective.log_temperature])])
    assert_close(results[0], results[1], 1e-5)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("targets", [0, 2, 9])
def test_mean_over_ranks_is_the_loss_of_the_global_batch(targets: int, full: bool) -> None:
    """However unevenly targets and candidates fall on the ranks."""
    asked = replace(make_questions(), candidate_bias=torch.zeros(NUM_ITEMS) if full else torch.randn(NUM_ITEMS))
    expected, total = NextItemObjective(NextItemConfig(), full=full)(asked)
    ranks = split(asked, targets, 5)
    exchange = FakeExchange(ranks)
    found = [NextItemObjective(NextItemConfig(), full=full, exchange=exchange)(rank) for rank in ranks]
    assert torch.stack([loss for loss, _ in found]).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(part.item() for _, part in found) == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_batch_without_targets_has_a_zero_loss_and_zero_gradients(full: bool) -> None:
    asked = make_questions(0)
    vectors = leaf(asked.candidates)
    objective = NextItemObjective(NextItemConfig(), full=full)
    loss, _ = objective(replace(asked, candidates=vectors))
    loss.backward()
    assert loss.item() == 0.0
    assert all((g == 0).all() for g in gradients([vectors, objective.log_temperature]))


@pytest.mark.parametrize(("start", "slope"), [(0.001, 1.0), (50.0, -1.0), (0.001, -1.0), (50.0, 1.0)])
def test_temperature_stays_in_its_bounds_and_comes_back_from_them(start: float, slope: float) -> None:
    """An optimizer's momentum may push the parameter out, where a plain clamp has no gradient any more."""
    objective = NextItemObjective(NextItemConfig(), full=True)
    with torch.no_grad():
        objective.log_temperature.fill_(math.log(start))
    bound = 0.01 if start < 1 else 1.0
    assert objective.temperature.item() == pytest.approx(bound)
    first, _ = objective(make_questions())
    second, _ = objective(make_questions())  # the parameter is put right in place: that may not spoil the first graph
    (first * slope + second * slope).backward()
    assert objective.log_temperature.item() == pytest.approx(math.log(bound))
    assert objective.temperature.item() == pytest.approx(bound)
    assert gradients([objective.log_temperature])[0].abs() > 0


def test_evaluation_leaves_the_temperature_alone() -> None:
    objective = NextItemObjective(NextItemConfig(), full=True).eval()
    with torch.no_grad():
        objective.log_temperature.fill_(5.0)
    objective(make_questions())
    assert objective.log_temperature.item() == 5.0


def test_temperature_learns() -> None:
    objective = NextItemObjective(NextItemConfig(temperature=0.05), full=True)
    asked, before = make_questions(), objective.temperature.item()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    loss, _ = objective(asked)
    loss.backward()
    optimizer.step()
    assert objective.temperature.item() > before  # random states should not be so sure
    assert objective(asked)[0] < loss


def test_states_under_bf16_autocast_give_an_fp32_loss() -> None:
    asked = make_questions()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = NextItemObjective(NextItemConfig(), full=False)(replace(asked, states=asked.states.bfloat16()))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(NextItemObjective(NextItemConfig(), full=False)(asked)[0].item(), rel=2e-2)


def test_target_outside_the_catalog_is_refused() -> None:
    asked = make_questions()
    for row in (55, 999):  # between two candidates, and behind the last
        wrong = replace(asked, target_row=torch.cat([asked.target_row[:8], torch.tensor([row])]))
        with pytest.raises(ValueError, match=f"1 targets are not among the 12 candidates .such as row {row}"):
            NextItemObjective(NextItemConfig(), full=True)(wrong)


@pytest.mark.parametrize(("low", "start", "high"), [(0.0, 0.05, 1.0), (0.1, 0.05, 1.0), (0.01, 2.0, 1.0)])
def test_temperature_outside_its_bounds_is_refused(low: float, start: float, high: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.objective\.temperature={start}"):
        NextItemConfig(temperature=start, min_temperature=low, max_temperature=high)
