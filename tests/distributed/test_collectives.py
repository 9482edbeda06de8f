"""Exchanges between real ranks: gathers with gradient equal the single process, for any sizes."""

from __future__ import annotations

import pytest
import torch

from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from tests.helpers.ranks import run_ranks


def rows_of(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def gathered(env: DistributedEnv, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Gather rows and pull with a loss that differs per rank; returns all rows, this rank's gradient, and counts."""
    exchange = RankExchange()
    x = rows_of(env.rank, sizes[env.rank]).requires_grad_()
    everything = exchange.gather(x, sizes)
    (everything.sin().sum() * (env.rank + 1)).backward()
    assert x.grad is not None
    return everything.detach(), x.grad, exchange.counts([len(x), env.rank])


@pytest.mark.parametrize("sizes", [[4], [2, 5], [0, 3], [3, 0, 1], [0, 0]])
def test_gather_and_its_gradient_equal_a_single_process(sizes: list[int]) -> None:
    world = len(sizes)
    results = run_ranks(gathered, world, sizes)
    whole = torch.cat([rows_of(rank, size) for rank, size in enumerate(sizes)]).requires_grad_()
    (whole.sin().sum() * sum(range(1, world + 1))).backward()
    assert whole.grad is not None
    start = 0
    for rank, (rows, grad, counts) in enumerate(results):
        torch.testing.assert_close(rows, whole.detach(), rtol=0, atol=0)
        torch.testing.assert_close(grad, whole.grad[start : start + sizes[rank]], rtol=1e-12, atol=0)
        assert counts == [[size, r] for r, size in enumerate(sizes)]
        start += sizes[rank]


def exchanged(env: DistributedEnv) -> tuple[list[float], list[str], list[int]]:
    exchange = RankExchange()
    total = exchange.sum(torch.tensor([1.0, float(env.rank)]))
    rows = exchange.gather(torch.arange(env.rank + 1), [1, 2])
    return total.tolist(), exchange.objects(f"rank {env.rank}"), rows.tolist()


def test_sums_objects_and_integers_reach_all_ranks() -> None:
    assert run_ranks(exchanged, 2) == [([2.0, 1.0], ["rank 0", "rank 1"], [0, 0, 1])] * 2


def fails_on_one(env: DistributedEnv) -> None:
    if env.rank == 1:
        raise ValueError("my own mistake")
    RankExchange().sum(torch.zeros(1))


def test_error_of_a_rank_is_shown_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed(.|\n)*fails_on_one(.|\n)*my own mistake"):
        run_ranks(fails_on_one, 2, timeout_s=30)


def waits_for_ever(env: DistributedEnv) -> None:
    if env.rank == 0:
        RankExchange().sum(torch.zeros(1))


def test_rank_that_hangs_is_ended_and_named() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 of 2 failed|ranks \[0\] did not end"):
        run_ranks(waits_for_ever, 2, timeout_s=3)
