"""How long a run trains, and with what care."""

from __future__ import annotations

from dataclasses import dataclass

# Validation metrics by task, all better when larger.
MONITORS = {"retrieval": ("hr@10", "ndcg@10", "mrr"), "ranking": ("auc", "gauc")}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, and with what care.

    Attributes:
        epochs: Most epochs.
        max_steps: Most steps; None for no bound.
        log_every: Steps between accounting lines.
        validate_every: Epochs between validations.
        patience: Validations without a better metric before training stops; 0 never stops early.
        monitor: Validation metric that decides which weights are the best.
        bf16: Run the data-parallel part under bf16 autocast.
    """

    epochs: int = 10
    max_steps: int | None = None
    log_every: int = 50
    validate_every: int = 1
    patience: int = 5
    monitor: str = "ndcg@10"
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: choose 1 or more.")
        known = [name for names in MONITORS.values() for name in names]
        if self.monitor not in known:
            raise ValueError(f"trainer.monitor={self.monitor!r}: choose one of {', '.join(known)}.")
        if self.patience < 0:
            raise ValueError(f"trainer.patience={self.patience}: choose 0 (never stop early) or more.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"trainer.max_steps={self.max_steps}: choose 1 or more, or None for no bound.")
