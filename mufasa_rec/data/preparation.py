"""Rank 0's part of ``prepare``: the source, the items, the events and splits, the manifest and the report."""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from mufasa_rec.data import paths, raw, statistics
from mufasa_rec.data.catalog import Catalog, build_catalog, numeric_ids, same_id_type
from mufasa_rec.data.cold_items import choose_cold, released_later, without_training_events
from mufasa_rec.data.content import ContentStore, coverage
from mufasa_rec.data.event_files import PARTITION, Bucket, default_buckets, plan_buckets, write_events, write_rows
from mufasa_rec.data.events import TIE_RULE, EventLog, build_events, drop_nulls
from mufasa_rec.data.importers import read_source
from mufasa_rec.data.importers.values import flat, is_text
from mufasa_rec.data.manifest_json import load_json, save_json
from mufasa_rec.data.prepare_config import PrepareConfig
from mufasa_rec.data.prepare_report import REPORT_JSON, REPORT_TEXT, report_text
from mufasa_rec.data.raw import RawData
from mufasa_rec.data.schema import (
    DATASET_FILE,
    FORMAT_VERSION,
    ContentRef,
    DatasetManifest,
    ItemStoreRef,
    Partition,
    SplitManifest,
    SplitRef,
    TimeInfo,
)
from mufasa_rec.data.split_choice import make_splits
from mufasa_rec.data.split_hash import files_hash, split_hash
from mufasa_rec.data.splits import Split, training_counts

logger = logging.getLogger(__name__)
GENERATION = "1"
ORACLE_FILE = "oracle.safetensors"
CREATED_BY = "mufasa_rec.prepare 1"
MASK_SEEN_LIMIT = 0.01  # above this share of repeats among targets, seen items are not masked by default


@dataclass
class Shared:
    """What every rank needs to write its modalities."""

    folder: str
    vectors: dict[str, str | tuple[np.ndarray, np.ndarray]]
    item_ids: np.ndarray
    file_ids: np.ndarray | None


class Preparation:
    """What rank 0 knows and the others do not: the source, the events, the splits."""

    def __init__(self, config: PrepareConfig, stack: ExitStack) -> None:
        self.config, self.stack = config, stack
        self.started = time.monotonic()
        self.raw: RawData
        self.catalog: Catalog
        self.log: EventLog
        self.splits: list[Split] = []
        self.manifests: dict[str, SplitManifest] = {}
        self.dropped: dict[str, int] = {}
        self.not_made: dict[str, str] = {}
        self.item_checksum = self.events_hash = ""
        self.plan: list[Bucket] = []
        self.training_counts = self.test_counts = np.zeros(0, np.int64)  # events and targets per item

    def begin(self) -> Shared:
        """Reads the source, checks the target, writes the items."""
        config = self.config
        self.raw = self._read()
        logger.info("%s: %d events read", config.input, self.raw.events.num_rows)
        check_target(config.output, self.raw.fingerprint, config.overwrite)
        self._build()
        folder = self.stack.enter_context(paths.atomic_folder(config.output, overwrite=True))
        self.folder = folder
        self.item_checksum = self.catalog.write(str(folder), GENERATION)
        return Shared(str(folder), self.raw.vectors, self.catalog.ids, self.catalog.file_ids)

    def _read(self) -> RawData:
        config = self.config
        return read_source(
            config.input,
            config.columns,
            layout=config.layout,
            columns_file=config.columns_file,
            items=config.items,
            vectors=config.vectors,
        )

    def _build(self) -> None:
        """Cleans events, unites items, sorts, splits."""
        config = self.config
        events, dropped = drop_nulls(self.raw.events, config.max_null_share)
        self.dropped = dict(self.raw.dropped) | dropped
        if not events.num_rows:
            raise ValueError(
                f"{config.input}: no event is left, dropped were {self.dropped}; give data with users and items"
            )
        items = self.raw.items
        event_items, file_items = same_id_type(
            flat(events[raw.ITEM]), None if items is None else flat(items[raw.ITEM_ID])
        )
        if items is not None:
            items = items.set_column(items.column_names.index(raw.ITEM_ID), raw.ITEM_ID, file_items)
        self.catalog = build_catalog(items, self._item_ids(event_items), config.unknown_items)
        self.dropped |= self.catalog.dropped
        users, item_ids = numeric_ids(flat(events[raw.USER])), numeric_ids(event_items)
        events, users, item_ids = self._without_unknown(events, users, item_ids)
        self.log = build_events(
            events,
            users,
            item_ids,
            absolute_times=self.raw.absolute_times,
            drop_duplicates=config.drop_duplicates,
            sort_positions=config.sort_positions,
        )
        self.dropped |= self.log.dropped
        clash = sorted(set(self.log.columns) & set(self.catalog.categoricals))
        if clash:
            raise ValueError(f"{clash[0]!r} is a categorical of events and of items; rename one of the columns")
        self._split()

    def _item_ids(self, event_items: pa.Array) -> pa.Array:
        """Distinct ids of the items that the source speaks of, in the type of the events'."""
        return event_items.unique()

    def _split(self) -> None:
        """Makes the splits that were asked for or that the data allows."""
        if self.config.cold.share:
            self._hold_out_cold()
        self.splits, self.not_made = make_splits(self.config.split, self.log, self.config.columns.timezone)

    def _plan(self) -> list[Bucket]:
        """Which users share a file and a row group."""
        return plan_buckets(self.log, self.buckets, self.config.split.targets_per_row)

    def _hold_out_cold(self) -> None:
        """Takes out the training events of the items that are to be cold."""
        catalog = self.catalog
        cold = choose_cold(catalog.ids, self.config.cold)
        before = self.log.item.size
        self.log = without_training_events(self.log, catalog.ids[cold])
        self.dropped["training event of a cold item"] = before - self.log.item.size
        if raw.AVAILABLE_FROM in catalog.available:
            released = released_later(catalog.available[raw.AVAILABLE_FROM], cold)
            catalog.available = catalog.available | {raw.AVAILABLE_FROM: released}
        # The oracle of generated data knows another history than what is left.
        self.raw = dataclasses.replace(self.raw, oracle=None)

    def _without_unknown(
        self, events: pa.Table, users: np.ndarray, items: np.ndarray
    ) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        if self.config.unknown_items != "drop":
            return events, users, items
        known = np.isin(items, self.catalog.ids)
        if not known.any():
            raise ValueError(
                "events: not one of their items is in the items file; check that both use the same item ids"
            )
        if not known.all():
            self.dropped["item not in the items file"] = int((~known).sum())
        return events.filter(pa.array(known)), users[known], items[known]

    def write_events(self) -> None:
        """Writes events, rows of the splits, counts, and the oracle of a generated source."""
        config, folder = self.config, self.folder
        for vocabulary in self.log.vocabularies.values():
            vocabulary.save(str(folder))
        self.plan = plan = self._plan()
        self.events_hash = events_hash = files_hash(write_events(folder, self.log, plan))
        item_rows = np.searchsorted(self.catalog.ids, self.log.item)
        for split in self.splits:
            files: dict[str, str] = {}
            for part, rows in split.parts.items():
                files |= write_rows(folder, split.id, part, rows, self.log, plan)
            manifest = SplitManifest(
                id=split.id,
                policy=split.id,  # type: ignore[arg-type]
                hash=split_hash(split.id, split.borders, events_hash, files),
                events_hash=events_hash,
                parts={part: rows.info() for part, rows in split.parts.items()},
                files=files,
                borders=split.borders,
                targets_per_row=config.split.targets_per_row,
            )
            manifest.save(str(folder))
            self.manifests[split.id] = manifest
            counts = training_counts(split.parts["train"], self.log.offsets, item_rows, self.catalog.ids.size)
            write_counts(folder, manifest, counts)
            if split is self.splits[0]:  # the coverage of content is told for this one
                targets = item_rows[statistics.target_events(split.parts["test"], self.log)]
                self.training_counts, self.test_counts = counts, np.bincount(targets, minlength=counts.size)
            logger.info("split %s: %s", split.id, {part: rows.user.size for part, rows in split.parts.items()})
        if self.raw.oracle is not None and "leave_one_out" in self.manifests:
            carried = _carried(self.manifests["leave_one_out"])
            save_file({k: np.ascontiguousarray(v) for k, v in self.raw.oracle.items()}, folder / ORACLE_FILE, carried)

    @property
    def buckets(self) -> int:
        """Files per partition."""
        return self.config.buckets or default_buckets(self.log.item.size)

    def finish(self, written: dict[str, dict[str, Any]]) -> DatasetManifest:
        """Writes manifest and report, and gives the folder its name."""
        content = {name: self._content_ref(name, entry["manifest"]) for name, entry in sorted(written.items())}
        manifest = self._manifest(content)
        for name, entry in written.items():
            if entry["dropped"]:
                self.dropped[f"`{name}` vectors of unknown items"] = entry["dropped"]
        report = self._report(manifest)
        save_json(report, self.folder / REPORT_JSON)
        (self.folder / REPORT_TEXT).write_text(report_text(manifest, report), encoding="utf-8")
        manifest.save(str(self.folder))
        self.stack.pop_all().close()
        return manifest

    def _content_ref(self, name: str, written: Any) -> ContentRef:
        store = ContentStore.open(self.folder, name, GENERATION)
        return ContentRef(
            generation=GENERATION,
            width=written.width,
            dtype=written.dtype,
            rows=written.rows,
            checksum=written.checksum,
            coverage=coverage(store, self.catalog.ids, self.training_counts, self.test_counts),
        )

    def _manifest(self, content: dict[str, ContentRef]) -> DatasetManifest:
        log, timestamp = self.log, self.log.timestamp
        repeated = statistics.repeated_events(log)
        share = statistics.repeat_share(log, repeated)
        found = statistics.summary(log, self.catalog)
        found["test_repeat_share"] = {
            split.id: float(repeated[statistics.target_events(split.parts["test"], log)].mean())
            for split in self.splits
            if split.parts["test"].user.size
        }
        user_text = is_text(self.raw.events[raw.USER].type)
        features = log.features(user_text=user_text, item_text=self.catalog.raw_ids is not None)
        return DatasetManifest(
            format_version=FORMAT_VERSION,
            name=self.config.name or self.raw.name,
            created_by=CREATED_BY,
            time=TimeInfo(
                absolute=timestamp is not None,
                timezone=self.raw.timezone,
                minimum_ms=None if timestamp is None else int(timestamp.min()),
                maximum_ms=None if timestamp is None else int(timestamp.max()),
            ),
            features=features | self.catalog.features(),
            partitions=[Partition(name=PARTITION, users=int(log.users.size), events=int(log.item.size))],
            buckets=self.buckets,
            items=ItemStoreRef(generation=GENERATION, count=self.catalog.ids.size, checksum=self.item_checksum),
            content=content,
            splits={name: SplitRef(id=name, hash=manifest.hash) for name, manifest in self.manifests.items()},
            tie_rule=TIE_RULE,
            repeat_share=share,
            mask_seen_default=share <= MASK_SEEN_LIMIT,
            statistics=found,
        )

    def _report(self, manifest: DatasetManifest) -> dict[str, Any]:
        return {
            "input": self.config.input,
            "fingerprint": self.raw.fingerprint,
            "seconds": round(time.monotonic() - self.started, 2),
            "events_read": self.raw.events.num_rows + sum(self.raw.dropped.values()),
            "dropped": self.dropped,
            "choices": self.raw.choices,
            "ignored": self.raw.ignored,
            "splits": {name: dataclasses.asdict(split) for name, split in self.manifests.items()},
            "splits_not_made": self.not_made,
            "statistics": manifest.statistics,
            "notes": self.raw.notes,
        }


def _carried(split: SplitManifest) -> dict[str, str]:
    """Metadata of an artefact that was counted from the events of a split."""
    return {"split": split.id, "split_hash": split.hash}


def write_counts(folder: Path, split: SplitManifest, counts: np.ndarray) -> None:
    """Writes the training events per item row, with the split's id and hash as metadata."""
    path = folder / "splits" / split.id / "item_counts.safetensors"
    save_file({"count": counts.astype(np.int64)}, path, metadata=_carried(split))


def check_target(output: str, fingerprint: str, overwrite: bool) -> None:
    """Refuses to write over anything but a data set of the same source (or, if asked, of another one).

    Raises:
        ValueError: The folder holds something else; says what.
    """
    if not paths.exists(output):
        return
    if not paths.exists(paths.join(output, DATASET_FILE)):
        if (
            not paths.is_remote(output)
            and paths.local_path(output).is_dir()
            and not any(paths.local_path(output).iterdir())
        ):
            return
        raise ValueError(f"--output {output}: exists and is no data set; it is left as it is, choose another folder")
    report = paths.join(output, REPORT_JSON)
    known = load_json(report).get("fingerprint") if paths.exists(report) else None
    if known != fingerprint and not overwrite:
        name = DatasetManifest.load(output).name
        raise ValueError(
            f"--output {output}: holds data set {name!r}, made from another source; choose "
            "another folder, or --overwrite it"
        )
