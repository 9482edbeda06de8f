"""Verifies a data set against the table contract, whoever wrote it: every problem with its file and the remedy.

Bytes are read once, row group by row group; nothing is written.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from safetensors import safe_open

from mufasa_rec.data import paths
from mufasa_rec.data.check_requests import check_requests_file
from mufasa_rec.data.check_tables import EventFile, check_event_file, check_list_file, check_rows_file
from mufasa_rec.data.content import ContentStore
from mufasa_rec.data.event_files import file_hash
from mufasa_rec.data.items import ITEMS_FILE, TEXT_FILE, ItemStore
from mufasa_rec.data.schema import DATASET_FILE, PARTS, SPLIT_FILE, DatasetManifest, SplitManifest, SplitRef
from mufasa_rec.data.split_hash import files_hash, split_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, and what with its remedy."""

    file: str
    message: str


@dataclass
class _Check:
    url: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, message: str) -> None:
        self.problems.append(Problem(file, message))

    def guard(self, file: str, work: Callable[[], None]) -> bool:
        """Runs a step; what it refuses becomes a problem."""
        try:
            work()
        except (ValueError, OSError) as error:
            self.add(file, str(error))
            return False
        return True


def check_dataset(url: str) -> list[Problem]:
    """Checks a data set.

    Args:
        url: Folder or URL.

    Returns:
        The problems, empty when the data set keeps the contract.
    """
    check = _Check(url)
    try:
        manifest = DatasetManifest.load(url)
    except ValueError as error:
        check.add(DATASET_FILE, str(error))
        return check.problems
    items = _check_items(check, manifest)
    events = {p.name: _check_partition(check, manifest, p.name, items) for p in manifest.partitions}
    for split in manifest.splits.values():
        check.guard(f"splits/{split.id}", lambda split=split: _check_split(check, manifest, split, events, items))
    for name, ref in manifest.content.items():
        place = f"content/{name}/{ref.generation}"
        check.guard(place, lambda n=name, r=ref: ContentStore.open(url, n, r.generation, checksum=r.checksum).verify())
    return check.problems


def _check_items(check: _Check, manifest: DatasetManifest) -> ItemStore | None:
    place = f"items/{manifest.items.generation}"
    try:
        store = ItemStore.open(check.url, manifest.items.generation)
    except (ValueError, OSError, KeyError) as error:
        check.add(place, f"cannot be opened ({error}); write the item store again")
        return None
    if len(store) != manifest.items.count:
        check.add(place, f"has {len(store)} items, {DATASET_FILE} says {manifest.items.count}; correct {DATASET_FILE}")
    if not (np.diff(store.ids) > 0).all():
        check.add(place, "ids are not strictly ascending; sort the items by id and drop duplicates")
    digest = hashlib.sha256()
    for name in (ITEMS_FILE, TEXT_FILE):
        digest.update(paths.local_copy(paths.join(check.url, place, name)).read_bytes())
    if manifest.items.checksum and digest.hexdigest() != manifest.items.checksum:
        check.add(place, "checksum differs from dataset.json; the files were changed: restore them or prepare again")
    for name, feature in manifest.item_categoricals().items():
        column = store.categoricals.get(name)
        if column is None:
            check.add(place, f"categorical {name!r} of {DATASET_FILE} is missing; write it or remove the feature")
        elif column.values.size and not 0 <= column.values.min() <= column.values.max() <= feature.cardinality:
            check.add(place, f"categorical {name!r} has codes outside 0..{feature.cardinality}; code it again")
        elif column.offsets is not None and (
            (np.diff(column.offsets) < 0).any() or column.offsets[-1] != column.values.size
        ):
            check.add(place, f"offsets of categorical {name!r} do not ascend to the number of values; write it again")
    return store


def _check_partition(
    check: _Check, manifest: DatasetManifest, partition: str, items: ItemStore | None
) -> dict[str, EventFile]:
    """Checks the events of a partition; returns what its rows may refer to, by file name."""
    folder = paths.join(check.url, "events", partition)
    files: dict[str, EventFile] = {}
    for url in paths.list_files(folder, ".parquet"):
        name = url.rsplit("/", 1)[1]
        place = f"events/{partition}/{name}"
        try:
            files[name] = check_event_file(url, manifest, items, lambda message, place=place: check.add(place, message))
        except (ValueError, OSError) as error:
            check.add(place, str(error))
    if not files:
        if any(split.layout == "references" for split in manifest.splits.values()):
            check.add(f"events/{partition}", "no Parquet files; rows that reference events need them")
        return files
    declared = next(p for p in manifest.partitions if p.name == partition)
    users, events = sum(f.users.size for f in files.values()), sum(int(f.lengths.sum()) for f in files.values())
    if (users, events) != (declared.users, declared.events):
        check.add(
            f"events/{partition}",
            f"has {users:,} users and {events:,} events, {DATASET_FILE} says {declared.users:,} "
            f"and {declared.events:,}; "
            f"a file is missing, or correct {DATASET_FILE}",
        )
    every = np.concatenate([f.users for f in files.values()])
    if np.unique(every).size != every.size:
        check.add(f"events/{partition}", "a user has rows in two files; put all events of a user into one row")
    return files


def _check_split(
    check: _Check,
    manifest: DatasetManifest,
    ref: SplitRef,
    events: dict[str, dict[str, EventFile]],
    items: ItemStore | None,
) -> None:
    place = f"splits/{ref.id}"
    split = SplitManifest.load(check.url, ref.id)
    if split.hash != ref.hash:
        check.add(f"{place}/{SPLIT_FILE}", f"hash is {split.hash!r}, {DATASET_FILE} says {ref.hash!r}; prepare again")
    folder = paths.join(check.url, place)
    found = {name: file_hash(paths.local_copy(paths.join(folder, name))) for name in split.files}
    for name, digest in found.items():
        if digest != split.files[name]:
            check.add(f"{place}/{name}", f"sha256 differs from {SPLIT_FILE}; the file was changed: prepare again")
    if split.hash != split_hash(split.policy, split.borders, split.events_hash, split.files):
        check.add(f"{place}/{SPLIT_FILE}", "hash is not that of its policy, borders, events and files; prepare again")
    if ref.layout == "references":
        names = [f"events/{partition}/{name}" for partition, files in events.items() for name in sorted(files)]
        hashes = {name: file_hash(paths.local_copy(paths.join(check.url, name))) for name in names}
        if split.events_hash != files_hash(hashes):
            check.add(
                f"{place}/{SPLIT_FILE}", "events_hash is not that of the event files; the split is of other events"
            )
    ends: dict[int, int] = {}
    for part in PARTS:
        _check_part(check, manifest, split, ref, part, events, items, ends)
    _check_counts(check, split, items)


def _check_part(
    check: _Check,
    manifest: DatasetManifest,
    split: SplitManifest,
    ref: SplitRef,
    part: str,
    events: dict[str, dict[str, EventFile]],
    items: ItemStore | None,
    ends: dict[int, int],
) -> None:
    """Checks the rows of one part; ``ends`` collects how far training goes for each user, to find leaks."""
    rows = targets = 0
    for partition in events:
        folder = paths.join(check.url, "splits", ref.id, part, partition)
        for url in paths.list_files(folder, ".parquet"):
            name = url.rsplit("/", 1)[1]
            place = f"splits/{ref.id}/{part}/{partition}/{name}"
            say = lambda message, place=place: check.add(place, message)  # noqa: E731
            if ref.layout == "references" and name not in events[partition]:
                say(f"there is no events file events/{partition}/{name}; rows lie in files named as their events")
                continue
            if ref.rows == "requests":
                if manifest.impressions is None:
                    say(f"rows are requests, but {DATASET_FILE} says nothing of impressions; prepare again")
                    continue
                file = None if ref.layout == "lists" else events[partition][name]
                events_url = None if file is None else paths.join(check.url, "events", partition, name)
                size = check_requests_file(url, events_url, file, manifest.impressions, items, say)
            elif ref.layout == "lists":
                size = check_list_file(url, manifest, items, say)
            else:
                size = check_rows_file(url, events[partition][name], say, ends, training=part == "train")
            rows, targets = rows + size[0], targets + size[1]
    declared = split.parts.get(part)
    if declared is None:
        check.add(f"splits/{ref.id}/{SPLIT_FILE}", f"part {part!r} is missing; a split has train, validation and test")
    elif (declared.rows, declared.targets) != (rows, targets):
        check.add(
            f"splits/{ref.id}/{part}",
            f"has {rows:,} rows and {targets:,} targets, {SPLIT_FILE} says {declared.rows:,} and {declared.targets:,}; "
            "a file is missing, or prepare again",
        )


def _check_counts(check: _Check, split: SplitManifest, items: ItemStore | None) -> None:
    place = f"splits/{split.id}/item_counts.safetensors"
    path = paths.local_copy(paths.join(check.url, place))
    with safe_open(path, framework="np") as file:
        metadata, counts = file.metadata() or {}, file.get_tensor("count")
    if metadata.get("split_hash") != split.hash:
        check.add(place, f"was counted on split {metadata.get('split_hash')!r}, not on {split.hash!r}; prepare again")
    if items is not None and counts.size != len(items):
        check.add(place, f"has {counts.size} counts for {len(items)} items; prepare again")
