"""Generated impressions with a planted rule for clicks, and the true click probabilities.

A page shows some candidates; each is clicked or not. What is planted:

- **The distribution decides.** A past click *supports* a candidate when it is close to it in one modality, but not a
  near copy of it in another. What counts is the share of supporting clicks: some support raises the chance of a click,
  too much lowers it again. Neither the mean nor the largest similarity says where on that curve a candidate stands.
- **The context switches.** On the surface `search` closeness is that of titles, on `gallery` that of images, so one
  cosine of the vectors together does not do. `audio` never matters.
- **Behaviour by behaviour.** Close here *and* not close there is a property of a single past click, and recent clicks
  count more than old ones: histograms of each modality alone see a blurred picture.
- **Ids say little.** There are many items, each shown a few times, and what is close to what is said by content alone.
- **Gaps.** Vectors are missing for some items (a past click or candidate without one is not close), and some items
  are released at the time where the test part begins.

Users and positions on the page also have small effects, which any model can learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mufasa_rec.data.synthetic_clicks_config import MODALITIES, SURFACES, ClicksConfig

_DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class Clicks:
    """What the generator hands to ``prepare``. `n` impressions, `k` clicks.

    Attributes:
        user: User of each impression, `[n]` int64, like all columns sorted by user, time and place on the page.
        item: Candidate, `[n]` int64.
        timestamp: Time of the page, `[n]` int64 milliseconds UTC.
        request: Number of the page, `[n]` int64.
        surface: Index into `SURFACES`, `[n]` int64.
        position: Place on the page, `[n]` int64.
        clicked: `[n]` bool.
        probability: True probability of that click, `[n]` float64: what no model can know better.
        click_user: User of each past click, those of the pages included, `[k]` int64.
        click_item: `[k]` int64.
        click_timestamp: `[k]` int64 milliseconds UTC, strictly after the page of the click.
        item_id: Items of the catalog, `[items]` int64.
        available_from: Release time, `[items]` int64 milliseconds UTC.
        vectors: Per modality the item ids that have it and their vectors.
        test_from: Where the cold items are released and the test part begins, milliseconds UTC.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    request: np.ndarray
    surface: np.ndarray
    position: np.ndarray
    clicked: np.ndarray
    probability: np.ndarray
    click_user: np.ndarray
    click_item: np.ndarray
    click_timestamp: np.ndarray
    item_id: np.ndarray
    available_from: np.ndarray
    vectors: dict[str, tuple[np.ndarray, np.ndarray]]
    test_from: int

    def oracle_auc(self) -> float:
        """AUC of the true probabilities over all impressions."""
        return auc(self.probability, self.clicked)


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Probability that a positive is scored above a negative, ties counting half.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
        0.875
    """
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positives = int(np.sum(label))
    pairs = positives * (len(label) - positives)
    return float((rank[np.asarray(label) > 0].sum() - positives * (positives + 1) / 2) / pairs)


class _Items:
    """The catalog: clusters, vectors, what is missing, what is cold."""

    def __init__(self, config: ClicksConfig, rng: np.random.Generator) -> None:
        n, clusters = config.num_items, config.clusters
        cluster = rng.integers(0, clusters, (len(MODALITIES), n))
        cluster[1] = np.where(rng.random(n) < config.same_cluster, cluster[0], cluster[1])
        self.cluster = cluster  # [M, n]
        self.present = rng.random((len(MODALITIES), n)) >= np.asarray(config.missing)[:, None]
        self.vectors = [
            _vectors(part, width, clusters, config.noise, rng)
            for part, width in zip(cluster, config.widths, strict=True)
        ]
        self.cold = np.zeros(n, bool)
        self.cold[rng.permutation(n)[: int(n * config.cold_share)]] = True
        self._shelves: dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]] = {}
        for modality in (0, 1):
            for cold in (False, True):
                members = np.flatnonzero(self.cold == cold)
                order = members[np.argsort(cluster[modality, members], kind="stable")]
                ends = np.searchsorted(cluster[modality, order], np.arange(clusters + 1))
                self._shelves[modality, cold] = order, ends

    def draw(self, modality: int, cluster: np.ndarray, cold: bool, rng: np.random.Generator) -> np.ndarray:
        """A random item of each cluster of a modality, in the shape of `cluster`."""
        order, ends = self._shelves[modality, cold]
        size = np.maximum(ends[cluster + 1] - ends[cluster], 1)
        return order[np.minimum(ends[cluster] + (rng.random(cluster.shape) * size).astype(np.int64), len(order) - 1)]

    def close(self, modality: int, candidate: np.ndarray, past: np.ndarray, least: float) -> np.ndarray:
        """Whether candidates `[u, c]` are close to past clicks `[u, h]`, `[u, c, h]` bool."""
        vectors, present = self.vectors[modality], self.present[modality]
        cosine = np.matmul(vectors[candidate], vectors[past].transpose(0, 2, 1))
        return (cosine > least) & present[candidate][:, :, None] & present[past][:, None, :]


def _vectors(cluster: np.ndarray, width: int, clusters: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors around the centres of their clusters, `[n, width]` float32."""
    centre = rng.normal(size=(clusters, width))
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    vectors = centre[cluster] + noise * rng.normal(size=(len(cluster), width)) / np.sqrt(width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@dataclass
class _Users:
    """What the users have clicked so far: `count[u]` filled places of each row."""

    item: np.ndarray  # [u, places]
    time: np.ndarray  # [u, places]
    count: np.ndarray  # [u]
    inclination: np.ndarray  # [u]
    log: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, who: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
        """Append clicks, at most one per user."""
        self.item[who, self.count[who]], self.time[who, self.count[who]] = item, time
        self.count[who] += 1
        self.log.append((who, item, time))


def _begin(config: ClicksConfig, items: _Items, rng: np.random.Generator) -> _Users:
    """Users with their early clicks, each from a few clusters that draw by the title or by the image."""
    n, (low, high) = config.num_users, config.early_clicks
    places = high + config.requests * config.candidates
    users = _Users(
        item=np.zeros((n, places), np.int64),
        time=np.zeros((n, places), np.int64),
        count=np.zeros(n, np.int64),
        inclination=rng.normal(0.0, config.user_effect, n),
    )
    taste = rng.integers(0, config.clusters, (n, 4))
    number = rng.integers(low, high + 1, n)
    time = config.start_ms - 1 - np.sort(rng.integers(0, config.num_days * _DAY_MS, (n, high)), axis=1)[:, ::-1]
    for step in range(high):
        who = np.flatnonzero(number > step)
        modality = rng.integers(0, 2, len(who))
        cluster = taste[who, rng.integers(0, 4, len(who))]
        drawn = np.stack([items.draw(m, cluster, False, rng) for m in (0, 1)])
        users.add(who, np.take_along_axis(drawn, modality[None], 0)[0], time[who, step])
    return users


def _candidates(
    config: ClicksConfig, items: _Items, users: _Users, released: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The items on everybody's next page, `[u, c]`: some close to a past click, some cold where they are released."""
    n, c = config.num_users, config.candidates
    place = (rng.random((n, c)) * users.count[:, None]).astype(np.int64)
    like = np.take_along_axis(users.item, place, axis=1)
    chosen = rng.integers(0, config.num_items, (n, c))
    related, modality = rng.random((n, c)) < config.related, rng.integers(0, 2, (n, c))
    for m in (0, 1):
        # A random cluster in place of the past click's: an unrelated candidate.
        near = np.where(related, items.cluster[m, like], items.cluster[m, chosen])
        for cold in (False, True):
            wanted = (rng.random((n, c)) < 0.3) & released[:, None] if cold else modality == m
            drawn = items.draw(m, near, cold, rng)
            chosen = np.where((modality == m) & wanted, drawn, chosen)
    return chosen


def _probability(
    config: ClicksConfig, items: _Items, users: _Users, candidate: np.ndarray, now: np.ndarray, surface: np.ndarray
) -> np.ndarray:
    """True click probability of every candidate, `[u, c]`: see the module docstring."""
    most = int(users.count.max())
    past = users.item[:, :most]
    exists = np.arange(most) < users.count[:, None]
    recent = now[:, None] - users.time[:, :most] <= config.recent_days * _DAY_MS
    weight = np.where(recent, 1.0, config.old_weight) * exists  # [u, h]
    near = [items.close(m, candidate, past, config.close) for m in (0, 1)]
    gallery = (surface == 1)[:, None, None]
    supports = np.where(gallery, near[1] & ~near[0], near[0] & ~near[1])
    share = (supports * weight[:, None]).sum(axis=2) / weight.sum(axis=1)[:, None]
    relative = share / config.best_share
    support = relative * np.exp(1.0 - relative)  # 1 at the best share, falling on both sides
    place = config.position_effect * np.arange(config.candidates)
    logit = config.base + config.gain * support - place + users.inclination[:, None]
    return 1.0 / (1.0 + np.exp(-logit))


def generate_clicks(seed: int, config: ClicksConfig | None = None) -> Clicks:
    """Generate impressions, clicks and true probabilities; the same seed and config give the same bytes.

    Args:
        seed: Seed of everything that is drawn.
        config: Sizes and probabilities; the demo's when None.

    Example:
        >>> clicks = generate_clicks(0, ClicksConfig(num_users=50, num_items=600, requests=4))
        >>> len(clicks.item), bool(clicks.oracle_auc() > 0.6)
        (1000, True)
    """
    config = config or ClicksConfig()
    rng = np.random.default_rng([seed, 20_251_121])
    items = _Items(config, rng)
    users = _begin(config, items, rng)
    n, c, pages = config.num_users, config.candidates, config.requests
    # At least a minute between two pages of a user, and a click follows its page within half of one.
    spare = config.num_days * _DAY_MS - pages * 60_000
    times = config.start_ms + np.sort(rng.integers(0, spare, (n, pages)), axis=1) + 60_000 * np.arange(pages)
    test_from = int(np.quantile(times, 1.0 - config.test_share, method="higher"))
    shown: dict[str, list[np.ndarray]] = {name: [] for name in ("item", "surface", "clicked", "probability")}
    for page in range(pages):
        now, surface = times[:, page], rng.integers(0, len(SURFACES), n)
        candidate = _candidates(config, items, users, now >= test_from, rng)
        probability = _probability(config, items, users, candidate, now, surface)
        clicked = rng.random((n, c)) < probability
        for place in range(c):
            who = np.flatnonzero(clicked[:, place])
            users.add(who, candidate[who, place], now[who] + 1_000 * (place + 1) + rng.integers(0, 1_000, len(who)))
        values = (candidate, np.repeat(surface[:, None], c, axis=1), clicked, probability)
        for name, value in zip(shown, values, strict=True):
            shown[name].append(value)
    columns = {name: np.stack(values, axis=1).reshape(-1) for name, values in shown.items()}  # by user, page, place
    log = [np.concatenate(part) for part in zip(*users.log, strict=True)]
    order = np.lexsort((log[2], log[0]))
    ids = np.arange(config.num_items, dtype=np.int64) + 1
    return Clicks(
        user=np.repeat(np.arange(n, dtype=np.int64) + 1, pages * c),
        item=columns["item"] + 1,
        timestamp=np.repeat(times.reshape(-1), c),
        request=np.repeat(np.arange(n * pages, dtype=np.int64), c),
        surface=columns["surface"],
        position=np.tile(np.arange(c, dtype=np.int64), n * pages),
        clicked=columns["clicked"],
        probability=columns["probability"],
        click_user=log[0][order] + 1,
        click_item=log[1][order] + 1,
        click_timestamp=log[2][order],
        item_id=ids,
        available_from=np.where(items.cold, test_from, config.start_ms - config.num_days * _DAY_MS),
        vectors={
            name: (ids[has], vectors[has]) for name, has, vectors in zip(MODALITIES, items.present, items.vectors)
        },
        test_from=test_from,
    )
