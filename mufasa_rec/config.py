"""A run's configuration: the dataclasses that sit beside the code they configure, composed, saved and read back.

What depends on the data (features, cardinalities, modalities, widths) is not here but in the data set's `dataset.json`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import dacite
import yaml

from mufasa_rec.data import paths
from mufasa_rec.data.loader import DataConfig
from mufasa_rec.distributed.content_config import ContentConfig
from mufasa_rec.distributed.id_policy import IdPolicyConfig, IdsConfig
from mufasa_rec.distributed.sharding_config import ShardingConfig
from mufasa_rec.distributed.table_config import TablesConfig
from mufasa_rec.models.ranker_config import RankerConfig
from mufasa_rec.models.retriever import RetrieverConfig
from mufasa_rec.training.optim import OptimizerConfig
from mufasa_rec.training.saver import CheckpointConfig
from mufasa_rec.training.trainer_config import MONITORS, TrainerConfig
from mufasa_rec.training.warm_start_plan import WarmStartConfig

CONFIG_FILE = "config.yaml"
Task = Literal["retrieval", "ranking"]
# What may differ when a run is continued: it moves no weight and no row of the steps that were done.
CHANGEABLE = (
    "data.dataset",
    "data.prefetch",
    "content.placement",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.patience",
    "trainer.log_every",
    "checkpoint",
    *(f"sharding.{name}" for name in ("types", "kernels", "cache_share", "min_columns", "tables", "prefetch", "plan")),
    "sharding.ssd_folder",
    "threads",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run that is not in its data set.

    Attributes:
        task: What is trained: a retriever of next items, or a ranker of impressions.
        data: What is read, and in which batches.
        model: The retriever; a ranking run does not read it.
        ranker: The ranker; a retrieval run does not read it.
        optimizer: How weights are updated.
        trainer: How long, and with what care.
        checkpoint: When the run is saved, and where.
        ids: How raw ids find their rows, by feature.
        tables: What the trained tables are made of, and how single ones learn.
        content: Where content vectors lie, and in which precision.
        sharding: How tables are spread over ranks.
        warm_start: What a new run starts from instead of random weights.
        mask_seen: Whether evaluation masks items that a user has seen; None takes the data set's default (masked
            unless more than 1 % of targets are repeats).
        seed: Seed of weights, data order, negatives and dropout.
        threads: Torch threads of a process on a CPU.
    """

    task: Task = "retrieval"
    data: DataConfig = field(default_factory=DataConfig)
    model: RetrieverConfig = field(default_factory=RetrieverConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ids: IdsConfig = field(default_factory=IdsConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    content: ContentConfig = field(default_factory=ContentConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    mask_seen: bool | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}: choose 1 or more.")
        if self.task not in MONITORS:
            raise ValueError(f"task={self.task!r}: choose one of {', '.join(MONITORS)}.")
        if self.task == "retrieval" and self.ids.user != IdPolicyConfig():
            raise ValueError(
                f"ids.user.policy={self.ids.user.policy!r}: a retriever has no table of users; leave ids.user out, or "
                "choose task: ranking."
            )
        if self.trainer.monitor not in MONITORS[self.task]:
            raise ValueError(
                f"trainer.monitor={self.trainer.monitor!r}: task {self.task!r} is judged by "
                f"{', '.join(MONITORS[self.task])}; choose one of them."
            )
        self.content.refuse_rounding(
            {
                "sharding.forward_comms": self.sharding.forward_comms,
                "sharding.group_size": self.sharding.group_size,
                "tables.output_dtype": self.tables.output_dtype,
            }
        )

    @property
    def uses_content(self) -> bool:
        """Whether the model of the task reads content vectors."""
        return self.ranker.content_interest != "none" if self.task == "ranking" else self.model.use_content


def save_config(config: RunConfig, folder: paths.Location) -> None:
    """Write `config.yaml` into a run folder."""
    text = yaml.safe_dump(as_plain(dataclasses.asdict(config)), sort_keys=False)
    with paths.atomic_write(paths.join(folder, CONFIG_FILE)) as path:
        path.write_text(text)


def load_config(file: paths.Location, base: RunConfig | None = None) -> RunConfig:
    """Read a configuration; what the file leaves out is taken from `base`.

    Args:
        file: A YAML file of nested fields, or one that a run saved.
        base: Defaults; those of `RunConfig` when None.

    Raises:
        ValueError: For an unknown field (with the nearest known one), a wrong type or a refused value; names the file.
    """
    with paths.open_file(file, "rb") as handle:
        given = yaml.safe_load(handle) or {}
    if not isinstance(given, dict):
        raise ValueError(
            f"{file}: holds {type(given).__name__}, not fields; write lines such as `data: {{batch_size: 256}}`."
        )
    merged = merge_fields(as_plain(dataclasses.asdict(base or RunConfig())), given, str(file), "")
    try:
        return dacite.from_dict(RunConfig, merged, dacite.Config(strict=True, cast=[tuple, float]))
    except (dacite.DaciteError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def refuse_changes(saved: RunConfig, now: RunConfig, folder: paths.Location) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Args:
        saved: Configuration of the run in `folder`.
        now: Configuration that it is to be continued with.
        folder: The run folder.

    Raises:
        ValueError: Names the fields with both values.
    """
    changed = [
        f"{name} is {old!r} there and {new!r} now"
        for name, old, new in field_differences(
            as_plain(dataclasses.asdict(saved)), as_plain(dataclasses.asdict(now)), ""
        )
        if not any(name == field or name.startswith(f"{field}.") for field in CHANGEABLE)
    ]
    if changed:
        more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"--run {folder}: already holds a run with other settings: {'; '.join(changed[:5])}{more}. Choose another "
            "folder, or continue that run with its own settings: give --run alone."
        )


def field_differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of every field in which two configurations differ, both as `as_plain` gives them."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from field_differences(before, value, f"{prefix}{name}.")
        elif value != before:
            yield f"{prefix}{name}", before, value


def merge_fields(base: dict[str, Any], given: dict[str, Any], file: str, prefix: str) -> dict[str, Any]:
    """`base` with the fields of `given` in place of its own.

    Args:
        base: All fields, as `as_plain` gives them.
        given: Some of them.
        file: Where they are from, for messages.
        prefix: Path of `base` in the whole configuration, with a dot behind.

    Raises:
        ValueError: For an unknown field (with the nearest known one), or a value in place of a group.
    """
    result = dict(base)
    for name, value in given.items():
        if name not in base:
            near = difflib.get_close_matches(str(name), base, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known fields: {', '.join(base)}."
            raise ValueError(f"{file}: {prefix}{name} is not a field; {hint}")
        nested = isinstance(base[name], dict) and bool(base[name])  # an empty one holds names of the user's
        if nested and not isinstance(value, dict):
            raise ValueError(f"{file}: {prefix}{name}={value!r} must be a group of fields: {', '.join(base[name])}.")
        result[name] = merge_fields(base[name], value, file, f"{prefix}{name}.") if nested else value
    return result


def as_plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what YAML knows."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_plain(item) for item in value]
    return value
