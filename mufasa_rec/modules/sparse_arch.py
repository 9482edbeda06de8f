"""The sharded part: tables of ids and categoricals, and the frozen content vectors, all looked up in one forward.

`SparseArch` is the only module with sharded descendants. Everything in its `forward` is traced by TorchRec's pipeline:
it hands the batch's finished KeyedJaggedTensor to each collection, as it is. `Merge` is where the tracer does not look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from mufasa_rec.data.batch import DRAWN, SUFFIX, salted
from mufasa_rec.distributed.content_config import ContentPrecision, Placement
from mufasa_rec.distributed.id_policy import ManagedIdsConfig
from mufasa_rec.distributed.managed_collision import INSIDE, managed_collection
from mufasa_rec.distributed.sharding import DATA_TYPES
from mufasa_rec.distributed.table_config import Precision
from mufasa_rec.modules.content_codes import packed_width, unpack

CONTENT = "content"


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """A trained embedding table.

    Attributes:
        name: Name of the feature, and of the table with `t_` before it (dots become underscores).
        num_embeddings: Rows.
        dim: Width; None for that of the arch.
        weight_dtype: Precision of the weights.
        output_dtype: Precision of the vectors that are looked up.
        frozen: Whether it is only looked up, without gradient.
        salts: Keys of each id, whose vectors are summed: one feature for each.
        managed: Admission and eviction, for a table that is looked up by raw ids; None for one that is by keys.
        drawn: Whether a managed table has a second feature, of ids that are looked up and not counted.
    """

    name: str
    num_embeddings: int
    dim: int | None = None
    weight_dtype: Precision = "fp32"
    output_dtype: Precision = "fp32"
    frozen: bool = False
    salts: int = 1
    managed: ManagedIdsConfig | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        if self.num_embeddings < 1:
            raise ValueError(f"table {self.name!r}: num_embeddings={self.num_embeddings}; a table has 1 row or more.")
        if self.dim is not None and (self.dim < 4 or self.dim % 4):
            raise ValueError(f"table {self.name!r}: dim={self.dim}; choose a positive multiple of 4, as FBGEMM wants.")
        if self.frozen and self.managed is not None:
            raise ValueError(
                f"tables.each[{self.name!r}].frozen=True: its rows are managed (ids.{self.name}.policy) and start anew "
                "with every id that they are given; let it learn, or choose another policy."
            )

    @property
    def features(self) -> list[str]:
        """Features that are looked up in it."""
        names = [salted(self.name, salt) for salt in range(self.salts)]
        return [*names, self.name + DRAWN] if self.drawn else names


@dataclass(frozen=True, kw_only=True)
class ContentTableConfig:
    """The vectors of a modality: a frozen table, or no table where they travel with the batch.

    Attributes:
        modality: Name of the modality; the feature is `content.<modality>`.
        num_embeddings: Vectors in the store.
        width: Width of a vector; the table is padded to a multiple of 4, as FBGEMM wants.
        precision: Precision of the table.
        placement: Whether there is a table.
    """

    modality: str
    num_embeddings: int
    width: int
    precision: ContentPrecision = "fp16"
    placement: Placement = "sharded"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"modality {self.modality!r}: width={self.width}; a vector has 1 number or more.")

    @property
    def padded_width(self) -> int:
        """Columns of the table, float16 numbers."""
        return packed_width(self.width) if self.precision == "int8" else -(-self.width // 4) * 4


class SparseArch(nn.Module):
    """All lookups of a batch.

    Args:
        tables: Tables of ids and categoricals, in groups of one width and output precision.
        dim: Width of the tables that have none of their own.
        contents: Modalities; those that travel with the batch get no table.
        device: Where to make the weights; ``meta`` leaves it to the sharding.

    Example:
        >>> arch = SparseArch([TableConfig(name="item", num_embeddings=10)], 8, [], torch.device("cpu"))
        >>> kjt = KeyedJaggedTensor(keys=["item"], values=torch.tensor([3, 7]), lengths=torch.tensor([2]), stride=1)
        >>> merge(arch(kjt))["item"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self, tables: Sequence[TableConfig], dim: int, contents: Sequence[ContentTableConfig], device: torch.device
    ) -> None:
        super().__init__()
        self.contents = tuple(contents)
        self.widths = {content.modality: content.width for content in contents}
        contents = [content for content in contents if content.placement == "sharded"]
        self.packed = {f"{CONTENT}.{c.modality}": c.width for c in contents if c.precision == "int8"}
        trained = _groups([table for table in tables if not table.frozen and table.managed is None], dim)
        first = f"dim_{dim}" if f"dim_{dim}" in trained else next(iter(trained), None)
        self.ids = None if first is None else EmbeddingCollection(tables=trained.pop(first), device=device)
        self.others = nn.ModuleDict(
            {name: EmbeddingCollection(tables=group, device=device) for name, group in trained.items()}
        )
        managed = {table.name: table.managed for table in tables if table.managed is not None}
        rows = _groups([table for table in tables if table.managed is not None], dim)
        self.managed = nn.ModuleDict({name: managed_collection(group, managed, device) for name, group in rows.items()})
        frozen = _groups([table for table in tables if table.frozen], dim)
        self.frozen = nn.ModuleDict(
            {name: EmbeddingCollection(tables=group, device=device) for name, group in frozen.items()}
        )
        groups: dict[int, list[EmbeddingConfig]] = {}
        for content in contents:
            groups.setdefault(content.padded_width, []).append(_frozen(content))
        self.content = nn.ModuleDict(
            {f"width_{width}": EmbeddingCollection(tables=group, device=device) for width, group in groups.items()}
        )

    @property
    def trained(self) -> nn.ModuleList:
        """The collections that learn."""
        managed = [collection.get_submodule(INSIDE) for collection in self.managed.values()]
        return nn.ModuleList([*([] if self.ids is None else [self.ids]), *self.others.values(), *managed])

    @property
    def untrained(self) -> nn.ModuleList:
        """The collections that are only looked up."""
        return nn.ModuleList([*self.frozen.values(), *self.content.values()])

    @property
    def trained_tables(self) -> list[str]:
        """Names of the tables that learn."""
        return [name.split(".")[-2] for name, _ in self.trained.named_parameters()]

    @property
    def drawn_tables(self) -> list[str]:
        """Names of the tables whose weights are drawn, not read from a store: those that learn, and frozen ones."""
        return [*self.trained_tables, *(name.split(".")[-2] for name, _ in self.frozen.named_parameters())]

    def forward(self, features: KeyedJaggedTensor) -> list[dict[str, JaggedTensor]]:
        """Look up every feature.

        Args:
            features: Ids of every feature of every table.

        Returns:
            One dict per collection, feature to JaggedTensor, those of frozen tables and content without gradient.
            They are left apart because under TorchRec's tracer they are promises that cannot be looked into; `Merge`
            joins them where the tracer does not look.
        """
        looked_up = [] if self.ids is None else [self.ids(features)]
        for collection in self.others.values():
            looked_up.append(collection(features))
        for collection in self.managed.values():
            looked_up.append(collection(features)[0])
        with torch.no_grad():
            for collection in self.frozen.values():
                looked_up.append(collection(features))
            for collection in self.content.values():
                looked_up.append(collection(features))
        return looked_up


class Merge(nn.Module):
    """What was looked up and what the batch carries, in one dict: the one place that knows where content lies.

    It has no sharded descendant, so the tracer takes it as it is.

    Args:
        packed: Width of the vectors of each feature whose rows hold codes.
    """

    def __init__(self, packed: Mapping[str, int]) -> None:
        super().__init__()
        self.packed = dict(packed)

    def forward(self, looked_up: Sequence[dict[str, JaggedTensor]], carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join them.

        Args:
            looked_up: What `SparseArch` gave.
            carried: Content of the batch's items by modality, each `[U, P]`.

        Returns:
            Feature to fp32 values, `[number of ids, dim]`; content may have more columns than its vectors.
        """
        values = merge(looked_up)
        for name, width in self.packed.items():
            values[name] = unpack(values[name], width)
        return values | {f"{CONTENT}.{name}": vectors.float() for name, vectors in carried.items()}


def merge(looked_up: Sequence[dict[str, JaggedTensor]]) -> dict[str, Tensor]:
    """Join the dicts of `SparseArch.forward` into feature to fp32 values, `[number of ids, dim]`.

    Of a table with several features there is one: the keys of an id are summed, ids that do not count come last.
    """
    values = {name: jagged.values().float() for found in looked_up for name, jagged in found.items()}
    for name in [name for name in values if SUFFIX in name]:
        base, more = name.partition(SUFFIX)[0], values.pop(name)
        values[base] = torch.cat([values[base], more]) if name == base + DRAWN else values[base] + more
    return values


def table_name(feature: str) -> str:
    """Name of a feature's table: parameter names may not hold a dot."""
    return "t_" + feature.replace(".", "_")


def _groups(tables: Sequence[TableConfig], dim: int) -> dict[str, list[EmbeddingConfig]]:
    """Tables that one collection can hold: of one width, with vectors of one precision."""
    groups: dict[str, list[EmbeddingConfig]] = {}
    for table in tables:
        width = table.dim or dim
        name = f"dim_{width}" if table.output_dtype == "fp32" else f"dim_{width}_{table.output_dtype}"
        groups.setdefault(name, []).append(_drawn(table, width))
    return groups


def _drawn(table: TableConfig, dim: int) -> EmbeddingConfig:
    def init(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, std=1.0 / math.sqrt(dim))

    return EmbeddingConfig(
        name=table_name(table.name),
        feature_names=table.features,
        num_embeddings=table.num_embeddings,
        embedding_dim=dim,
        data_type=DATA_TYPES[table.weight_dtype],
        init_fn=init,
    )


def _frozen(content: ContentTableConfig) -> EmbeddingConfig:
    return EmbeddingConfig(
        name=table_name(f"{CONTENT}.{content.modality}"),
        feature_names=[f"{CONTENT}.{content.modality}"],
        num_embeddings=max(content.num_embeddings, 1),
        embedding_dim=content.padded_width,
        data_type=DataType.FP16,
        init_fn=nn.init.zeros_,
    )
