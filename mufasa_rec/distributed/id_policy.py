"""How raw ids of a feature find their rows: by a vocabulary, by hash, or in a bounded table that admits and evicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Policy = Literal["vocabulary", "hash", "managed_collision"]
Method = Literal["sorted", "multi_probe"]
Eviction = Literal["lfu", "lru", "distance_lfu"]
MOST_BUCKETS = 1024  # TorchRec's limit
_MOST_SALTS = 8


@dataclass(frozen=True, kw_only=True)
class ManagedIdsConfig:
    """Who is admitted to a managed table, who must leave, and where all others are looked up.

    Attributes:
        method: How an id's row is found. ``sorted``: ids lie sorted and rounds of admission are held, on any device
            (TorchRec's MCH). ``multi_probe``: by probing from the id's hash on, admitted as it comes (TorchRec's
            MPZCH); trains on GPUs only, with eviction ``lru`` and `min_count` 1.
        eviction: Who leaves when all rows are taken: the least frequent (``lfu``), the least recent (``lru``), or the
            one with the smallest count over its distance in steps to the power of `decay` (``distance_lfu``).
        min_count: Times that a new id must be seen within one interval to be admitted.
        interval: Steps between two rounds of admission and eviction; with ``multi_probe``, steps for which an id that
            was seen keeps its row.
        decay: Exponent of ``distance_lfu``.
        fallback_share: Share of the rows that ids without one of their own are spread over, by hash; with
            ``multi_probe`` that is all of them, each also some id's own.
        buckets: Parts of the table that admit and evict each on its own, so that neither depends on the number of
            ranks: a power of two, and a multiple of every number of ranks that the run is to be loaded on.
        max_probe: Places that ``multi_probe`` looks at for an id.
    """

    method: Method = "sorted"
    eviction: Eviction = "distance_lfu"
    min_count: int = 1
    interval: int = 100
    decay: float = 1.0
    fallback_share: float = 0.05
    buckets: int = 64
    max_probe: int = 128

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"ids...managed.method={self.method!r}: choose one of {', '.join(get_args(Method))}.")
        if self.eviction not in get_args(Eviction):
            raise ValueError(
                f"ids...managed.eviction={self.eviction!r}: choose one of {', '.join(get_args(Eviction))}."
            )
        for name in ("min_count", "interval", "max_probe"):
            if getattr(self, name) < 1:
                raise ValueError(f"ids...managed.{name}={getattr(self, name)}: choose 1 or more.")
        if self.decay <= 0:
            raise ValueError(f"ids...managed.decay={self.decay}: choose above 0; for plain counts choose 'lfu'.")
        if not 0.0 < self.fallback_share < 1.0:
            raise ValueError(f"ids...managed.fallback_share={self.fallback_share}: choose above 0 and below 1.")
        if not 1 <= self.buckets <= MOST_BUCKETS or self.buckets & (self.buckets - 1):
            raise ValueError(f"ids...managed.buckets={self.buckets}: choose a power of two up to {MOST_BUCKETS}.")
        for name, only in (("eviction", "lru"), ("min_count", 1)):
            if self.method == "multi_probe" and getattr(self, name) != only:
                raise ValueError(
                    f"ids...managed.{name}={getattr(self, name)!r}: method 'multi_probe' admits at first sight and "
                    f"evicts the least recent; choose {only!r}, or method 'sorted'."
                )

    @property
    def row_bytes(self) -> int:
        """Bytes that are kept of a row beside its weights: its id, its place, and what eviction goes by.

        Example:
            >>> ManagedIdsConfig(eviction="lru").row_bytes, ManagedIdsConfig(eviction="distance_lfu").row_bytes
            (24, 32)
            >>> ManagedIdsConfig(method="multi_probe", eviction="lru").row_bytes
            12
        """
        if self.method == "multi_probe":
            return 12  # an id, and the step in which it was seen last
        return 8 * (4 if self.eviction == "distance_lfu" else 3)

    def fallback_rows(self, bucket_rows: int) -> int:
        """Rows of a bucket that no id has for its own.

        Example:
            >>> ManagedIdsConfig(fallback_share=0.05).fallback_rows(100)
            5
            >>> ManagedIdsConfig(method="multi_probe", eviction="lru").fallback_rows(100)
            0
        """
        if self.method == "multi_probe":
            return 0
        return min(max(round(bucket_rows * self.fallback_share), 1), bucket_rows - 1)

    def refuse_on(self, device_type: str, feature: str) -> None:
        """Refuse to train on a device that has no kernel for the method.

        Raises:
            ValueError: Names the field and what to choose instead.
        """
        if self.method == "multi_probe" and device_type == "cpu":
            raise ValueError(
                f"ids.{feature}.managed.method='multi_probe': FBGEMM's kernel gives rows to ids on GPUs only; choose "
                "'sorted' to train on a CPU."
            )

    def refuse_world(self, world_size: int, feature: str) -> None:
        """Refuse a number of ranks that the buckets cannot be dealt to.

        Raises:
            ValueError: Names the field and what to choose instead.
        """
        if self.buckets % world_size:
            raise ValueError(
                f"ids.{feature}.managed.buckets={self.buckets}: cannot be dealt to {world_size} ranks; take a number "
                "of ranks that divides it (a run keeps the buckets that it began with)."
            )


@dataclass(frozen=True, kw_only=True)
class IdPolicyConfig:
    """How the ids of one feature find their rows.

    Attributes:
        policy: ``vocabulary`` (ids with `data.min_count` training events have a row each, all others share one),
            ``hash`` (the row is a hash of the id), ``managed_collision`` (rows are given to ids as they come, and taken
            from those that fade); None for what `dataset.json` says.
        rows: Rows of the table; a vocabulary counts its own.
        salts: Hashes of an id; the rows of all of them are summed.
        managed: Admission and eviction, for ``managed_collision``.
    """

    policy: Policy | None = None
    rows: int = 1 << 20
    salts: int = 1
    managed: ManagedIdsConfig = field(default_factory=ManagedIdsConfig)

    def __post_init__(self) -> None:
        if self.policy not in (None, *get_args(Policy)):
            raise ValueError(f"ids...policy={self.policy!r}: choose one of {', '.join(get_args(Policy))}.")
        if self.rows < 2:
            raise ValueError(f"ids...rows={self.rows}: choose 2 or more; one is kept for what is unknown.")
        if not 1 <= self.salts <= _MOST_SALTS:
            raise ValueError(f"ids...salts={self.salts}: choose 1 to {_MOST_SALTS}.")
        buckets = self.managed.buckets
        if self.policy == "managed_collision" and (self.rows % buckets or self.rows < 2 * buckets):
            nearest = max(round(self.rows / buckets), 2) * buckets
            raise ValueError(
                f"ids...rows={self.rows}: {buckets} buckets (ids...managed.buckets) are to be equally large, of 2 rows "
                f"or more; choose {nearest}."
            )

    def chosen(self, policy: Policy | None) -> IdPolicyConfig:
        """The same with the data set's policy where this names none."""
        if self.policy is not None:
            return self
        return IdPolicyConfig(policy=policy or "vocabulary", rows=self.rows, salts=self.salts, managed=self.managed)


@dataclass(frozen=True, kw_only=True)
class IdsConfig:
    """Id policies by feature.

    Attributes:
        item: Of items.
        user: Of users, where the model has a table of them (ranking).
    """

    item: IdPolicyConfig = field(default_factory=IdPolicyConfig)
    user: IdPolicyConfig = field(default_factory=IdPolicyConfig)

    def refuse_on(self, device_type: str) -> None:
        """Refuse to train on a device that has no kernel for what is chosen.

        Raises:
            ValueError: Names the field and what to choose instead.
        """
        for name in ("item", "user"):
            own: IdPolicyConfig = getattr(self, name)
            if own.policy in (None, "managed_collision"):  # None: what the data set says
                own.managed.refuse_on(device_type, name)
