"""Configuration of a fusion run: dataclasses that sit beside the code they configure, composed, saved, read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dacite
import yaml

from mufasa_rec.config import CONFIG_FILE, as_plain, field_differences, merge_fields
from mufasa_rec.data import paths
from mufasa_rec.data.collaborative import BehaviourConfig
from mufasa_rec.modules.fusion import FusionConfig
from mufasa_rec.modules.fusion_objective import FusionObjectiveConfig
from mufasa_rec.training.fusion_trainer_config import FusionTrainerConfig
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.saver import CheckpointConfig

# What may differ when a run is continued: it moves no weight of the steps that were done.
CHANGEABLE = (
    "dataset", "output", "chunk", "threads", "report", "checkpoint",
    "trainer.epochs", "trainer.max_steps", "trainer.patience", "trainer.log_every",
)  # fmt: skip

# Names that a categorical of genres goes by, the likeliest first.
GENRES = ("genres", "genre", "categories", "category", "format")


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """Everything about a fusion run that is not in its data set.

    Attributes:
        dataset: Folder or URL of a prepared data set.
        split: Split whose training events may be looked at.
        modalities: Content modalities to fuse; None for all that were not learned from events.
        genre: Categorical of items that is the genre; None for one called genres, genre, categories, category or
            format, `none` for no genres.
        layer: The layer.
        objective: Its four losses.
        behaviour: What is learned from training events for the second.
        optimizer: How weights are updated; its `tables` are not used, there are none.
        trainer: How long, and with what care.
        checkpoint: When the run is saved, and where.
        output: Name of the modality that is written.
        chunk: Items of one forward pass when the catalog is encoded; a larger one leaves a CPU's cache.
        report: Whether the space is measured at the end, and shown as a page.
        seed: Seed of weights, batches, held-out items and dropout.
        threads: Torch threads of a process on a CPU.
    """

    dataset: str = ""
    split: str = "leave_one_out"
    modalities: tuple[str, ...] | None = None
    genre: str | None = None
    layer: FusionConfig = field(default_factory=FusionConfig)
    objective: FusionObjectiveConfig = field(default_factory=FusionObjectiveConfig)
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=20))
    trainer: FusionTrainerConfig = field(default_factory=FusionTrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: str = "fused"
    chunk: int = 1024
    report: bool = True
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("chunk", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more.")
        if self.modalities is not None and self.output in self.modalities:
            raise ValueError(f"output={self.output!r}: is one of the modalities that are fused; choose another name.")


def demo() -> FuseConfig:
    """Half a minute on two cores: what `make demo` fuses with."""
    return FuseConfig(
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        trainer=FusionTrainerConfig(batch_size=512, epochs=60, validate_every=5, patience=3),
    )


def short() -> FuseConfig:
    """At most a minute on two cores on MovieLens-1M: what ablation tables are made with.

    Wide: in 64 numbers sentence vectors of 384 lose more than the retriever gains by their fusion.
    """
    return FuseConfig(
        layer=FusionConfig(width=256),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
        trainer=FusionTrainerConfig(epochs=30, validate_every=5, patience=2),
    )


PRESETS: dict[str, Callable[[], FuseConfig]] = {"default": FuseConfig, "demo": demo, "short": short}


def preset(name: str) -> FuseConfig:
    """Return a preset by name.

    Raises:
        ValueError: For an unknown name; lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]()


def save_config(config: FuseConfig, folder: Path) -> None:
    """Write `config.yaml` into a run folder."""
    with paths.atomic_write(folder / CONFIG_FILE) as path:
        path.write_text(yaml.safe_dump(as_plain(dataclasses.asdict(config)), sort_keys=False))


def load_config(file: paths.Location, base: FuseConfig | None = None) -> FuseConfig:
    """Read a configuration; what the file leaves out is taken from `base`.

    Raises:
        ValueError: For an unknown field, a wrong type or a refused value; names the file.
    """
    with paths.open_file(file, "rb") as handle:
        given = yaml.safe_load(handle) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{file}: holds {type(given).__name__}, not fields; write lines such as `seed: 1`.")
    merged = merge_fields(as_plain(dataclasses.asdict(base or FuseConfig())), given, str(file), "")
    try:
        hooks: dict[Any, Any] = {Sequence[float]: tuple}  # YAML knows lists only
        return dacite.from_dict(FuseConfig, merged, dacite.Config(hooks, strict=True, cast=[tuple, float]))
    except (dacite.DaciteError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def refuse_changes(saved: FuseConfig, now: FuseConfig, folder: Path) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Raises:
        ValueError: Names the fields with both values.
    """
    both = (as_plain(dataclasses.asdict(saved)), as_plain(dataclasses.asdict(now)))
    changed = [
        f"{name} is {old!r} there and {new!r} now"
        for name, old, new in field_differences(*both, "")
        if not any(name == field or name.startswith(f"{field}.") for field in CHANGEABLE)
    ]
    if changed:
        raise ValueError(
            f"--run {folder}: already holds a run with other settings: {'; '.join(changed[:5])}. Choose another "
            "folder, or continue that run with its own settings: give --run alone."
        )
