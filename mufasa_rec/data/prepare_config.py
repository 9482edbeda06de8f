"""What ``prepare`` is told: one frozen dataclass, from flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mufasa_rec.data.catalog import UnknownItems
from mufasa_rec.data.cold_items import ColdConfig
from mufasa_rec.data.importers import ColumnsConfig
from mufasa_rec.data.split_choice import SplitConfig


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What ``prepare`` is told.

    Attributes:
        input: Folder, events file, URL, or ``synthetic:<seed>``.
        output: Folder or URL of the data set.
        name: Name of the data set; the input's by default.
        layout: How the input lies: ``tabular``, ``grouplens``, ``rows`` (training, validation and test rows with their
            own lists, written by Spark or a warehouse), or ``auto`` (one of the first two).
        columns: Column names and how to read them; these win over ``columns.json`` in the input folder.
        columns_file: Another place of ``columns.json``.
        items: Items file, when it is not in the input folder.
        vectors: More vector files by modality.
        split: Which splits, and where their borders are.
        cold: Items whose training events are taken out, to see what is found of them by content alone; needs
            ``split.policies`` to be leave_one_out.
        unknown_items: Items of events that the items file lacks: ``add`` them, ``drop`` their events, or ``refuse``.
        drop_duplicates: Drop events that equal an earlier one in every column.
        sort_positions: Accept positions that do not ascend within a user in the source's order.
        max_null_share: Largest share of events without user, item or time that is dropped rather than refused.
        buckets: Files per partition; one, or one per five million events.
        content_dtype: Form of vectors on disk.
        normalise: Scale vectors to length 1.
        encoder: Name of the program or model that made the vectors.
        encoder_version: Its version.
        overwrite: Replace a data set that was made from another source.
    """

    input: str
    output: str
    name: str | None = None
    layout: Literal["auto", "tabular", "grouplens", "rows"] = "auto"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    columns_file: str | None = None
    items: str | None = None
    vectors: dict[str, str] = field(default_factory=dict)
    split: SplitConfig = field(default_factory=SplitConfig)
    cold: ColdConfig = field(default_factory=ColdConfig)
    unknown_items: UnknownItems = "add"
    drop_duplicates: bool = False
    sort_positions: bool = False
    max_null_share: float = 0.05
    buckets: int | None = None
    content_dtype: Literal["float16", "int8"] = "float16"
    normalise: bool = True
    encoder: str = "unknown"
    encoder_version: str = "unknown"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_null_share <= 1:
            raise ValueError(f"max_null_share: is {self.max_null_share}; must be between 0 and 1")
        if self.buckets is not None and self.buckets < 1:
            raise ValueError(f"buckets: is {self.buckets}; must be at least 1")
        if self.cold.share and (self.layout == "rows" or self.split.policies != ("leave_one_out",)):
            raise ValueError(
                f"cold.share: is {self.cold.share}, but only what leave-one-out asks for can be cold; give "
                "--split.policies leave_one_out, and events instead of rows"
            )
