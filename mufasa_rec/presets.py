"""Named runs: functions that return a configuration. `--preset NAME` starts from one; any field can be overridden."""

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
    """Two minutes on two cores: what `make demo` trains.

    Wide for its depth: on the generated catalog the width must hold several interests at once.
    """
    return RunConfig(
        data=DataConfig(batch_size=64, max_history=64),
        model=RetrieverConfig(width=128, id_dropout=0.3, extractor=FullAttentionConfig(num_heads=4, dropout=0.1)),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=50, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.01)
        ),
        trainer=TrainerConfig(epochs=12, max_steps=800, validate_every=3, patience=3),
    )


def ml_1m() -> RunConfig:
    """Quality on MovieLens-1M within 45 minutes on two cores."""
    return RunConfig(
        data=DataConfig(batch_size=64, max_history=200),
        model=RetrieverConfig(width=128, extractor=FullAttentionConfig(num_heads=4, dropout=0.2)),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=200, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.03)
        ),
        trainer=TrainerConfig(epochs=30, validate_every=3, patience=3),
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
