"""A data set as a run sees it."""

from __future__ import annotations

from dataclasses import dataclass

from mufasa_rec.data.item_lookup import ItemLookup
from mufasa_rec.data.schema import DatasetManifest, SplitManifest, SplitRef


@dataclass(frozen=True)
class OpenDataset:
    """A data set as a run sees it: manifest, split, items."""

    folder: str
    manifest: DatasetManifest
    ref: SplitRef
    split: SplitManifest
    catalog: ItemLookup

    @property
    def has_time(self) -> bool:
        """Whether events have absolute times."""
        return self.manifest.time.absolute

    def has(self, kind: str) -> bool:
        """Whether events have a column of this kind (`action`, `weight`, `label`)."""
        return any(f.level == "event" and f.kind == kind for f in self.manifest.features.values())
