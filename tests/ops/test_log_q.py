"""The log-Q correction by simulation: the mean estimated partition sum of a sampled softmax is the exact one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from mufasa_rec.data.negatives import NegativeSampler, NegativesConfig
from mufasa_rec.ops.softmax import sampled_softmax_loss

NUM_ITEMS, NUM_ROWS, TARGETS_PER_ROW, NUM_STEPS = 200, 40, 10, 8000
QUESTIONS = np.array([0, 5, 50, 199])  # positives: the most popular item, the rarest, and between


class Simulation:
    """Steps of a training whose targets follow the popularity, and scores of every item for a few queries."""

    def __init__(self, num_uniform: int, num_inbatch: int) -> None:
        draw = np.random.default_rng(0)
        counts = np.ceil(5000 / (1 + np.arange(NUM_ITEMS)) ** 1.0).astype(np.int64)
        config = NegativesConfig(softmax="sampled", num_uniform=num_uniform, num_inbatch=num_inbatch)
        self.sampler = NegativeSampler(config, np.ones(NUM_ITEMS, dtype=bool), counts, TARGETS_PER_ROW, seed=3)
        self.popularity = counts / counts.sum()
        self.vectors = torch.from_numpy(draw.normal(size=(NUM_ITEMS, 8))).float()
        self.queries = torch.from_numpy(draw.normal(size=(len(QUESTIONS), 8))).float() * 0.5
        self.scores = (self.queries @ self.vectors.T).double().numpy()

    def steps(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Uniform negatives and in-batch negatives of each step."""
        draw = np.random.default_rng(1)
        row_id = np.repeat(np.arange(NUM_ROWS), TARGETS_PER_ROW)
        position = np.tile(np.arange(TARGETS_PER_ROW), NUM_ROWS)
        for step in range(NUM_STEPS):
            targets = draw.choice(NUM_ITEMS, size=len(row_id), p=self.popularity)
            taken = self.sampler.in_batch(0, row_id + step * NUM_ROWS, position, NUM_ROWS)
            ranks = [self.sampler.shared(0, step, rank, 2) for rank in range(2)]
            yield np.concatenate(ranks), targets[taken]

    def loss_of_step(self, rows: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, float]:
        """Estimated partition sum of each query, and what the loss should be."""
        scores = self.scores[:, rows] + bias
        mine = self.scores[np.arange(len(QUESTIONS)), QUESTIONS]
        total = np.exp(mine) + np.where(rows == QUESTIONS[:, None], 0.0, np.exp(scores)).sum(1)
        return total, float((np.log(total) - mine).sum())

    def error(self, bias: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Relative error of the mean estimated partition sum of each query."""
        total = np.zeros(len(QUESTIONS))
        for step, parts in enumerate(self.steps()):
            rows, added = np.concatenate(parts), bias(*parts)
            estimate, expected = self.loss_of_step(rows, added)
            total += estimate
            if step < 5:  # the estimate is the one that the loss makes
                target, negatives = torch.from_numpy(QUESTIONS), torch.from_numpy(rows)
                positive, candidates = self.vectors[target], self.vectors[negatives]
                bias_of, ones = torch.from_numpy(added).float(), torch.ones(len(QUESTIONS))
                loss = sampled_softmax_loss(self.queries, positive, candidates, bias_of, target, negatives, ones)
                assert loss.item() == pytest.approx(expected, rel=1e-5)
        return np.abs(total / NUM_STEPS / np.exp(self.scores).sum(1) - 1)


@pytest.mark.parametrize(("num_uniform", "num_inbatch"), [(64, 100), (0, 150), (128, 0), (16, 400)])
def test_mean_partition_sum_with_expected_counts_is_within_one_percent(num_uniform: int, num_inbatch: int) -> None:
    simulation = Simulation(num_uniform, num_inbatch)
    error = simulation.error(lambda *parts: simulation.sampler.bias(np.concatenate(parts), NUM_ROWS))
    assert (error < 0.01).all(), error


def test_probabilities_per_source_would_not_pass() -> None:
    simulation = Simulation(64, 100)

    def per_source(uniform: np.ndarray, inbatch: np.ndarray) -> np.ndarray:
        return -np.log(np.concatenate([np.full(len(uniform), 64 / NUM_ITEMS), 100 * simulation.popularity[inbatch]]))

    assert (simulation.error(per_source) > 0.01).all()
