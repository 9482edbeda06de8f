"""Sizes and probabilities of the generated impressions."""

from __future__ import annotations

from dataclasses import dataclass

SURFACES = ("search", "gallery")
MODALITIES = ("title", "image", "audio")


@dataclass(frozen=True, kw_only=True)
class ClicksConfig:
    """Sizes and probabilities; the defaults are the demo's.

    Attributes:
        num_users: Users.
        num_items: Items, cold ones included.
        requests: Pages that each user opens.
        candidates: Items on a page.
        early_clicks: Least and most clicks of a user before the first page.
        clusters: Clusters of each modality.
        same_cluster: Share of items whose image cluster goes with the title cluster.
        widths: Width of the vectors of `title`, `image`, `audio`.
        noise: Length of the noise on a cluster's centre, which has length 1.
        missing: Share of items without a vector, by modality.
        cold_share: Share of items that are released where the test part begins.
        test_share: Share of the pages from there on.
        close: Cosine above which two items are close.
        related: Probability that a candidate is close to a past click in title or image.
        recent_days: Age up to which a click is recent.
        old_weight: Weight of an older click beside a recent one's 1.
        best_share: Share of supporting clicks at which a click is likeliest.
        base: Logit of a click without support.
        gain: What the best share of support adds.
        position_effect: What each place further down the page takes away.
        user_effect: Standard deviation of the users' own inclination.
        start_ms: Time of the first page, milliseconds UTC.
        num_days: Days over which pages are opened; early clicks lie as many days before.
    """

    num_users: int = 2_000
    num_items: int = 6_000
    requests: int = 24
    candidates: int = 5
    early_clicks: tuple[int, int] = (8, 24)
    clusters: int = 12
    same_cluster: float = 0.65
    widths: tuple[int, int, int] = (32, 24, 16)
    noise: float = 0.5
    missing: tuple[float, float, float] = (0.02, 0.15, 0.4)
    cold_share: float = 0.1
    test_share: float = 0.1
    close: float = 0.5
    related: float = 0.6
    recent_days: float = 4.0
    old_weight: float = 0.05
    best_share: float = 0.15
    base: float = -2.4
    gain: float = 4.0
    position_effect: float = 0.1
    user_effect: float = 0.2
    start_ms: int = 1_767_225_600_000
    num_days: int = 30

    def __post_init__(self) -> None:
        low, high = self.early_clicks
        if not 1 <= low <= high:
            raise ValueError(f"early_clicks={self.early_clicks}: choose 1 <= least <= most.")
        for name in ("same_cluster", "cold_share", "test_share", "related"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: choose at least 0 and below 1.")
        if not 0.0 < self.old_weight <= 1.0:
            raise ValueError(f"old_weight={self.old_weight}: choose above 0, at most 1.")
        if self.num_items * self.cold_share < 2 * self.clusters:
            raise ValueError(f"num_items={self.num_items}: too few for cold items in {self.clusters} clusters.")
