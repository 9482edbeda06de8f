"""Where content vectors lie while a model trains or scores, and in which precision: for all modalities and for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Placement = Literal["sharded", "host"]
ContentPrecision = Literal["fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class ContentSettings:
    """What differs for one modality; None takes what holds for all.

    Attributes:
        placement: Where its vectors lie.
        precision: Precision of its table.
    """

    placement: Placement | None = None
    precision: ContentPrecision | None = None


@dataclass(frozen=True, kw_only=True)
class ContentConfig:
    """Where content vectors lie.

    Attributes:
        placement: ``sharded`` spreads frozen rows over the ranks, each of which reads its own from the store. ``host``
            spreads nothing: the loader reads the vectors of a batch's items from the memory-mapped store, and they
            travel with the batch.
        precision: Precision of sharded rows: ``fp16``, as the store hands them out, or ``int8``, codes of 8 bits with
            a scale for each row. What travels with a batch is ``fp16``.
        each: What differs for single modalities, by name.
    """

    placement: Placement = "sharded"
    precision: ContentPrecision = "fp16"
    each: dict[str, ContentSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prefix, one in {"content": self, **{f"content.each[{name!r}]": s for name, s in self.each.items()}}.items():
            for name, known in (("placement", get_args(Placement)), ("precision", get_args(ContentPrecision))):
                if getattr(one, name) not in (None, *known):
                    raise ValueError(f"{prefix}.{name}={getattr(one, name)!r}: choose one of {', '.join(known)}.")
        for prefix, modality in {"content": "", **{f"content.each[{name!r}]": name for name in self.each}}.items():
            if self.placement_of(modality) == "host" and self.precision_of(modality) == "int8":
                raise ValueError(
                    f"{prefix}: placement 'host' with precision 'int8'; vectors that travel with a batch are fp16: "
                    "choose precision 'fp16', or placement 'sharded'."
                )

    def placement_of(self, modality: str) -> Placement:
        """Where a modality's vectors lie."""
        return self.each.get(modality, ContentSettings()).placement or self.placement

    def precision_of(self, modality: str) -> ContentPrecision:
        """Precision of a modality's rows."""
        return self.each.get(modality, ContentSettings()).precision or self.precision

    def on_host(self, modalities: Iterable[str]) -> tuple[str, ...]:
        """Those of some modalities that travel with the batch."""
        return tuple(name for name in modalities if self.placement_of(name) == "host")

    def refuse_unknown(self, modalities: Iterable[str]) -> None:
        """Refuse settings of modalities that are not used.

        Raises:
            ValueError: Names the modality, and those there are.
        """
        known = sorted(modalities)
        for name in self.each:
            if name not in known:
                raise ValueError(
                    f"content.each: {name!r} is no modality of this run; there are {', '.join(known) or 'none'}."
                )

    def refuse_rounding(self, roundings: Mapping[str, str | int | None]) -> None:
        """Refuse what would change codes on their way: they are the bits of numbers, and no other number is near.

        Args:
            roundings: Fields that say how looked-up vectors are treated, and their values.

        Raises:
            ValueError: For precision ``int8`` beside bf16 or averages over copies of tables.
        """
        if all(self.precision_of(name) == "fp16" for name in ("", *self.each)):
            return
        for name, value in roundings.items():
            if value == "bf16" or isinstance(value, int):
                raise ValueError(
                    f"{name}={value!r} changes the codes of content.precision='int8'; choose content.precision 'fp16', "
                    f"or leave {name} at its default."
                )
