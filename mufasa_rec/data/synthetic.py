"""A generated catalog with planted interests at several time scales, and the oracle that knows them.

It exists so that a clone can show the whole way, from raw events to ranked items, with nothing beside it, and so that a
model can be compared with the best that *any* model could do: the generator knows the true distribution of every user's
last event and ranks it by the same rules as everybody else.

What is planted:

- **A long-lived taste.** A user has a repertoire of topics from a few genres. A topic is a ring of items that is
  walked in order; the place in the ring is remembered over sessions.
- **Sessions.** A session has a few active topics and jumps between them, seldom staying in one. So the next item
  continues a topic that was left some events ago, which a first-order Markov chain cannot see.
- **Drift.** Now and then a topic of the repertoire is replaced for good.
- **Content.** A title vector says the topic and the place in its ring (so "the next one" is a linear map of it); an
  image vector says the genre only, is noisy, and is missing for many items.
- **Returns** (an option, off in the demo). Each session keeps to one genre of the user's, so a genre that was left
  comes back after many other events, and its topics go on where they were: what comes next lies far back, beyond any
  short window, and the session's first event says where to look.
- **Scattered interests** (an option, off in the demo). A user's many topics take turns in no order, so most were
  left longer ago than a short window reaches, and each goes on where it was left.
- **Cold items.** Some items are released just before every user's last event: no training event can reach them, only
  their content says where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_DAY_MS = 86_400_000
_GENRES = (
    "Harbour Mystery",
    "Desert Western",
    "Glass Opera",
    "Winter Comedy",
    "Orbital Drama",
    "Garden Romance",
    "Neon Thriller",
    "River Western",
    "Paper Animation",
    "Night Documentary",
    "Copper Fantasy",
    "Salt Adventure",
)
_WORDS = ("Lantern", "Orchard", "Signal", "Compass", "Velvet", "Ember", "Meridian", "Sparrow", "Tide", "Anvil")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Sizes and probabilities of the generated catalog; the defaults are the demo's.

    Attributes:
        num_users: Users.
        num_genres: Genres, at most 12.
        topics_per_genre: Topics in a genre.
        items_per_topic: Items on a topic's ring.
        cold_topic_share: Share of the topics with one item that is released just before the users' last events.
        mean_events: Mean number of events of a user (log-normal, clipped to [10, 4 x mean]).
        repertoire: Topics that a user keeps for long.
        active_topics: Topics between which one session jumps.
        stay: Probability that an event stays in the topic of the event before.
        step: Parameter of the geometric step along the ring (the next unseen item has this probability).
        noise: Probability that an event is a draw by popularity instead.
        session_end: Probability that an event begins a new session.
        drift: Probability that a new session replaces one topic of the repertoire.
        topics_per_session_genre: Topics that a repertoire holds of each of its genres, when every session keeps to one
            genre; 0 for sessions over the whole repertoire. The repertoire is then this times a number of genres, and
            drift must be 0.
        image_missing: Share of items without an image vector.
        start_ms: First day, milliseconds UTC.
        num_days: Days between the first event and the release of the cold items.
    """

    num_users: int = 4_000
    num_genres: int = 10
    topics_per_genre: int = 8
    items_per_topic: int = 25
    cold_topic_share: float = 0.5
    mean_events: int = 60
    repertoire: int = 8
    active_topics: int = 3
    stay: float = 0.2
    step: float = 0.85
    noise: float = 0.03
    session_end: float = 0.02
    drift: float = 0.4
    topics_per_session_genre: int = 0
    image_missing: float = 0.3
    start_ms: int = 1_767_225_600_000
    num_days: int = 90

    def __post_init__(self) -> None:
        if not 1 <= self.num_genres <= len(_GENRES):
            raise ValueError(f"num_genres={self.num_genres}: choose 1 to {len(_GENRES)}.")
        if self.active_topics > self.repertoire or self.repertoire > self.num_topics:
            raise ValueError(
                f"active_topics={self.active_topics}, repertoire={self.repertoire}, topics={self.num_topics}: "
                "each must be at most the next one."
            )
        if 4 * self.mean_events >= self.num_items - self.num_topics:
            raise ValueError(
                f"mean_events={self.mean_events}: a user may have four times as many, which must be fewer than the "
                f"{self.num_items - self.num_topics} items that are not cold; lower it or raise items_per_topic."
            )
        if not 0.0 <= self.cold_topic_share <= 1.0:
            raise ValueError(f"cold_topic_share={self.cold_topic_share}: choose 0 to 1.")
        if self.topics_per_session_genre:
            self._check_returns()

    def _check_returns(self) -> None:
        """Check what sessions of one genre need: every topic of a repertoire must be equally likely to begin one."""
        per_genre = self.topics_per_session_genre
        if not self.active_topics <= per_genre <= self.topics_per_genre:
            raise ValueError(
                f"topics_per_session_genre={per_genre}: choose active_topics={self.active_topics} to topics_per_genre="
                f"{self.topics_per_genre}, or 0."
            )
        if self.repertoire % per_genre or self.repertoire // per_genre > self.num_genres:
            raise ValueError(
                f"repertoire={self.repertoire}: choose topics_per_session_genre={per_genre} times at most num_genres="
                f"{self.num_genres}."
            )
        if self.drift:
            raise ValueError(f"drift={self.drift}: choose 0 when topics_per_session_genre is given.")

    @property
    def num_topics(self) -> int:
        """Number of topics of the catalog."""
        return self.num_genres * self.topics_per_genre

    @property
    def num_items(self) -> int:
        """Number of items of the catalog, cold ones included."""
        return self.num_topics * self.items_per_topic


# Six genres of four topics for each user, sessions of ten events: a genre comes back after some 60 events of others.
RETURNS = SyntheticConfig(
    num_users=3_000,
    topics_per_genre=5,
    mean_events=200,
    repertoire=24,
    active_topics=4,
    stay=0.05,
    noise=0.02,
    session_end=0.1,
    drift=0.0,
    topics_per_session_genre=4,
)

# Ten topics take turns at random: the last seven events, all that two layers with a window of four reach, visit five.
SCATTERED = SyntheticConfig(mean_events=100, repertoire=10, active_topics=10, stay=0.0, session_end=0.0, drift=0.0)


@dataclass(frozen=True, kw_only=True)
class SyntheticCatalog:
    """What the generator hands to ``prepare``.

    Attributes:
        user: User id of every event, `[n]` int64, each user's events in order.
        item: Item id of every event, `[n]` int64.
        timestamp: Milliseconds UTC, `[n]` int64.
        item_id: Items of the catalog, `[items]` int64.
        title: Their titles.
        genres: Their genres, one list per item.
        available_from: Release time, `[items]` int64 milliseconds UTC.
        vectors: Per modality the item ids that have it and their vectors, `[k]` and `[k, P]` float32.
        oracle_user: Users of the oracle row, `[users]`.
        oracle_rank: Mid-rank of each user's last event under the true distribution, seen items masked, `[users]`.
        oracle_top: The ten likeliest unseen items of each user, best first, `[users, 10]` item ids.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    item_id: np.ndarray
    title: list[str]
    genres: list[list[str]]
    available_from: np.ndarray
    vectors: dict[str, tuple[np.ndarray, np.ndarray]]
    oracle_user: np.ndarray
    oracle_rank: np.ndarray
    oracle_top: np.ndarray


class _World:
    """The fixed part: topics, their popularity, which items are cold."""

    def __init__(self, config: SyntheticConfig, rng: np.random.Generator) -> None:
        topics, ring = config.num_topics, config.items_per_topic
        self.topic_weight = rng.permutation(1.0 / np.arange(1, topics + 1) ** 0.75)
        has_cold = rng.random(topics) < config.cold_topic_share
        self.cold = has_cold[:, None] & (np.arange(ring) == rng.integers(0, ring, topics)[:, None])  # [topics, ring]
        jitter = rng.lognormal(0.0, 0.5, (topics, ring))
        popularity = self.topic_weight[:, None] * jitter
        self.popularity = (popularity / popularity.sum()).reshape(-1)  # [items]


class _Users:
    """The moving part: what every user remembers. One row per user; all users advance together."""

    def __init__(self, config: SyntheticConfig, world: _World, rng: np.random.Generator) -> None:
        self.config, self.world, self.rng = config, world, rng
        n, topics, ring = config.num_users, config.num_topics, config.items_per_topic
        self.genres = np.argsort(rng.random((n, config.num_genres)), axis=1)[:, :3]
        self.pointer = rng.integers(0, ring, (n, topics))
        self.seen = np.zeros((n, topics, ring), dtype=bool)
        self.repertoire = self._draw_repertoire()  # [n, R]
        self.active = np.zeros((n, config.active_topics), dtype=np.int64)
        self.last = np.zeros(n, dtype=np.int64)  # place of the last event's topic in `active`
        self.begin_sessions(np.arange(n))

    def _taste(self) -> np.ndarray:
        """Weight of every topic for every user, `[n, topics]`: favourite genres count twelvefold."""
        favourite = np.zeros((len(self.genres), self.config.num_genres))
        np.put_along_axis(favourite, self.genres, 1.0, axis=1)
        per_topic = np.repeat(favourite, self.config.topics_per_genre, axis=1)
        return self.world.topic_weight[None] * (1.0 + 11.0 * per_topic)

    def _draw_repertoire(self) -> np.ndarray:
        """Topics that every user keeps, `[n, R]`; with sessions of one genre those of a genre side by side."""
        config, count = self.config, self.config.topics_per_session_genre
        if not count:
            return self._draw_topics(self._taste(), config.repertoire)
        genres = np.argsort(self.rng.random((len(self.genres), config.num_genres)), axis=1)
        genres = genres[:, : config.repertoire // count]
        weight = np.tile(self.world.topic_weight, (len(genres), 1))
        keys = (np.log(weight) + self.rng.gumbel(size=weight.shape)).reshape(len(genres), config.num_genres, -1)
        best = np.argsort(-keys, axis=2)[:, :, :count]
        topics = best + np.arange(config.num_genres)[:, None] * config.topics_per_genre
        return np.take_along_axis(topics, genres[:, :, None], axis=1).reshape(len(genres), -1)

    def _draw_topics(self, weight: np.ndarray, count: int) -> np.ndarray:
        """Draw `count` different topics per row with probability by weight (Gumbel top-k)."""
        keys = np.log(weight) + self.rng.gumbel(size=weight.shape)
        return np.argsort(-keys, axis=1)[:, :count]

    def begin_sessions(self, who: np.ndarray) -> None:
        """Let the users `who` begin a session: perhaps drift, then choose active topics from the repertoire."""
        config, rng = self.config, self.rng
        drifting = who[rng.random(len(who)) < config.drift]
        if len(drifting):
            weight = self._taste()[drifting]
            np.put_along_axis(weight, self.repertoire[drifting], 1e-12, axis=1)
            place = rng.integers(0, config.repertoire, len(drifting))
            self.repertoire[drifting, place] = self._draw_topics(weight, 1)[:, 0]
        key = rng.random((len(who), config.repertoire))
        if config.topics_per_session_genre:  # others than the chosen genre's come last
            genre = rng.integers(0, config.repertoire // config.topics_per_session_genre, (len(who), 1))
            key += np.arange(config.repertoire) // config.topics_per_session_genre != genre
        places = np.argsort(key, axis=1)[:, : config.active_topics]
        self.active[who] = np.take_along_axis(self.repertoire[who], places, axis=1)
        self.last[who] = rng.integers(0, config.active_topics, len(who))

    def step_weights(self, who: np.ndarray, topic: np.ndarray, released: bool) -> np.ndarray:
        """Probability of each ring place of `topic` as the next item, `[k, ring]`; zero rows when exhausted."""
        ring = self.config.items_per_topic
        places = (self.pointer[who, topic][:, None] + 1 + np.arange(ring)) % ring  # in walking order
        free = ~np.take_along_axis(self.seen[who, topic], places, axis=1)
        if not released:
            free &= ~self.world.cold[topic[:, None], places]
        order = np.cumsum(free, axis=1) - 1
        weight = np.where(free, (1.0 - self.config.step) ** order, 0.0)
        total = weight.sum(axis=1, keepdims=True)
        weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
        result = np.zeros_like(weight)
        np.put_along_axis(result, places, weight, axis=1)
        return result

    def topic_probabilities(self, who: np.ndarray) -> np.ndarray:
        """Probability that the next event of a going session is in each active topic, `[k, active]`."""
        others = (1.0 - self.config.stay) / (self.config.active_topics - 1)
        chance = np.full((len(who), self.config.active_topics), others)
        np.put_along_axis(chance, self.last[who][:, None], self.config.stay, axis=1)
        return chance

    def popular(self, who: np.ndarray, released: bool) -> np.ndarray:
        """Probability of every unseen available item by popularity, `[k, items]`."""
        free = ~self.seen[who].reshape(len(who), -1)
        if not released:
            free &= ~self.world.cold.reshape(1, -1)
        weight = self.world.popularity[None] * free
        return weight / weight.sum(axis=1, keepdims=True)

    def advance(self, who: np.ndarray, released: bool) -> np.ndarray:
        """Draw the next event of the users `who` and remember it; returns items, `[k]`."""
        config, rng, ring = self.config, self.rng, self.config.items_per_topic
        self.begin_sessions(who[rng.random(len(who)) < config.session_end])
        place = _choose(self.topic_probabilities(who), rng)
        topic = self.active[who, place]
        step = self.step_weights(who, topic, released)
        random = (rng.random(len(who)) < config.noise) | (step.sum(axis=1) == 0)
        item = topic * ring + _choose(step, rng)
        if random.any():
            item[random] = _choose(self.popular(who[random], released), rng)
        self.last[who] = np.where(random, self.last[who], place)
        topic, position = item // ring, item % ring
        self.seen[who, topic, position] = True
        self.pointer[who, topic] = position
        return item

    def next_distribution(self, who: np.ndarray) -> np.ndarray:
        """The true distribution of the last event (cold items released) of the users `who`, `[k, items]`."""
        config, ring = self.config, self.config.items_per_topic
        going = (1.0 - config.noise) * (1.0 - config.session_end)
        fresh = (1.0 - config.noise) * config.session_end / config.repertoire
        result = config.noise * self.popular(who, True)
        rows = np.arange(len(who))[:, None]
        chance = self.topic_probabilities(who)
        plans = [(self.active[who, a], going * chance[:, a]) for a in range(config.active_topics)]
        plans += [(self.repertoire[who, r], np.full(len(who), fresh)) for r in range(config.repertoire)]
        for topic, share in plans:
            step = self.step_weights(who, topic, True)
            columns = topic[:, None] * ring + np.arange(ring)
            result[rows, columns] += share[:, None] * step
            result += (share * (step.sum(axis=1) == 0))[:, None] * self.popular(who, True)
        return result


def _choose(probability: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one column per row of `[k, n]` weights; rows that sum to zero give column 0."""
    cumulative = np.cumsum(probability, axis=1)
    draw = rng.random((len(probability), 1)) * cumulative[:, -1:]
    return np.minimum((cumulative <= draw).sum(axis=1), probability.shape[1] - 1)


def _rank_oracle(score: np.ndarray, seen: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mid-rank of `target [k]` and the ten best columns, seen items masked; `score`, `seen` are `[k, items]`."""
    score = np.where(seen, -np.inf, score)
    mine = np.take_along_axis(score, target[:, None], axis=1)
    rank = 1.0 + (score > mine).sum(axis=1) + 0.5 * ((score == mine).sum(axis=1) - 1)
    return rank, np.argsort(-score, axis=1, kind="stable")[:, :10]


def _events(
    config: SyntheticConfig, users: _Users, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Walk all users to their last event; returns users and items per step, oracle ranks and oracle lists."""
    mean = config.mean_events
    length = np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6, config.num_users), 10, 4 * mean).astype(np.int64)
    who_steps, item_steps = [], []
    for step in range(int(length.max()) - 1):
        who = np.flatnonzero(length - 1 > step)
        who_steps.append(who)
        item_steps.append(users.advance(who, released=False))
    rank = np.empty(config.num_users)
    top = np.empty((config.num_users, 10), dtype=np.int64)
    for who in np.array_split(np.arange(config.num_users), max(1, config.num_users // 500)):
        score = users.next_distribution(who)
        seen = users.seen[who].reshape(len(who), -1).copy()
        item = users.advance(who, released=True)
        rank[who], top[who] = _rank_oracle(score, seen, item)
        who_steps.append(who)
        item_steps.append(item)
    return who_steps, item_steps, rank, top


def _timestamps(config: SyntheticConfig, user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Times of events sorted by user: days of sessions in order, every last event just after the release, `[n]`."""
    release = config.start_ms + config.num_days * _DAY_MS
    starts = np.flatnonzero(np.r_[True, user[1:] != user[:-1]])
    ends = np.r_[starts[1:], len(user)]
    gap = rng.exponential(1.0, len(user)) * np.where(rng.random(len(user)) < config.session_end, 400.0, 1.0)
    total = np.cumsum(gap)
    first, last = np.repeat(total[starts], ends - starts), np.repeat(total[ends - 2], ends - starts)
    share = (total - first) / np.maximum(last - first, 1e-9)
    begin = np.repeat(rng.random(len(starts)) * 0.6, ends - starts) * config.num_days * _DAY_MS
    time = config.start_ms + begin + share * (config.num_days * _DAY_MS - begin - 60_000)
    time[ends - 1] = release + rng.integers(1_000, _DAY_MS, len(ends))
    return time.astype(np.int64)


def _content(config: SyntheticConfig, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Title and image vectors: see the module docstring for what each says."""
    topics, ring, genres = config.num_topics, config.items_per_topic, config.num_genres
    items = config.num_items
    topic, position = np.arange(items) // ring, np.arange(items) % ring
    genre = topic // config.topics_per_genre
    centre = (
        rng.normal(size=(topics, 40))
        + 0.7 * rng.normal(size=(genres, 40))[np.arange(topics) // config.topics_per_genre]
    )
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    angle = 2 * np.pi * position / ring
    place = np.stack([f(k * angle) for k in (1, 3) for f in (np.cos, np.sin)], axis=1) * 0.8
    mixing = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    flat = np.concatenate([centre[topic], place, np.zeros((items, 20))], axis=1) + 0.03 * rng.normal(size=(items, 64))
    title = flat @ mixing
    image = rng.normal(size=(genres, 32))[genre] + 1.0 * rng.normal(size=(items, 32))
    has_image = np.flatnonzero(rng.random(items) >= config.image_missing)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (title, image)]
    ids = np.arange(items, dtype=np.int64) + 1
    return {
        "title": (ids, unit[0].astype(np.float32)),
        "image": (ids[has_image], unit[1][has_image].astype(np.float32)),
    }


def _titles(config: SyntheticConfig) -> tuple[list[str], list[list[str]]]:
    """Readable titles and genre lists of all items, in the order of their ids."""
    titles, genres = [], []
    for topic in range(config.num_topics):
        genre = _GENRES[topic // config.topics_per_genre]
        word = _WORDS[topic % config.topics_per_genre % len(_WORDS)]
        for position in range(config.items_per_topic):
            titles.append(f"{genre}: The {word}, part {position + 1}")
            genres.append(genre.split())
    return titles, genres


def generate(seed: int, config: SyntheticConfig | None = None) -> SyntheticCatalog:
    """Generate a catalog, its events and the oracle's ranks; the same seed and config give the same bytes.

    Args:
        seed: Seed of everything that is drawn.
        config: Sizes and probabilities; the demo's when None.

    Returns:
        The catalog, events sorted by user and time.

    Example:
        >>> catalog = generate(0, SyntheticConfig(num_users=20, mean_events=12))
        >>> len(catalog.item_id), len(catalog.oracle_rank)
        (2000, 20)
    """
    config = config or SyntheticConfig()
    rng = np.random.default_rng([seed, 20_251_120])
    world = _World(config, rng)
    users = _Users(config, world, rng)
    who_steps, item_steps, rank, top = _events(config, users, rng)
    user, item = np.concatenate(who_steps), np.concatenate(item_steps)
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    titles, genres = _titles(config)
    release = config.start_ms + config.num_days * _DAY_MS
    return SyntheticCatalog(
        user=user + 1,
        item=item + 1,
        timestamp=_timestamps(config, user, rng),
        item_id=np.arange(config.num_items, dtype=np.int64) + 1,
        title=titles,
        genres=genres,
        available_from=np.where(world.cold.reshape(-1), release, config.start_ms),
        vectors=_content(config, rng),
        oracle_user=np.arange(config.num_users, dtype=np.int64) + 1,
        oracle_rank=rank,
        oracle_top=top + 1,
    )
