"""What the doctor looks at in a prepared data set: columns that a run reads, and the content that its model is for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from mufasa_rec.config import RunConfig
from mufasa_rec.data import paths
from mufasa_rec.data.content_manifest import ContentManifest, generation_folder
from mufasa_rec.data.row_loader import RowLoader
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.diagnosis.finding import Finding
from mufasa_rec.training.fusion_file import LAYER_FILE, TrainedLayer

_MAX_FILES = 32  # of a part; the others are read in training


def content_findings(config: RunConfig) -> list[Finding]:
    """Findings for content whose vectors are of another width than the model is made for.

    Raises:
        ValueError: When there is no data set.
    """
    if not config.data.dataset:
        raise ValueError("data.dataset: missing; give the folder that `prepare` wrote, or --items N.")
    if not config.uses_content:
        return []
    manifest = DatasetManifest.load(config.data.dataset)
    source = config.model.fusion_source if config.task == "retrieval" else ""
    expected = {name: (ref.width, "dataset.json") for name, ref in manifest.content.items()}
    if source:
        layer = TrainedLayer.load(paths.join(source, LAYER_FILE))
        expected |= {name: (width, f"the fusion layer of {source}") for name, width in layer.widths.items()}
    wanted = manifest.content if config.data.modalities is None else config.data.modalities
    found = []
    for name in sorted(set(wanted) & manifest.content.keys()):
        folder = generation_folder(config.data.dataset, name, manifest.content[name].generation)
        there, (width, by) = ContentManifest.load(folder).width, expected[name]
        if there != width:
            found.append(_other_width(name, folder, there, width, by))
    return found


def _other_width(name: str, folder: str, there: int, width: int, by: str) -> Finding:
    return Finding(
        check="data",
        what=f"the store holds vectors of width {there}, the model is made for {width}, as {by} says",
        where=f"content.{name} ({folder})",
        remedy=f"restore the vectors of width {width}, or prepare the data set again with the new ones",
    )


def column_findings(loader: RowLoader[Any]) -> list[Finding]:
    """Findings for columns that a loader reads and its files lack."""
    wanted = dict(_wanted(loader))
    found = []
    for file, columns in islice(wanted.items(), 2 * _MAX_FILES):
        with paths.open_file(file) as handle:
            there = set(pq.read_schema(handle).names)
        found += [
            Finding(
                check="data",
                what=f"column {name!r} is missing; the file has {', '.join(sorted(there))}",
                where=f"column {name} of {file}",
                remedy="write the column, or take the feature out of the configuration or of dataset.json",
            )
            for name in columns
            if name not in there
        ]
    return found


def _wanted(loader: RowLoader[Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Files of a part, each with the columns that are read of it."""
    shown: Any = getattr(loader, "features", None)
    for group in loader.groups:
        own = () if shown is None else ("request_time", "request", *shown.columns)
        if group.events is None:
            yield group.rows, ("user", *loader.columns, *own)
        else:
            yield group.rows, ("user", "history_end", *(own or ("target_from",)))
            yield group.events, ("user", *loader.columns)


def two_batches(loader: RowLoader[Any]) -> list[Any]:
    """The first two batches of this rank; one twice where an epoch has no more."""
    found = list(loader.batches(0, num_steps=2))
    return [found[0], found[-1]]
