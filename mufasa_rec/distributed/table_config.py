"""What the tables are made of and how each learns: precision, optimizer, learning rate, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16"]
OptimizerName = Literal["row_wise_adagrad", "adagrad", "adam", "sgd"]
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The optimizer that FBGEMM applies to the tables inside the backward.

    Attributes:
        name: ``row_wise_adagrad`` (one number of state per row), ``adagrad`` (one per weight), ``sgd``, or ``adam``
            (GPU only).
        learning_rate: Learning rate.
        eps: Added to the root of the second moment.
    """

    name: OptimizerName = "row_wise_adagrad"
    learning_rate: float = 0.02
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.tables.learning_rate={self.learning_rate}: choose above 0.")

    def refuse_on(self, device_type: str, field_name: str = "optimizer.tables.name") -> None:
        """Refuse an optimizer that a kind of device has no kernel for.

        Raises:
            ValueError: For Adam on a CPU.
        """
        if self.name == "adam" and device_type == "cpu":
            raise ValueError(
                f"{field_name}='adam': FBGEMM has no fused Adam on a CPU; choose 'row_wise_adagrad' or 'adagrad', or "
                "train on a GPU."
            )

    def state_bytes(self, dim: int) -> int:
        """Bytes of optimizer state of one row; the state is fp32 whatever the weights are.

        Example:
            >>> TableOptimizerConfig(name="adagrad").state_bytes(64)
            256
        """
        return {"row_wise_adagrad": 4, "adagrad": 4 * dim, "adam": 8 * dim, "sgd": 0}[self.name]


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """One table's settings; None takes what holds for all.

    Attributes:
        weight_dtype: Precision of its weights.
        output_dtype: Precision of the vectors that are looked up.
        optimizer: Its optimizer.
        learning_rate: Its learning rate, which follows the same schedule.
        frozen: Whether it is only looked up: no backward, no optimizer state.
    """

    weight_dtype: Precision | None = None
    output_dtype: Precision | None = None
    optimizer: OptimizerName | None = None
    learning_rate: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(
                f"tables.each[...].learning_rate={self.learning_rate}: choose above 0; a table that does not learn has "
                "frozen: true."
            )
        if self.optimizer not in (None, *get_args(OptimizerName)):
            raise ValueError(
                f"tables.each[...].optimizer={self.optimizer!r}: choose one of {', '.join(get_args(OptimizerName))}."
            )


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """What the trained tables are made of, and how single ones learn.

    Attributes:
        weight_dtype: Precision of weights; bf16 on a GPU only.
        output_dtype: Precision of the vectors that are looked up, and of their way between ranks.
        each: What differs for single tables, by feature (``item``, ``item.brand``, ``user``).
    """

    weight_dtype: Precision = "fp32"
    output_dtype: Precision = "fp32"
    each: dict[str, TableSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {"tables": self, **{f"tables.each[{name!r}]": table for name, table in self.each.items()}}
        for name, table in named.items():
            for dtype in ("weight_dtype", "output_dtype"):
                if getattr(table, dtype) not in (None, *get_args(Precision)):
                    raise ValueError(
                        f"{name}.{dtype}={getattr(table, dtype)!r}: choose one of {', '.join(get_args(Precision))}."
                    )

    def weight_dtype_of(self, table: str) -> Precision:
        """Precision of a table's weights."""
        return self._of(table).weight_dtype or self.weight_dtype

    def output_dtype_of(self, table: str) -> Precision:
        """Precision of the vectors that are looked up in a table."""
        return self._of(table).output_dtype or self.output_dtype

    def is_frozen(self, table: str) -> bool:
        """Whether a table is only looked up."""
        return self._of(table).frozen

    def optimizer_of(self, table: str, general: TableOptimizerConfig) -> TableOptimizerConfig:
        """How a table learns, where `general` holds for all that do not differ."""
        own = self._of(table)
        return replace(
            general,
            name=own.optimizer or general.name,
            learning_rate=own.learning_rate or general.learning_rate,
        )

    def refuse_on(self, device_type: str) -> None:
        """Refuse what a kind of device cannot do.

        Raises:
            ValueError: Names the field and what to choose instead.
        """
        if device_type != "cpu":
            return
        named = {"tables": self, **{f"tables.each[{name!r}]": table for name, table in self.each.items()}}
        for name, table in named.items():
            for dtype in ("weight_dtype", "output_dtype"):
                if getattr(table, dtype) == "bf16":
                    raise ValueError(f"{name}.{dtype}='bf16': FBGEMM has none on a CPU; choose 'fp16' or 'fp32'.")
        for name, table in self.each.items():
            if table.optimizer is not None:
                TableOptimizerConfig(name=table.optimizer).refuse_on(device_type, f"tables.each[{name!r}].optimizer")

    def refuse_unknown(self, tables: Iterable[str]) -> None:
        """Refuse settings of tables that there are not.

        Raises:
            ValueError: Names the table, and those there are.
        """
        known = sorted(tables)
        for name in self.each:
            if name not in known:
                raise ValueError(
                    f"tables.each: {name!r} is no trained table of this run; there are {', '.join(known)}."
                )

    def _of(self, table: str) -> TableSettings:
        return self.each.get(table, TableSettings())
