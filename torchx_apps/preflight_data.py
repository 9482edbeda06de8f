"""What a pre-flight looks at in a prepared data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mufasa_rec.data.content_manifest import ContentManifest, generation_folder
from mufasa_rec.data.item_lookup import ItemVocabulary, split_of
from mufasa_rec.data.parquet import RowGroupReader, first_row_group
from mufasa_rec.data.ranking_collate import ShownFeatures
from mufasa_rec.data.schema import DatasetManifest, SplitRef
from torchx_apps.preflight_findings import Findings

PREPARED = "give the folder that `prepare` wrote"


def check_dataset(name: str, url: str, split: str, findings: Findings) -> DatasetManifest | None:
    """Look at a prepared data set: its manifest, a split, and the first row group of the training part.

    Args:
        name: Option or field that names it.
        url: Where it lies.
        split: Split that is read.
        findings: Takes what is found.

    Returns:
        Its manifest; None when it is not there, or not to be seen from here.
    """
    if not url:
        findings.problems.append(f"{name}: missing; {PREPARED}, as `--{name.lstrip('-')} FOLDER`")
        return None
    if not findings.readable(name, url, PREPARED):
        return None
    with findings.guard(f"{name} {url}: "):
        manifest = DatasetManifest.load(url)
        ref, _ = split_of(manifest, url, split)
        findings.checked.append(_first_rows(url, manifest, ref))
        return manifest
    return None


def _first_rows(url: str, manifest: DatasetManifest, ref: SplitRef) -> str:
    """Read the first row group of a split's training part, with every column that the manifest speaks of."""
    group = first_row_group(url, manifest, ref, "train")
    events = [name for name, one in manifest.features.items() if one.level == "event" and one.kind != "id"]
    times = ["timestamp"] if manifest.time.absolute else []
    shown: tuple[str, ...] = ()
    if ref.rows == "requests" and manifest.impressions is not None:
        shown = ShownFeatures(manifest.impressions, ItemVocabulary(np.zeros(0, np.int64), "", 0)).columns
    RowGroupReader(["item", *times, *events], shown=shown).read(group)
    return (
        f"data set {manifest.name} ({url}), split {ref.id}: the first row group has its {group.num_rows} rows and all "
        f"columns of dataset.json ({', '.join(['item', *times, *events, *shown])})"
    )


def check_content(url: str, manifest: DatasetManifest, modalities: Sequence[str] | None) -> None:
    """Look at the manifests of a data set's content.

    Raises:
        ValueError: When it lacks a modality, or a manifest is not there or damaged.
    """
    for name in manifest.content if modalities is None else modalities:
        if name not in manifest.content:
            raise ValueError(
                f"modalities: {name!r} is not in data set {manifest.name!r}; there are {sorted(manifest.content)}"
            )
        ContentManifest.load(generation_folder(url, name, manifest.content[name].generation))
