"""A trained run that is judged: its data set, and a checkpoint's weights in a model, whatever the task."""

from __future__ import annotations

import logging

from torch import nn

from mufasa_rec.config import RunConfig
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.training.checkpoint import check_intact, find_checkpoint, load_model
from torchx_apps import assembly, run_folder

logger = logging.getLogger(__name__)


def open_beside(folder: str, config: RunConfig, first: assembly.OpenDataset) -> assembly.OpenDataset:
    """Open the data set of a run with the run's vocabulary.

    Args:
        folder: The run.
        config: Its configuration.
        first: What the first run of the table reads.

    Raises:
        ValueError: When it was trained on another split than the first run.
    """
    data = assembly.open_dataset(config, assembly.load_vocabulary(folder))
    if data.catalog.split != first.catalog.split:
        raise ValueError(
            f"{folder}: trained on split {data.catalog.split}, the first run on {first.catalog.split}; "
            "rows of one table need one split."
        )
    return data


def load_weights(
    folder: str, which: str, config: RunConfig, data: assembly.OpenDataset, model: nn.Module, exchange: RankExchange
) -> None:
    """Load a checkpoint on this world's ranks and switch the model to evaluation.

    Args:
        folder: The run.
        which: `best`, `newest` or a step.
        config: The run's configuration.
        data: Its data set.
        model: The sharded model.
        exchange: Reaches the other ranks.

    Raises:
        ValueError: When there is no such checkpoint, it is damaged, or it was written on other data.
    """
    checkpoint = exchange.objects(find_checkpoint(config.checkpoint.location(folder), which))[0]
    manifest = check_intact(checkpoint, exchange)
    run_folder.refuse_other_data(manifest, data)
    load_model(checkpoint, model, assembly.content_tables(data))
    logger.info("%s: checkpoint %s, step %d", folder, manifest.name, manifest.step)
    model.eval()
