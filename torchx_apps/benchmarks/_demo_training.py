"""The demo preset's model on the demo's generated catalog, ready to be stepped by one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mufasa_rec.config import RunConfig
from mufasa_rec.data.batch import Batch
from mufasa_rec.data.item_lookup import ItemVocabulary
from mufasa_rec.data.loader import Loader
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv
from mufasa_rec.presets import preset
from mufasa_rec.training.optim import TrainOptimizer
from torchx_apps import assembly


@dataclass
class DemoTraining:
    """A model in training.

    Attributes:
        config: The run.
        data: The data set.
        model: The sharded model, in training mode.
        optimizer: Updates it.
        pipeline: Steps it.
        loader: Batches.
        events: Events of each batch that was made.
        targets: Targets of each batch that was made.
    """

    config: RunConfig
    data: assembly.OpenDataset
    model: nn.Module
    optimizer: TrainOptimizer
    pipeline: TrainPipelineSparseDist
    loader: Loader
    events: list[int]
    targets: list[int]

    def batches(self) -> Iterator[Batch]:
        """Batches of one epoch after the other, without end."""
        epoch = 0
        while True:
            for batch in self.loader.batches(epoch):
                self.targets.append(batch.num_targets)
                self.events.append(batch.num_events)
                yield batch
            epoch += 1


def demo_training(dataset: str, device: torch.device, num_steps: int, *, num_rows: int = 0) -> DemoTraining:
    """Build the model as the train program does.

    Args:
        dataset: The prepared catalog.
        device: Where it is trained.
        num_steps: Steps of the learning rate's schedule.
        num_rows: Least rows of the item table: ids that no event has are added up to it.
    """
    config = preset("demo")
    config = replace(config, data=replace(config.data, dataset=dataset), threads=1)
    env = DistributedEnv(rank=0, world_size=1, local_rank=0, device=device)
    exchange = RankExchange()
    data = assembly.open_dataset(config)
    known = data.catalog.vocabulary
    if num_rows > known.size:
        unused = int(known.ids.max()) + 1 + np.arange(num_rows - known.size, dtype=np.int64)
        grown = ItemVocabulary(np.concatenate([known.ids, unused]), known.split, known.min_count)
        data = assembly.open_dataset(config, grown)
    loader = assembly.make_loader(config, data, "train", env)
    model = assembly.shard_retriever(config, data, assembly.build_retriever(config, data, exchange), device)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = TrainOptimizer(dense, model.fused_optimizer, config.optimizer, num_steps)
    pipeline = TrainPipelineSparseDist(model=model, optimizer=optimizer, device=device, execute_all_batches=True)  # type: ignore[arg-type]
    model.train()
    return DemoTraining(config, data, model, optimizer, pipeline, loader, [], [])
