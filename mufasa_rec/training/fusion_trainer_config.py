"""How long the fusion layer is trained, and with what care."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FusionTrainerConfig:
    """How long, and with what care.

    Attributes:
        batch_size: Items of a batch of all ranks; the losses compare all of them with one another.
        epochs: Most epochs; one is as many batches as hold the catalog once.
        max_steps: Most steps; None for no bound.
        log_every: Steps between accounting lines.
        validate_every: Epochs between validations on the held-out items.
        patience: Validations without a lower loss before training stops; 0 never stops early.
        holdout: Share of the items that are held out.
        max_mined: Most items among which near duplicates across genres are mined; it costs the square.
    """

    batch_size: int = 1024
    epochs: int = 100
    max_steps: int | None = None
    log_every: int = 10
    validate_every: int = 1
    patience: int = 10
    holdout: float = 0.05
    max_mined: int = 20_000

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "validate_every", "max_mined"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: choose 1 or more.")
        if self.batch_size < 4:
            raise ValueError(f"trainer.batch_size={self.batch_size}: choose 4 or more; the losses compare its items.")
        if self.patience < 0:
            raise ValueError(f"trainer.patience={self.patience}: choose 0 (never stop early) or more.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"trainer.max_steps={self.max_steps}: choose 1 or more, or None for no bound.")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"trainer.holdout={self.holdout}: choose at least 0 and below 1.")
