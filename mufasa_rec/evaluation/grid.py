"""Tables of trained variants: mean metrics over seeds, and paired intervals against one of them.

A cell is one run: a variant with a seed, its metrics, and the rank of every user's target, so that any two cells of one
split can be compared user by user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mufasa_rec.evaluation.ranks import gains

LONG_HISTORY = 200  # events
_SAMPLES = 1000


@dataclass(frozen=True)
class Cell:
    """Ranks of one run.

    Attributes:
        user: Users, `[Q]` int64, ascending.
        target_row: Item row of each target, `[Q]`.
        rank: Mid-rank of each target, `[Q]`.
        history_length: Events before each target, `[Q]`.
        seconds: Training and ranking.
    """

    user: np.ndarray
    target_row: np.ndarray
    rank: np.ndarray
    history_length: np.ndarray
    seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A variant beside the rule, over the users of a slice and the seeds that both have.

    Attributes:
        users: Users of the slice.
        seeds: Seeds of the variant.
        hr: Mean HR@10 of the variant.
        ndcg: Mean NDCG@10 of the variant.
        difference: Mean paired difference of NDCG@10, and its 95 % interval; None for the rule itself.
        ratio: The variant's NDCG@10 over the rule's, and its 95 % interval; None for the rule itself.
    """

    users: int
    seeds: int
    hr: float
    ndcg: float
    difference: tuple[float, float, float] | None = None
    ratio: tuple[float, float, float] | None = None


def compare(variant: Mapping[int, Cell], rule: Mapping[int, Cell] | None, *, min_history: int = 0) -> Comparison | None:
    """Compare the cells of a variant with those of the rule, by seed.

    Users are resampled, each with the mean of its differences over the seeds: the interval says what other users would
    have done, given these seeds.

    Args:
        variant: Cells by seed.
        rule: Cells by seed of what it is compared with; None for the rule itself.
        min_history: Fewest events before the target of the users that count.

    Returns:
        The comparison; None where no user counts.

    Raises:
        ValueError: When cells rank different users or targets.
    """
    first = next(iter(variant.values()))
    counts = first.history_length >= min_history
    if not counts.any():
        return None
    for cell in [*variant.values(), *(rule or {}).values()]:
        if not (np.array_equal(cell.user, first.user) and np.array_equal(cell.target_row, first.target_row)):
            raise ValueError("cells: they rank different users or targets; train and evaluate all on one split.")
    hr, ndcg = (np.mean([gains(cell.rank)[key][counts].mean() for cell in variant.values()]) for key in _KEYS)
    result = Comparison(int(counts.sum()), len(variant), float(hr), float(ndcg))
    seeds = sorted(variant.keys() & (rule or {}).keys())
    if rule is None or not seeds:
        return result
    mine, theirs = (_per_user([cells[seed] for seed in seeds], counts) for cells in (variant, rule))
    sampled = _resampled(np.stack([mine, theirs]))
    difference = (float((mine - theirs).mean()), *_interval(sampled[:, 0] - sampled[:, 1]))
    whole = max(float(theirs.mean()), 1e-12)
    ratio = (float(mine.mean()) / whole, *_interval(sampled[:, 0] / np.maximum(sampled[:, 1], 1e-12)))
    return Comparison(result.users, result.seeds, result.hr, result.ndcg, difference, ratio)


def markdown(variants: Mapping[str, Mapping[int, Cell]], rule: str) -> str:
    """The table of a grid, for all users and for those with a long history.

    Args:
        variants: Cells by variant and seed; variants without a cell are left out.
        rule: The variant that the others are compared with.

    Returns:
        Markdown.
    """
    lines = []
    for title, least in (("all users", 0), (f"users with {LONG_HISTORY} events and more", LONG_HISTORY)):
        rows = []
        for name, cells in variants.items():
            against = None if name == rule else variants.get(rule)
            found = compare(cells, against, min_history=least) if cells else None
            if found is not None:
                minutes = np.mean([cell.seconds for cell in cells.values()]) / 60
                rows.append((name, found, minutes))
        if not rows:
            continue
        lines += [f"### {title} ({rows[0][1].users:,})", ""]
        lines.append(f"| variant | seeds | HR@10 | NDCG@10 | difference to {rule} | ratio to {rule} | minutes |")
        lines.append("|---|---|---|---|---|---|---|")
        lines += [_line(name, found, minutes) for name, found, minutes in rows]
        lines.append("")
    return "\n".join(lines)


_KEYS = ("hr@10", "ndcg@10")


def _per_user(cells: Sequence[Cell], counts: np.ndarray) -> np.ndarray:
    """Mean NDCG@10 of each user that counts, over cells."""
    return np.mean([gains(cell.rank)["ndcg@10"][counts] for cell in cells], axis=0)


def _resampled(values: np.ndarray) -> np.ndarray:
    """Means `[samples, n]` of `values [n, Q]` over users drawn with replacement, the same for each row."""
    rng = np.random.default_rng(0)
    users = values.shape[1]
    return np.stack([values[:, rng.integers(0, users, users)].mean(axis=1) for _ in range(_SAMPLES)])


def _interval(values: np.ndarray) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _line(name: str, found: Comparison, minutes: float) -> str:
    difference, ratio = "–", "–"
    if found.difference is not None and found.ratio is not None:
        difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*found.difference)
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*found.ratio)
    return f"| {name} | {found.seeds} | {found.hr:.4f} | {found.ndcg:.4f} | {difference} | {ratio} | {minutes:.1f} |"
