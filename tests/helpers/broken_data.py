"""Faults planted into copies of a prepared data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mufasa_rec.data.content import ContentStore, write_content
from mufasa_rec.data.schema import DATASET_FILE


def copy_of(dataset: str, folder: Path) -> Path:
    """A copy of a data set that may be changed."""
    return Path(shutil.copytree(dataset, folder / "copy"))


def without_column(dataset: Path, name: str) -> None:
    """Take a column out of all event files; `dataset.json` still speaks of it."""
    for file in (dataset / "events").rglob("*.parquet"):
        read = pq.ParquetFile(file)
        groups = [read.read_row_group(i).drop_columns([name]) for i in range(read.num_row_groups)]
        with pq.ParquetWriter(file, groups[0].schema) as writer:
            for group in groups:
                writer.write_table(group)


def with_other_content(dataset: Path, name: str, width: int) -> int:
    """Write the vectors of a modality anew, of another width; returns the old one."""
    ref = json.loads((dataset / DATASET_FILE).read_text())["content"][name]
    store = ContentStore.open(dataset, name, ref["generation"])
    ids, version = np.array(store.ids), store.manifest.encoder_version
    shutil.rmtree(dataset / "content" / name)
    vectors = np.ones((len(ids), width), np.float32)
    write_content(str(dataset), name, ids, vectors, encoder=store.manifest.encoder, encoder_version=version)
    return int(ref["width"])
