"""The manifests of a prepared data set: ``dataset.json`` and ``splits/<id>/split.json``.

What depends on the data (features, cardinalities, modalities, widths, time, splits) is not configuration: ``prepare``
measures it, writes it here, and every later program reads it from here. The published form is ``dataset.schema.json``
beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mufasa_rec.data import paths
from mufasa_rec.data.manifest_json import from_json, json_schema, load_json, save_json

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
SPLIT_FILE = "split.json"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class TimeInfo:
    """What the event times of the data set mean."""

    absolute: bool  # False: only the order is known; there is no timestamp column
    timezone: str | None = None  # of naive local times in the source; stored times are always UTC
    minimum_ms: int | None = None
    maximum_ms: int | None = None


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One column: of events (a list per user) or of items."""

    level: Literal["event", "item"]
    kind: Literal["id", "categorical", "action", "weight", "label"]
    id_policy: Literal["vocabulary", "hash", "managed_collision"] | None = None
    id_type: Literal["int64", "string"] = "int64"  # of the source; strings are stored as their hash
    multi_valued: bool = False
    cardinality: int = 0  # distinct values; codes are 1..cardinality, 0 is missing or unknown


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One folder of events and its rows in each split."""

    name: str
    users: int
    events: int


@dataclass(frozen=True, kw_only=True)
class ItemStoreRef:
    """The pinned generation of the item store."""

    generation: str
    count: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class ContentRef:
    """The pinned generation of one content modality."""

    generation: str
    width: int
    dtype: Literal["float16", "int8"]
    rows: int
    checksum: str
    coverage: dict[str, float] = field(
        default_factory=dict
    )  # shares without a vector: missing_items, missing_training_events, missing_test_targets


@dataclass(frozen=True, kw_only=True)
class SplitRef:
    """A split and the hash that every artefact learned from it carries."""

    id: str
    hash: str
    layout: Literal["references", "lists"] = "references"
    rows: Literal["targets", "requests"] = "targets"  # next events to predict, or impressions with labels


@dataclass(frozen=True, kw_only=True)
class DenseInfo:
    """A number of each impression, as the training part has it: what it is standardised with."""

    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class ImpressionsInfo:
    """What is known of impressions: items that were shown in requests, and what came of it."""

    tasks: list[str]
    requests: int
    impressions: int
    users: int  # with training impressions
    rates: dict[str, float]  # share of positive labels in the training part, by task
    context: dict[str, int] = field(default_factory=dict)  # distinct values; codes are 1..n, 0 is missing
    dense: dict[str, DenseInfo] = field(default_factory=dict)
    weighted: bool = False  # whether impressions have a weight in the loss
    negative_rate: float = 1.0  # share of its negatives that the source kept


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """Size of one part of a split."""

    rows: int
    targets: int


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """``split.json``: how a split was made, and what it was made from."""

    id: str
    policy: Literal["leave_one_out", "time", "external", "impressions"]
    hash: str  # sha256 over policy, borders and row files
    events_hash: str  # sha256 over the event files; empty when rows carry their own lists
    parts: dict[str, PartInfo]
    files: dict[str, str]  # sha256 of each row file, by path relative to the split's folder
    borders: dict[str, int] = field(default_factory=dict)  # milliseconds UTC: validation, test
    targets_per_row: int | None = None

    @classmethod
    def load(cls, folder: paths.Location, split: str) -> SplitManifest:
        """Reads the manifest of ``split`` in the data set at ``folder``."""
        url = paths.join(folder, "splits", split, SPLIT_FILE)
        return from_json(cls, load_json(url), url)

    def save(self, folder: paths.Location) -> None:
        """Writes it into the data set at ``folder``."""
        save_json(self, paths.join(folder, "splits", self.id, SPLIT_FILE))


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """``dataset.json``: everything about a data set that a program needs to know before it reads a row."""

    format_version: int
    name: str
    created_by: str
    time: TimeInfo
    features: dict[str, Feature]
    partitions: list[Partition]
    buckets: int
    items: ItemStoreRef
    content: dict[str, ContentRef]
    splits: dict[str, SplitRef]
    tie_rule: str
    repeat_share: float
    mask_seen_default: bool
    impressions: ImpressionsInfo | None = None
    statistics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: paths.Location) -> DatasetManifest:
        """Reads ``dataset.json`` of the data set at ``folder``.

        Raises:
            ValueError: The file is missing, of another format version, or not as the schema says; names file and key.
        """
        url = paths.join(folder, DATASET_FILE)
        document = load_json(url)
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{url}: format_version is {version!r}, this program reads {FORMAT_VERSION}; prepare the data set again"
            )
        return from_json(cls, document, url)

    def save(self, folder: paths.Location) -> None:
        """Writes ``dataset.json`` into ``folder``."""
        save_json(self, paths.join(folder, DATASET_FILE))

    def split(self, name: str) -> SplitRef:
        """The split called ``name``; a ``ValueError`` lists those there are."""
        if name not in self.splits:
            reason = (
                ""
                if self.time.absolute or name != "time"
                else " (the data has no absolute times, which a time split needs)"
            )
            raise ValueError(
                f"split {name!r} is not in data set {self.name!r}{reason}; there are: {', '.join(self.splits)}"
            )
        return self.splits[name]

    def item_categoricals(self) -> dict[str, Feature]:
        """Categorical features of items, by name."""
        return {name: f for name, f in self.features.items() if f.level == "item" and f.kind == "categorical"}

    def event_categoricals(self) -> dict[str, Feature]:
        """Categorical features of events, by name."""
        return {name: f for name, f in self.features.items() if f.level == "event" and f.kind == "categorical"}


def published_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schemas that are published beside this file, by file name."""
    return {
        "dataset.schema.json": json_schema(DatasetManifest, "dataset.json of a prepared data set"),
        "split.schema.json": json_schema(SplitManifest, "split.json of a split"),
    }
