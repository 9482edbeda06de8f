"""What a ranker is made of: its configuration, what the data must tell it, and the rows of the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mufasa_rec.modules.similarity_interest import SimilarityInterestConfig
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig

ContentInterest = Literal["none", "dmae", "sal", "dmae+sal", "simtier", "early_fusion"]
ROWS = ("din", "simtier", "early_fusion", "dmae", "dmae_without_mieu", "dmae_without_mifu", "dmae_without_midu")


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """The ranker.

    Attributes:
        width: Width `E` of embeddings.
        content_interest: What reads content: ``dmae`` (similarity interest), ``sal`` (attention over the history, with
            the candidate as its last query), both, ``simtier`` or ``early_fusion`` (rivals of DMAE), or ``none``.
        use_id_interest: Whether events are weighed for the candidate by their ids (DIN).
        dmae: Sizes and units of DMAE, which its rivals take their sizes from.
        attention: What SAL reads the history with: ``full`` or ``sparse`` attention.
        sal: Size of SAL.
        num_gap_buckets: Buckets of the time gap between events in SAL (base-2 seconds), 0 for none.
        hidden: Widths of the over-arch's hidden layers.
        dropout: Probability of dropping a channel of a hidden layer.
        distribution_weight: Weight of MIDU's loss.
        task_weights: Weight of each task in the loss, 1 where none is given.
        dims: Width of tables that have another than `width`: features of requests and context, by their whole names
            (``user``, ``context.hour``); a multiple of 4.
        init_std: Standard deviation of the tables' initial weights.
    """

    width: int = 32
    content_interest: ContentInterest = "dmae"
    use_id_interest: bool = True
    dmae: SimilarityInterestConfig = field(default_factory=SimilarityInterestConfig)
    attention: Literal["full", "sparse"] = "full"
    sal: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    num_gap_buckets: int = 24
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    distribution_weight: float = 0.1
    task_weights: dict[str, float] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ValueError(f"ranker.width={self.width}: choose a positive multiple of 4, as FBGEMM's tables want.")
        if self.content_interest not in get_args(ContentInterest):
            raise ValueError(
                f"ranker.content_interest={self.content_interest!r}: choose one of {get_args(ContentInterest)}."
            )
        if self.attention not in ("full", "sparse"):
            raise ValueError(f"ranker.attention={self.attention!r}: choose 'full' or 'sparse'.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ranker.dropout={self.dropout}: choose at least 0 and below 1.")
        for name in ("num_gap_buckets", "distribution_weight", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"ranker.{name}={getattr(self, name)}: choose 0 or more.")
        for name, dim in self.dims.items():
            if dim < 4 or dim % 4:
                raise ValueError(
                    f"ranker.dims[{name!r}]={dim}: choose a positive multiple of 4, as FBGEMM's tables want."
                )
        for task, weight in self.task_weights.items():
            if weight < 0:
                raise ValueError(f"ranker.task_weights[{task!r}]={weight}: choose 0 or more.")


@dataclass(frozen=True, kw_only=True)
class RankingFeatures:
    """What the data has; no configuration.

    Attributes:
        item: Item categoricals, and whether they are multi-valued.
        event: Event categoricals.
        request: Features with one id per request, by their whole names (``user``).
        context: Features with one id per candidate, `context.<name>`.
        modalities: Width of each content modality's vectors.
        num_dense: Numbers known about each candidate.
        tasks: Names of the tasks.
        num_actions: Action codes of the events, `unknown` included; 0 when the data has none.
        has_time: Whether events and requests have absolute times.
        max_history: Most events of a history.
    """

    item: Mapping[str, bool] = field(default_factory=dict)
    event: tuple[str, ...] = ()
    request: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    modalities: Mapping[str, int] = field(default_factory=dict)
    num_dense: int = 0
    tasks: tuple[str, ...] = ("click",)
    num_actions: int = 0
    has_time: bool = False
    max_history: int = 200

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: none; name the labels that are to be predicted.")


def comparator(config: RankerConfig, row: str) -> RankerConfig:
    """The configuration of a row of the comparison, everything else as in `config`.

    Args:
        config: The ranker with DMAE.
        row: One of `ROWS`.

    Raises:
        ValueError: For an unknown row.

    Example:
        >>> comparator(RankerConfig(), "din").content_interest
        'none'
        >>> comparator(RankerConfig(), "dmae_without_mifu").dmae.use_mifu
        False
    """
    if row not in ROWS:
        raise ValueError(f"row={row!r}: unknown; choose one of {', '.join(ROWS)}.")
    if row == "din":
        return replace(config, content_interest="none", use_id_interest=True)
    if row in ("simtier", "early_fusion"):
        return replace(config, content_interest=row)
    unit = row.removeprefix("dmae").removeprefix("_without_")
    without: dict[str, Any] = {f"use_{unit}": False} if unit else {}
    dmae = replace(config.dmae, **without)
    return replace(config, content_interest="dmae", dmae=dmae)
