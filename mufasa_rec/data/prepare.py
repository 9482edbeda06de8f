"""Raw data to a data set that trains: items, events, content, splits, manifest, report; written aside, then renamed.

Rank 0 reads the source and writes items and events; the content modalities are dealt over all ranks. The finished
folder takes its name at the very end, so that nobody ever sees half a data set and an error leaves what was there as
it was.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from mufasa_rec.data.content_writer import write_content
from mufasa_rec.data.preparation import GENERATION, Preparation, Shared
from mufasa_rec.data.prepare_config import PrepareConfig
from mufasa_rec.data.prepare_impressions import ImpressionsPreparation
from mufasa_rec.data.prepare_rows import RowsPreparation
from mufasa_rec.data.ranks import Ranks
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.data.vectors import read_vectors

__all__ = ["PrepareConfig", "prepare"]
logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig, ranks: Ranks | None = None) -> DatasetManifest:
    """Makes the data set at ``config.output``.

    Args:
        config: What to do.
        ranks: This process among its peers; by default as the process group says.

    Returns:
        The manifest (on every rank).

    Raises:
        ValueError: The source cannot be used as it is; names the thing and the remedy.
        OSError: The disk is full; nothing that was there before is changed.
    """
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        lead = (RowsPreparation if config.layout == "rows" else ImpressionsPreparation)(config, stack)
        shared = ranks.first(lead.begin)
        names = [name for k, name in enumerate(sorted(shared.vectors)) if (k + 1) % ranks.size == ranks.rank]
        written = ranks.together(lambda: _work(config, lead, shared, names, ranks.rank))
        content = {name: ref for part in written for name, ref in part.items()}
        return ranks.first(lambda: lead.finish(content))


def _work(config: PrepareConfig, lead: Preparation, shared: Shared, names: list[str], rank: int) -> dict[str, Any]:
    """This rank's share: events and splits on rank 0, its modalities on every rank."""
    if rank == 0:
        lead.write_events()
    return {name: _write_modality(config, shared, name) for name in names}


def _write_modality(config: PrepareConfig, shared: Shared, name: str) -> dict[str, Any]:
    source = shared.vectors[name]
    ids, vectors = read_vectors(source, item_ids=shared.file_ids) if isinstance(source, str) else source
    manifest = write_content(
        shared.folder,
        name,
        ids,
        vectors,
        encoder=config.encoder,
        encoder_version=config.encoder_version,
        dtype=config.content_dtype,
        normalise=config.normalise,
        generation=GENERATION,
        item_ids=shared.item_ids,
    )
    logger.info("content %s: %d vectors of width %d", name, manifest.rows, manifest.width)
    return {"manifest": manifest, "dropped": manifest.dropped_unknown}
