"""Tables of trained variants: mean metrics over seeds, and paired intervals against one of them.

A cell is one run: a variant with a seed, its metrics, and the rank of every user's target, so that any two cells of one
split can be compared user by user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mufasa_rec.evaluation.ranks import gains
from mufasa_rec.evaluation.summary import FEW_EVENTS

LONG_HISTORY = 200  # events
_SAMPLES = 1000
_KEYS = ("hr@10", "ndcg@10")
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Cell:
    """Ranks of one run.

    Attributes:
        user: Users, `[Q]` int64, ascending.
        target_row: Item row of each target, `[Q]`.
        rank: Mid-rank of each target, `[Q]`.
        history_length: Events before each target, `[Q]`.
        target_events: Training events of each target, `[Q]`.
        cold_rank: Mid-rank among the items without a training event, `[Q]`; NaN for a target that has one.
        cold_items: Number of those items.
        seconds: Training and ranking.
    """

    user: np.ndarray
    target_row: np.ndarray
    rank: np.ndarray
    history_length: np.ndarray
    target_events: np.ndarray = field(default_factory=lambda: np.empty(0))
    cold_rank: np.ndarray = field(default_factory=lambda: np.empty(0))
    cold_items: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Part:
    """Users who are looked at together.

    Attributes:
        title: What the table says of them, `{items}` standing for the number of cold items and `{chance}` for what a
            random order of them hits.
        users: Gives which users of a cell belong to it, `[Q]` bool.
        rank: Gives the ranks that count, `[Q]`.
    """

    title: str
    users: Callable[[Cell], np.ndarray]
    rank: Callable[[Cell], np.ndarray] = lambda cell: cell.rank


ALL = Part("all users", lambda cell: np.ones(len(cell.user), bool))
LONG = Part(f"users with {LONG_HISTORY} events and more", lambda cell: cell.history_length >= LONG_HISTORY)
RARE = Part(f"targets with at most {FEW_EVENTS} training events", lambda cell: _events(cell) <= FEW_EVENTS)
COLD = Part("targets without a training event", lambda cell: _events(cell) == 0)
AMONG_COLD = Part(
    "the same, ranked among the {items:,} items without a training event; a random order hits {chance:.4f}",
    lambda cell: _events(cell) == 0,
    lambda cell: cell.cold_rank,
)
PARTS = (ALL, LONG, RARE, COLD, AMONG_COLD)


def _events(cell: Cell) -> np.ndarray:
    """Training events of each target; a cell that was ranked before they were written down has none to tell."""
    return cell.target_events if len(cell.target_events) else np.full(len(cell.user), np.inf)


@dataclass(frozen=True)
class Comparison:
    """A variant beside the rule, over the users of a part and the seeds that both have.

    Attributes:
        users: Users of the part.
        seeds: Seeds of the variant.
        hr: Mean HR@10 of the variant.
        ndcg: Mean NDCG@10 of the variant.
        hr_difference: Mean paired difference of HR@10, and its 95 % interval; None for the rule itself.
        difference: The same of NDCG@10.
        ratio: The variant's NDCG@10 over the rule's, and its 95 % interval; None for the rule itself.
    """

    users: int
    seeds: int
    hr: float
    ndcg: float
    hr_difference: Interval | None = None
    difference: Interval | None = None
    ratio: Interval | None = None


def compare(variant: Mapping[int, Cell], rule: Mapping[int, Cell] | None, part: Part = ALL) -> Comparison | None:
    """Compare the cells of a variant with those of the rule, by seed.

    Users are resampled, each with the mean of its differences over the seeds: the interval says what other users would
    have done, given these seeds.

    Args:
        variant: Cells by seed.
        rule: Cells by seed of what it is compared with; None for the rule itself.
        part: The users that count.

    Returns:
        The comparison; None where no user counts.

    Raises:
        ValueError: When cells rank different users or targets.
    """
    first = next(iter(variant.values()))
    counts = part.users(first)
    if not counts.any():
        return None
    for cell in [*variant.values(), *(rule or {}).values()]:
        if not (np.array_equal(cell.user, first.user) and np.array_equal(cell.target_row, first.target_row)):
            raise ValueError("cells: they rank different users or targets; train and evaluate all on one split.")
    hr, ndcg = _per_user(list(variant.values()), part, counts).mean(axis=1)
    result = Comparison(int(counts.sum()), len(variant), float(hr), float(ndcg))
    seeds = sorted(variant.keys() & (rule or {}).keys())
    if rule is None or not seeds:
        return result
    both = np.stack([_per_user([cells[seed] for seed in seeds], part, counts) for cells in (variant, rule)])
    sampled = _resampled(both)  # [samples, variant and rule, HR and NDCG]
    mine, theirs = both.mean(axis=2)
    hr_difference, difference = (
        (float(mine[key] - theirs[key]), *_interval(sampled[:, 0, key] - sampled[:, 1, key])) for key in (0, 1)
    )
    whole = max(float(theirs[1]), 1e-12)
    ratio = (float(mine[1]) / whole, *_interval(sampled[:, 0, 1] / np.maximum(sampled[:, 1, 1], 1e-12)))
    return Comparison(result.users, result.seeds, result.hr, result.ndcg, hr_difference, difference, ratio)


def markdown(variants: Mapping[str, Mapping[int, Cell]], rule: str) -> str:
    """The table of a grid, in parts: all users, long histories, rare and cold targets, as far as there are some.

    Args:
        variants: Cells by variant and seed; variants without a cell are left out.
        rule: The variant that the others are compared with.

    Returns:
        Markdown.
    """
    lines = []
    for part in PARTS:
        rows = []
        for name, cells in variants.items():
            against = None if name == rule else variants.get(rule)
            found = compare(cells, against, part) if cells else None
            if found is not None:
                minutes = np.mean([cell.seconds for cell in cells.values()]) / 60
                rows.append((name, found, minutes))
        if not rows:
            continue
        cold = next((cell.cold_items for cells in variants.values() for cell in cells.values()), 0)
        title = part.title.format(items=cold, chance=min(10 / max(cold, 1), 1.0))
        lines += [f"### {title} ({rows[0][1].users:,})", ""]
        lines.append(
            f"| variant | seeds | HR@10 | difference to {rule} | NDCG@10 | difference to {rule} | ratio | minutes |"
        )
        lines.append("|---|---|---|---|---|---|---|---|")
        lines += [_line(name, found, minutes) for name, found, minutes in rows]
        lines.append("")
    return "\n".join(lines)


def _per_user(cells: Sequence[Cell], part: Part, counts: np.ndarray) -> np.ndarray:
    """Mean HR@10 and NDCG@10 over cells of each user that counts, `[2, users]`."""
    found = [gains(part.rank(cell)[counts]) for cell in cells]
    return np.stack([np.mean([gain[key] for gain in found], axis=0) for key in _KEYS])


def _resampled(values: np.ndarray) -> np.ndarray:
    """Means `[samples, ...]` of `values [..., Q]` over users drawn with replacement, the same for all of them."""
    rng = np.random.default_rng(0)
    users = values.shape[-1]
    return np.stack([values[..., rng.integers(0, users, users)].mean(axis=-1) for _ in range(_SAMPLES)])


def _interval(values: np.ndarray) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _line(name: str, found: Comparison, minutes: float) -> str:
    hr, ndcg = (
        "–" if one is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*one)
        for one in (found.hr_difference, found.difference)
    )
    ratio = "–" if found.ratio is None else "{:.3f} [{:.3f}, {:.3f}]".format(*found.ratio)
    return f"| {name} | {found.seeds} | {found.hr:.4f} | {hr} | {found.ndcg:.4f} | {ndcg} | {ratio} | {minutes:.1f} |"
