"""Thresholds of blocks come from the training split's transitions alone."""

from __future__ import annotations

import numpy as np

from mufasa_rec.data.parquet import RowGroupReader, list_row_groups
from mufasa_rec.data.transitions import cosine_quantile, gap_quantile
from tests.helpers.runs import small_config
from torchx_apps import assembly


def test_quantiles_are_those_of_a_loop_over_the_training_events(dataset: str) -> None:
    data = assembly.open_dataset(small_config(dataset))
    groups = list_row_groups(data.folder, data.manifest, data.ref, "train")
    gaps, cosines = [], []
    store, content_row = data.catalog.stores["title"], data.catalog.content_rows["title"]
    reader = RowGroupReader(("item", "timestamp"))
    for ref in groups:
        group = reader.read(ref)
        for row in range(len(group.user)):
            for event in range(max(group.target_from[row], 1), group.history_end[row]):
                place = group.stream_start[row] + event
                gaps.append((group.columns["timestamp"][place] - group.columns["timestamp"][place - 1]) / 1000)
                rows = content_row[data.catalog.rows_of(group.columns["item"][place - 1 : place + 1])]
                if (rows >= 0).all():
                    a, b = store.gather(rows)
                    cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for quantile in (0.1, 0.9):
        assert gap_quantile(groups, quantile) == np.quantile(gaps, quantile, method="lower")
        found = cosine_quantile(groups, data.catalog, "title", quantile)
        np.testing.assert_allclose(found, np.quantile(cosines, quantile, method="lower"), atol=1e-5)
