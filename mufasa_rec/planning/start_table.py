"""What each table became, in words: for the log of a start, and for the description of a run."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.types import ParameterSharding, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection

from mufasa_rec.distributed.managed_collision import INSIDE
from mufasa_rec.distributed.sharding import precision_of
from mufasa_rec.modules.sparse_arch import CONTENT, SparseArch
from mufasa_rec.planning.report import aligned

_HEAD = ("table", "rows", "dim", "dtype", "output", "sharding", "kernel", "ranks", "optimizer", "learning rate")


def start_table(model: nn.Module, plan: ShardingPlan) -> list[str]:
    """Lines of a table of all tables of a model that is about to be sharded.

    Args:
        model: The unsharded model, fused optimizers attached.
        plan: How it will be sharded.
    """
    rows, contents = [], {}
    for path, module in model.named_modules():
        if isinstance(module, SparseArch):
            contents = {f"{CONTENT}.{content.modality}": content for content in module.contents}
        if not isinstance(module, EmbeddingCollection):
            continue
        whole = path.removesuffix(f".{INSIDE}")  # a managed collection is planned as a whole
        planned: dict[str, ParameterSharding] = plan.plan[whole]  # type: ignore[assignment]
        for table in module.embedding_configs():
            part = planned[table.name]
            weight = next(module.embeddings[table.name].parameters())
            rate = float(getattr(weight, "_optimizer_kwargs")[0]["lr"])  # noqa: B009  TorchRec's own attribute
            name = str(getattr(weight, "_optimizer_classes")[0].__name__)  # noqa: B009
            feature = table.feature_names[0]
            content = contents.get(feature)
            dtype = content.precision if content else precision_of(table)
            rows.append(
                (feature, f"{table.num_embeddings:,}", str(content.width if content else table.embedding_dim), dtype,
                 "fp32" if part.output_dtype is None else part.output_dtype.value.lower(), part.sharding_type,
                 part.compute_kernel, ranks_of(part), name if rate else "frozen", f"{rate:g}" if rate else "")
            )  # fmt: skip
    for feature, content in contents.items():
        if content.placement == "host":
            size = f"{content.num_embeddings:,}", str(content.width)
            rows.append((feature, *size, content.precision, "fp32", "host", "memory_map", "", "frozen", ""))
    return aligned([_HEAD, *rows])


def plan_lines(plan: ShardingPlan) -> str:
    """A plan as lines of text: table, sharding type, kernel, ranks."""
    return "\n".join(
        f"{path}.{table}: {part.sharding_type}, {part.compute_kernel}, ranks {ranks_of(part)}"
        for path, module in plan.plan.items()
        for table, part in module.items()  # type: ignore[attr-defined]
    )


def ranks_of(part: ParameterSharding) -> str:
    """The ranks of a table, runs of them as `first-last`.

    Example:
        >>> ranks_of(ParameterSharding("row_wise", "fused", ranks=[0, 1, 2, 5]))
        '0-2,5'
    """
    runs: list[list[int]] = []
    for rank in sorted(set(part.ranks or ())):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
