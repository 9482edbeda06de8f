"""Named runs: functions that return a configuration. `--preset NAME` starts from one; any field can be overridden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mufasa_rec.config import RunConfig
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.data.negatives import NegativesConfig
from mufasa_rec.distributed.table_config import TableOptimizerConfig, TablesConfig
from mufasa_rec.models.ranker_config import RankerConfig
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.modules.similarity_interest import SimilarityInterestConfig
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig
from mufasa_rec.ops.sparse_attention.pattern import SparsePattern
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.trainer_config import TrainerConfig


def demo() -> RunConfig:
    """Two minutes on two cores: what `make demo` trains.

    Wide for its depth: on the generated catalog the width must hold several interests at once.
    """
    return RunConfig(
        data=DataConfig(batch_size=64, max_history=64),
        model=RetrieverConfig(
            width=128,
            id_dropout=0.3,
            attention="sparse",
            extractor=SparseAttentionConfig(num_heads=4, dropout=0.1),
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=50, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.01)
        ),
        trainer=TrainerConfig(epochs=12, max_steps=400, validate_every=3, patience=3),
    )


def ml_1m() -> RunConfig:
    """Quality on MovieLens-1M within 45 minutes on two cores, by full attention over 200 events."""
    return RunConfig(
        data=DataConfig(batch_size=64, max_history=200),
        model=RetrieverConfig(width=128, extractor=SparseAttentionConfig(num_heads=4, dropout=0.2)),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=200, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.03)
        ),
        trainer=TrainerConfig(epochs=30, validate_every=3, patience=3),
    )


def ml_1m_long() -> RunConfig:
    """MovieLens-1M with histories of 512 events, of which sparse attention reads a fraction."""
    base = ml_1m()
    extractor = replace(base.model.extractor, pattern=SparsePattern(window=64, block=8, num_selected=8))
    return replace(
        base,
        data=replace(base.data, max_history=512),
        model=replace(base.model, attention="sparse", extractor=extractor),
    )


def short() -> RunConfig:
    """Under five minutes on two cores on MovieLens-1M: what the tables of the interest extractor are made with."""
    return RunConfig(
        data=DataConfig(batch_size=32, num_readers=32, max_history=512),
        model=RetrieverConfig(width=64, attention="sparse", extractor=SparseAttentionConfig(dropout=0.1)),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=100, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.03)
        ),
        trainer=TrainerConfig(epochs=3, validate_every=3, patience=0),
    )


def brief() -> RunConfig:
    """Two to three minutes in one process on MovieLens-1M: comparisons of content, 100 events of full attention."""
    return RunConfig(
        data=DataConfig(batch_size=64, max_history=100),
        model=RetrieverConfig(width=64, extractor=SparseAttentionConfig(dropout=0.1)),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=100, tables=TableOptimizerConfig(name="adagrad", learning_rate=0.03)
        ),
        trainer=TrainerConfig(epochs=3, validate_every=1, patience=0),
    )


def demo_ranking() -> RunConfig:
    """A minute in two processes on two cores on generated impressions: what `make demo TASK=ranking` trains."""
    return RunConfig(
        task="ranking",
        data=DataConfig(split="impressions", batch_size=128, max_history=64),
        ranker=RankerConfig(width=16, dmae=SimilarityInterestConfig(width=16), hidden=(64, 32)),
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=50),
        trainer=TrainerConfig(epochs=2, max_steps=450, patience=0, monitor="auc"),
    )


def ranking() -> RunConfig:
    """Comparisons of rankers on real impressions of the size of MovieLens latest-small."""
    return RunConfig(
        task="ranking",
        data=DataConfig(split="impressions", batch_size=256, max_history=50),
        ranker=RankerConfig(
            width=16, dmae=SimilarityInterestConfig(width=16, dropout=0.1), hidden=(64, 32), dropout=0.1
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        trainer=TrainerConfig(epochs=4, patience=1, monitor="auc"),
    )


def billion() -> RunConfig:
    """Long histories over a catalog of billions, for a thousand GPUs: what `plan` shows, and a start for such a run."""
    return RunConfig(
        data=DataConfig(
            batch_size=65_536,
            max_history=2048,
            negatives=NegativesConfig(softmax="sampled", num_uniform=65_536, num_inbatch=65_536),
        ),
        model=RetrieverConfig(
            width=128,
            attention="sparse",
            extractor=SparseAttentionConfig(
                num_layers=4,
                num_heads=4,
                pattern=SparsePattern(window=256, block=64, num_selected=8),
                recompute=True,
            ),
        ),
        optimizer=OptimizerConfig(warmup_steps=1000, tables=TableOptimizerConfig(learning_rate=0.02)),
        tables=TablesConfig(output_dtype="fp16"),
        trainer=TrainerConfig(epochs=1, bf16=True),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "default": RunConfig,
    "demo": demo,
    "ml-1m": ml_1m,
    "ml-1m-long": ml_1m_long,
    "short": short,
    "brief": brief,
    "demo-ranking": demo_ranking,
    "ranking": ranking,
    "billion": billion,
}


def preset(name: str) -> RunConfig:
    """Return a preset by name.

    Raises:
        ValueError: For an unknown name; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]()
