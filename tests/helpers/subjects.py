"""Models of a user's own for the doctor: a stock TorchRec DLRM with our extractor, healthy and with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from mufasa_rec.modules.event_embedding import EventEmbedding, EventEmbeddingConfig
from mufasa_rec.modules.full_attention import FullAttentionExtractor
from mufasa_rec.modules.history import History
from mufasa_rec.modules.sparse_layer import SparseAttentionConfig

ROWS, WIDTH, DENSE, LONGEST = 6, 8, 3, 5


def make_batch(*features: str) -> Batch:
    """A batch with these features, all of them by default."""
    keys = list(features or ("user", "item", "history"))
    lengths = torch.stack(
        [torch.randint(0, LONGEST + 1, (ROWS,)) if k == "history" else torch.ones(ROWS) for k in keys]
    )
    values = torch.randint(0, 20, (int(lengths.sum()),))
    kjt = KeyedJaggedTensor(keys=keys, values=values, lengths=lengths.flatten().int())
    return Batch(torch.randn(ROWS, DENSE), kjt, torch.randint(0, 2, (ROWS,)))


def pooled(*features: str) -> EmbeddingBagCollection:
    """A pooled table for each feature."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=20, embedding_dim=WIDTH)
            for name in features
        ],
        device=torch.device("meta"),
    )


def unpooled() -> EmbeddingCollection:
    """A table for the history."""
    table = EmbeddingConfig(name="t_history", feature_names=["history"], num_embeddings=20, embedding_dim=WIDTH)
    return EmbeddingCollection(tables=[table], device=torch.device("meta"))


class Interest(nn.Module):
    """Reads the history; no sharded descendant, so nothing traces it."""

    def __init__(self) -> None:
        super().__init__()
        embedding = EventEmbedding(EventEmbeddingConfig(width=WIDTH))
        self.extractor = FullAttentionExtractor(SparseAttentionConfig(num_layers=1), embedding, LONGEST)

    def forward(self, looked_up: dict[str, JaggedTensor]) -> Tensor:
        events = looked_up["history"]
        offsets = events.offsets().long()
        start = torch.zeros_like(offsets[1:])
        return self.extractor(
            History(embedded=events.values(), offsets=offsets, start_position=start, max_length=LONGEST)
        )


class Spliced(nn.Module):
    """A stock DLRM whose dense input is joined by an interest vector."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.interest = unpooled(), Interest()
        self.dlrm = DLRM(pooled("user", "item"), DENSE + WIDTH, [16, WIDTH], [16, 1])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        interest = self.interest(self.history(self.features(batch)))
        logits = self.dlrm(torch.cat([batch.dense_features, interest], dim=1), batch.sparse_features).squeeze(-1)
        return self.loss(logits, batch)

    def features(self, batch: Batch) -> KeyedJaggedTensor:
        return batch.sparse_features

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return F.binary_cross_entropy_with_logits(logits, batch.labels.float()), logits.detach()


class Permuting(Spliced):
    def features(self, batch: Batch) -> KeyedJaggedTensor:
        return batch.sparse_features.permute([2, 1, 0])  # planted: changed in forward


class Rebuilding(Spliced):
    def features(self, batch: Batch) -> KeyedJaggedTensor:
        ids = batch.sparse_features["history"]
        return KeyedJaggedTensor(keys=["history"], values=ids.values(), lengths=ids.lengths())  # planted: built


class Branching(Spliced):
    def features(self, batch: Batch) -> KeyedJaggedTensor:
        if batch.labels.sum() > 3:  # planted: an `if` on a tensor
            return batch.sparse_features
        return batch.sparse_features


class Unused(Spliced):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Linear(4, 4)  # planted: an unused parameter


class Syncing(Interest):
    """Waits for the device in three ways, and once more where it is meant."""

    def forward(self, looked_up: dict[str, JaggedTensor]) -> Tensor:
        x = super().forward(looked_up)
        if float(x.abs().max()) > 1e6:  # planted: a read
            return x * 0
        kept = x[x.sum(1) > 0]  # planted: a mask
        sizes = looked_up["history"].lengths().tolist()  # planted: a copy
        assert sum(sizes) >= 0
        return x + kept.sum() * 0


class Waiting(Spliced):
    def __init__(self) -> None:
        super().__init__()
        self.interest = Syncing()


class Failing(Spliced):
    def __init__(self) -> None:
        super().__init__()
        self.dlrm = DLRM(pooled("user", "item"), DENSE, [16, WIDTH], [16, 1])  # planted: not as wide as its input


def spliced() -> Any:
    return Spliced(), make_batch


def stock() -> Any:
    model = DLRMTrain(DLRM(pooled("user", "item"), DENSE, [16, WIDTH], [16, 1]))
    return model, lambda: make_batch("user", "item")


def permuting() -> Any:
    return Permuting(), make_batch


def rebuilding() -> Any:
    return Rebuilding(), make_batch


def branching() -> Any:
    return Branching(), make_batch


def unused() -> Any:
    return Unused(), make_batch


def waiting() -> Any:
    return Waiting(), make_batch


def failing() -> Any:
    return Failing(), make_batch


def lacking() -> Any:
    return Spliced(), lambda: make_batch("user", "history")


def on_every_rank() -> Any:
    return Spliced(), make_batch, {"t_history": ParameterConstraints(sharding_types=["data_parallel"])}


def no_subject() -> Callable[[], Batch]:
    return make_batch
