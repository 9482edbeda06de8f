"""Rank 0's part of ``prepare`` for sources with impressions: requests with labels, split by time, history as of each.

Beside the events of every user lie rows of another kind: a request with its candidates, its labels, and how many of
the user's events were strictly before it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from mufasa_rec.data import raw
from mufasa_rec.data.catalog import build_catalog, numeric_ids, same_id_type
from mufasa_rec.data.event_files import Bucket, plan_buckets
from mufasa_rec.data.importers.values import flat, is_text
from mufasa_rec.data.own_histories import own_log, with_users
from mufasa_rec.data.preparation import ORACLE_FILE, Preparation, write_counts
from mufasa_rec.data.raw import RawImpressions
from mufasa_rec.data.request_files import Histories, even_groups, request_groups, write_requests
from mufasa_rec.data.requests import WEIGHT, Requests, dense_info, events_before, group_requests
from mufasa_rec.data.schema import (
    PARTS,
    DatasetManifest,
    ImpressionsInfo,
    PartInfo,
    Partition,
    SplitManifest,
)
from mufasa_rec.data.split_choice import borders_in_time
from mufasa_rec.data.split_hash import split_hash

logger = logging.getLogger(__name__)
SPLIT = "impressions"
USERS_FILE = "users.safetensors"


class ImpressionsPreparation(Preparation):
    """Rank 0's part, for sources that may have impressions; without any it is that of events."""

    shown: RawImpressions
    requests: Requests
    histories: Histories

    def _build(self) -> None:
        if self.raw.impressions is None:
            super()._build()
            return
        self.shown = self.raw.impressions
        if self.shown.own_history:
            self._build_own_histories()
        else:
            self._same_ids()
            super()._build()
            self._build_requests()
        self.borders = self._borders()

    def _same_ids(self) -> None:
        """Users and items of events and impressions in one type: text if either is text."""
        events, shown = self.raw.events, self.shown.table
        for name in (raw.USER, raw.ITEM):
            one, other = same_id_type(flat(events[name]), flat(shown[name]))
            assert other is not None
            events = events.set_column(events.column_names.index(name), name, one)
            shown = shown.set_column(shown.column_names.index(name), name, other)
        self.shown = dataclasses.replace(self.shown, table=shown)
        self.raw = dataclasses.replace(self.raw, events=events, impressions=self.shown)

    def _item_ids(self, event_items: pa.Array) -> pa.Array:
        if self.raw.impressions is None:
            return super()._item_ids(event_items)
        shown = flat(self.shown.table[raw.ITEM]).cast(event_items.type)
        return pa.concat_arrays([event_items, shown]).unique()

    def _split(self) -> None:
        """Next-event splits only where they were asked for: what impressions are for is in the split of requests."""
        if self.raw.impressions is None or self.config.split.policies is not None:
            super()._split()

    def _plan(self) -> list[Bucket]:
        if self.raw.impressions is None:
            return super()._plan()
        rows = np.zeros(self.log.users.size, np.int64)
        np.add.at(rows, np.searchsorted(self.log.users, self.requests.user), 1)
        return plan_buckets(self.log, self.buckets, self.config.split.targets_per_row, rows)

    def _build_requests(self) -> None:
        """Requests, and of each how many events are strictly before it."""
        log, time = self.log, self.log.timestamp
        if time is None:
            raise ValueError(
                "impressions: the events have no absolute times, so no history can be cut at an impression; name their "
                "time with --columns.time, or give impressions with a history of their own"
            )
        items = flat(self.shown.table[raw.ITEM])
        if self.catalog.raw_ids is not None:
            items = items.cast(pa.large_string())
        users, items = numeric_ids(flat(self.shown.table[raw.USER])), numeric_ids(items)
        if self.config.unknown_items == "drop":
            users, items = self._without_unknown_shown(users, items)
        self.requests = group_requests(self.shown, users, items)
        ends = events_before(self.requests.user, self.requests.time, log.users[log.user_of_event], time)
        self.histories = Histories(ends)
        self.log = with_users(log, self.requests.user)

    def _without_unknown_shown(self, users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = np.isin(items, self.catalog.ids)
        if not known.all():
            self.dropped["impression of an item not in the items file"] = int((~known).sum())
            oracle = None if self.shown.oracle is None else self.shown.oracle[known]
            table = self.shown.table.filter(pa.array(known))
            self.shown = dataclasses.replace(self.shown, table=table, oracle=oracle)
        return users[known], items[known]

    def _build_own_histories(self) -> None:
        """Catalog, requests, and their own lists cut at each request's time where they have times."""
        table, items = self.shown.table, self.raw.items
        lists = flat(table[raw.HISTORY_ITEM])
        shown, file_items = same_id_type(flat(table[raw.ITEM]), None if items is None else flat(items[raw.ITEM_ID]))
        if is_text(shown.type) != is_text(lists.values.type):
            raise ValueError(
                "impressions: item ids are text in one of item and history, integers in the other; use one"
            )
        if items is not None:
            items = items.set_column(items.column_names.index(raw.ITEM_ID), raw.ITEM_ID, file_items)
        past = lists.values.cast(shown.type)
        if self.config.unknown_items == "drop":
            raise ValueError("--unknown-items drop: not for impressions with a history of their own; use add or refuse")
        self.catalog = build_catalog(items, pa.concat_arrays([shown, past]).unique(), self.config.unknown_items)
        self.requests = group_requests(self.shown, numeric_ids(flat(table[raw.USER])), numeric_ids(shown))
        times = flat(table[raw.HISTORY_TIME]).values if raw.HISTORY_TIME in table.column_names else None
        self.log, late = own_log(self.requests, lists.offsets, numeric_ids(past), times)
        if late:
            self.dropped["event of an own history at or after its impression"] = late
        self.histories = Histories(self.log.lengths, self.log)

    def _borders(self) -> dict[str, int]:
        requests = self.requests
        times = np.repeat(requests.time, requests.sizes)
        validation, test = borders_in_time(self.config.split, times, self.config.columns.timezone)
        self.part = np.searchsorted([validation, test], requests.time, side="right")  # index into PARTS
        for number, name in enumerate(PARTS):
            if not (self.part == number).any():
                raise ValueError(
                    f"impressions: none is in part {name!r} with the borders {validation} and {test}; the times go "
                    f"from {requests.time.min()} to {requests.time.max()}: give --split.validation-from and "
                    "--split.test-from"
                )
        known = self.part == 0
        return {"validation": validation, "test": test, "train_end": int(requests.time[known].max())}

    def write_events(self) -> None:
        """Writes events and next-event splits where there are any, then requests, counts and the oracle."""
        if self.raw.impressions is None:
            super().write_events()
            return
        if self.histories.log is None:
            super().write_events()
            groups = request_groups(self.requests, self.log.users, self.plan)
        else:
            groups = even_groups(self.requests.user.size)
        files: dict[str, str] = {}
        parts: dict[str, PartInfo] = {}
        for number, name in enumerate(PARTS):
            chosen = self.part == number
            files |= write_requests(self.folder, SPLIT, name, chosen, self.requests, self.histories, groups)
            parts[name] = PartInfo(rows=int(chosen.sum()), targets=int(self.requests.sizes[chosen].sum()))
        for vocabulary in self.requests.vocabularies.values():
            vocabulary.save(str(self.folder))
        manifest = SplitManifest(
            id=SPLIT,
            policy=SPLIT,
            hash=split_hash(SPLIT, self.borders, self.events_hash, files),
            events_hash=self.events_hash,
            parts=parts,
            files=files,
            borders=self.borders,
        )
        manifest.save(str(self.folder))
        self.manifests = {SPLIT: manifest, **self.manifests}
        self._write_learned(manifest)
        logger.info("split %s: %s", SPLIT, {name: info.targets for name, info in parts.items()})

    def _write_learned(self, manifest: SplitManifest) -> None:
        """What is counted on the training part, and what a generator knows of all impressions."""
        training = np.repeat(self.part == 0, self.requests.sizes)
        shown = np.searchsorted(self.catalog.ids, self.requests.columns["candidate"])
        size = self.catalog.ids.size
        self.training_counts = np.bincount(shown[training], minlength=size) + self._counted_events()
        self.test_counts = np.bincount(shown[np.repeat(self.part == 2, self.requests.sizes)], minlength=size)
        write_counts(self.folder, manifest, self.training_counts)
        users, counts = np.unique(np.repeat(self.requests.user, self.requests.sizes)[training], return_counts=True)
        self.training_users = users.size
        carried = {"split": manifest.id, "split_hash": manifest.hash}
        place = self.folder / "splits" / SPLIT / USERS_FILE
        save_file({"id": users, "count": counts.astype(np.int64)}, place, metadata=carried)
        if self.shown.oracle is not None:
            chance = np.ascontiguousarray(self.shown.oracle, np.float64)
            save_file({"probability": chance}, self.folder / ORACLE_FILE, metadata=carried)

    def _counted_events(self) -> np.ndarray:
        """Training events per item beside the impressions: those of the training histories that are none themselves."""
        size = self.catalog.ids.size
        if self.shown.are_events or self.histories.log is not None:
            return np.zeros(size, np.int64)
        known = self.part == 0
        ends = np.zeros(self.log.users.size, np.int64)
        np.maximum.at(ends, np.searchsorted(self.log.users, self.requests.user[known]), self.histories.end[known])
        position = np.arange(self.log.item.size) - np.repeat(self.log.offsets[:-1], self.log.lengths)
        inside = position < np.repeat(ends, self.log.lengths)
        return np.bincount(np.searchsorted(self.catalog.ids, self.log.item[inside]), minlength=size)

    def _manifest(self, content: dict) -> DatasetManifest:  # type: ignore[type-arg]
        manifest = super()._manifest(content)
        if self.raw.impressions is None:
            return manifest
        own = self.histories.log is not None
        ref = dataclasses.replace(manifest.splits[SPLIT], rows="requests", layout="lists" if own else "references")
        partitions = manifest.partitions
        if own:
            users, events = int(np.unique(self.requests.user).size), int(self.log.item.size)
            partitions = [Partition(name=partitions[0].name, users=users, events=events)]
        return dataclasses.replace(
            manifest, splits={**manifest.splits, SPLIT: ref}, partitions=partitions, impressions=self._info()
        )

    def _info(self) -> ImpressionsInfo:
        requests = self.requests
        training = np.repeat(self.part == 0, requests.sizes)
        tasks = requests.names(raw.LABEL_PREFIX)
        rates = {task: float(requests.columns[raw.LABEL_PREFIX + task][training].mean()) for task in tasks}
        return ImpressionsInfo(
            tasks=tasks,
            requests=int(requests.user.size),
            impressions=int(requests.offsets[-1]),
            users=self.training_users,
            rates=rates,
            context={name.removeprefix(raw.CONTEXT_PREFIX): len(v.values) for name, v in requests.vocabularies.items()},
            dense=dense_info(requests, training),
            weighted=WEIGHT in requests.columns,
            negative_rate=self.shown.negative_rate,
        )

    def _report(self, manifest: DatasetManifest) -> dict[str, Any]:
        report = super()._report(manifest)
        if manifest.impressions is not None:
            report["impressions"] = dataclasses.asdict(manifest.impressions)
            report["history_length_mean"] = float(self.histories.end.mean())
        return report
