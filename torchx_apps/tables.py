"""Tables of a run by name: what their rows stand for, and where another run's tables lie."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from mufasa_rec.config import CONFIG_FILE, RunConfig, load_config
from mufasa_rec.data import paths
from mufasa_rec.data.coding import Vocabulary
from mufasa_rec.data.item_lookup import ItemVocabulary
from mufasa_rec.data.row_ids import RowIds
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.modules.sparse_arch import table_name
from mufasa_rec.training.warm_start import warm_start
from torchx_apps import id_policies, ranking
from torchx_apps.assembly import OpenDataset

logger = logging.getLogger(__name__)


def row_ids(config: RunConfig, data: OpenDataset) -> dict[str, RowIds]:
    """What the rows of every trained table stand for, by the table's name, where that is known beforehand.

    Names are those of the features: `item`, `item.<categorical>`, `event.<categorical>`, and of a ranker `user` and
    `context.<name>`.
    """
    if config.task == "ranking":
        return ranking.row_ids(config, data)
    found = {}
    if isinstance(data.catalog.id_keys, ItemVocabulary):
        found["item"] = RowIds(table_name("item"), data.catalog.id_keys.ids)
    if config.model.use_categoricals:
        features = {f"item.{name}": name for name in data.catalog.items.categoricals}
        features.update({f"event.{name}": name for name in data.manifest.event_categoricals()})
        for table, feature in features.items():
            values = Vocabulary.load(data.folder, feature).values
            found[table] = RowIds.of_values(table_name(table), values)
    return found


def save_row_ids(ids: dict[str, RowIds], folder: Path) -> None:
    """Write the names of all rows into a run folder, so that the run is of use without its data set."""
    for table, one in ids.items():
        one.save(folder, table)


def _refuse_unnamed(config: RunConfig, data: OpenDataset) -> None:
    """Refuse to fill tables whose rows stand for no id that is known beforehand."""
    wanted = config.warm_start
    asked = {*(wanted.tables or ()), *(pair.partition("=")[0] for pair in wanted.matrices)}
    for name, policy in id_policies.without_names(config, data.manifest).items():
        if name in asked:
            raise ValueError(
                f"warm_start: table {name!r} cannot be filled by id, its policy is {policy!r} (ids.{name}.policy); "
                "leave it out of warm_start.tables and warm_start.matrices, or choose 'vocabulary'."
            )
        logger.warning("warm start: table %s (ids.%s.policy: %s) starts from random weights", name, name, policy)


def checkpoints_of(run: str) -> str | None:
    """Where a run's checkpoints lie; None for a folder that is no run."""
    file = paths.join(run, CONFIG_FILE)
    return load_config(file).checkpoint.location(run) if run and paths.exists(file) else None


def start_warm(config: RunConfig, data: OpenDataset, model: nn.Module, exchange: RankExchange) -> None:
    """Fill a new run's model with what its configuration wants to be taken from elsewhere; collective.

    Raises:
        ValueError: When something does not fit, with everything that does not; nothing is changed then.
    """
    wanted = config.warm_start
    if not wanted.wanted:
        return
    _refuse_unnamed(config, data)
    location = on_all_ranks(exchange, lambda: checkpoints_of(wanted.source))
    ids = row_ids(config, data)
    warm_start(model, wanted, ids, exchange, split=data.catalog.split, checkpoints=location)
