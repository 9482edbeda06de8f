"""Named runs: functions that return a configuration. `--preset <name>` starts from one, every field can be overridden."""

from __future__ import annotations

from collections.abc import Callable

from mufasa_rec.config import RunConfig
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.distributed.sharding import TableOptimizerConfig
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.modules.full_attention import FullAttentionConfig
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.trainer import TrainerConfig


def demo() -> RunConfig:
    """A few minutes on two cores: what `make demo` trains."""
    return RunConfig(
        data=DataConfig(batch_size=128, max_history=64),
        model=RetrieverConfig(width=64, extractor=FullAttentionConfig(dropout=0.1)),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.05), warmup_steps=50
        ),
        trainer=TrainerConfig(epochs=12, max_steps=600, patience=3),
    )


def ml_1m() -> RunConfig:
    """Quality on MovieLens-1M within 45 minutes on two cores."""
    return RunConfig(
        data=DataConfig(batch_size=128, max_history=200),
        model=RetrieverConfig(width=64, extractor=FullAttentionConfig(dropout=0.2)),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.05), warmup_steps=200
        ),
        trainer=TrainerConfig(epochs=60, validate_every=2, patience=6),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"default": RunConfig, "demo": demo, "ml-1m": ml_1m}


def preset(name: str) -> RunConfig:
    """Return a preset by name.

    Raises:
        ValueError: For an unknown name; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]()
