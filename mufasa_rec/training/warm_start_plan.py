"""What a run starts from: the configuration, and the check of all that is to be taken before a weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mufasa_rec.data.matrices import Rows, open_matrix
from mufasa_rec.data.row_ids import RowIds, match
from mufasa_rec.training.table_sources import TableSource


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """What a new run starts from instead of random weights.

    Attributes:
        source: Another run's folder, or a folder that the export wrote; empty for none.
        checkpoint: Which checkpoint of that run: `best`, `newest`, or a step.
        tables: Tables to take; all of this model's when None, but for those with a matrix.
        modules: Data-parallel weights to take, by the beginning of their names; all when None.
        rename: `NAME=SOURCE` for what is called otherwise there: tables, or beginnings of module names.
        matrices: `TABLE=FILE` for tables that start from a matrix of one's own.
        allow_other_split: Whether the source may have been trained on another split; it may then have seen events that
            this run is evaluated on, unless they all lie before this split's targets.
    """

    source: str = ""
    checkpoint: str = "best"
    tables: tuple[str, ...] | None = None
    modules: tuple[str, ...] | None = None
    rename: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    allow_other_split: bool = False

    def __post_init__(self) -> None:
        for field in ("rename", "matrices"):
            given = getattr(self, field)
            names = [text.partition("=")[0] for text in given]
            for text in given:
                name, _, value = text.partition("=")
                if not name or not value or names.count(name) > 1:
                    raise ValueError(f"warm_start.{field}={text!r}: write NAME=VALUE, each name once.")
        if not self.source and (self.tables or self.modules or self.rename):
            raise ValueError("warm_start.source: missing; give the run or the export that the others are names in.")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to start from."""
        return bool(self.source or self.matrices)


@dataclass(frozen=True)
class TableCopy:
    """Rows of one table to take.

    Attributes:
        table: The table.
        source: Where the rows come from.
        rows: Rows of the table to fill, int64 `[n]`.
        places: Their rows in the source, `[n]`.
        summary: What the log says.
    """

    table: str
    source: Rows
    rows: np.ndarray
    places: np.ndarray
    summary: str


def plan(
    config: WarmStartConfig,
    ids: Mapping[str, RowIds],
    shapes: Mapping[str, tuple[int, int]],
    modules: Mapping[str, Tensor],
    source: TableSource | None,
) -> tuple[list[TableCopy], dict[str, str]]:
    """Match what is to be taken with what is there; nothing is read but names, shapes and ids.

    Args:
        config: What to take.
        ids: What the rows of this model's tables stand for, by table.
        shapes: Rows and dim of this model's tables, by parameter.
        modules: This model's data-parallel weights.
        source: Where tables and modules come from; None with matrices alone.

    Returns:
        Rows to copy, and the names of data-parallel weights with those that they have in the source.

    Raises:
        ValueError: Names everything that does not fit.
    """
    problems: list[str] = []
    copies = _check_matrices(config, ids, shapes, problems)
    names: dict[str, str] = {}
    if source is not None:
        copies += _check_tables(config, ids, shapes, source, problems)
        names = _check_modules(config, modules, source, problems)
        _check_renames(config, ids, names, problems)
    if problems:
        where = "the given matrices" if source is None else source.where
        raise ValueError(f"warm_start: cannot start from {where}:\n- " + "\n- ".join(problems))
    return copies, names


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _check_tables(
    config: WarmStartConfig,
    ids: Mapping[str, RowIds],
    shapes: Mapping[str, tuple[int, int]],
    source: TableSource,
    problems: list[str],
) -> list[TableCopy]:
    """What to copy from the source, table by table; what does not fit is added to `problems`."""
    renamed, there = _pairs(config.rename), source.tables()
    taken = [table for table in ids if table not in _pairs(config.matrices)] if config.tables is None else config.tables
    copies = []
    for table in taken:
        name = renamed.get(table, table)
        if table not in ids:
            problems.append(f"table {table}: not in this model, which has {', '.join(ids)}; correct warm_start.tables.")
            continue
        if name not in there:
            problems.append(
                f"table {name}: not there, it has {', '.join(there) or 'no tables'}; name the one to take by "
                f"warm_start.rename {table}=NAME, or leave {table} out of warm_start.tables."
            )
            continue
        rows, theirs = source.rows(name), source.ids(name)
        if theirs is None:
            problems.append(f"table {name}: does not say what its rows stand for; import it by warm_start.matrices.")
            continue
        problem = _misfit(table, ids[table], shapes, rows, theirs.rows)
        if problem:
            problems.append(problem)
            continue
        copy = _by_ids(table, ids[table], rows, theirs.ids, 1, source.where, problems)
        if copy is not None:
            shared = np.zeros(1, dtype=np.int64)  # the row of all others
            copies.append(
                TableCopy(
                    table,
                    rows,
                    np.concatenate([shared, copy.rows]),
                    np.concatenate([shared, copy.places]),
                    copy.summary,
                )
            )
    return copies


def _check_matrices(
    config: WarmStartConfig, ids: Mapping[str, RowIds], shapes: Mapping[str, tuple[int, int]], problems: list[str]
) -> list[TableCopy]:
    """What to copy from files; what does not fit is added to `problems`."""
    copies = []
    for table, file in _pairs(config.matrices).items():
        if table not in ids:
            problems.append(
                f"table {table}: not in this model, which has {', '.join(ids)}; correct warm_start.matrices."
            )
            continue
        try:
            matrix = open_matrix(file)
        except ValueError as error:
            problems.append(f"table {table}: {error}")
            continue
        size = ids[table].rows
        problem = _misfit(table, ids[table], shapes, matrix.rows, matrix.rows.rows)
        if problem is None and matrix.ids is None and matrix.rows.rows != size:
            problem = (
                f"table {table}: {file} has {matrix.rows.rows:,} rows and no ids, the table has {size:,}; give ids, or "
                "one row for every row of the table."
            )
        if problem:
            problems.append(problem)
        elif matrix.ids is None:
            every = np.arange(size)
            copies.append(TableCopy(table, matrix.rows, every, every, f"table {table}: all {size:,} rows from {file}"))
        elif copy := _by_ids(table, ids[table], matrix.rows, matrix.ids, 0, file, problems):
            copies.append(copy)
    return copies


def _misfit(table: str, mine: RowIds, shapes: Mapping[str, tuple[int, int]], rows: Rows, named: int) -> str | None:
    """Why a matrix cannot fill a table, if so."""
    size, dim = shapes[mine.parameter]
    if size != mine.rows:
        return (
            f"table {table}: has {size:,} rows here, but {mine.rows:,} are named; was the data set changed meanwhile?"
        )
    if rows.dim != dim:
        return (
            f"table {table}: has dim {rows.dim} there, {dim} here; train with a width of {rows.dim}, or leave it out."
        )
    if rows.rows != named:
        return f"table {table}: has {rows.rows:,} rows there, but {named:,} are named; write it again."
    return None


def _by_ids(
    table: str, mine: RowIds, rows: Rows, theirs: np.ndarray, shared: int, where: str, problems: list[str]
) -> TableCopy | None:
    """Match a table's rows by their ids; `shared` rows come before those with ids in the source."""
    places = match(mine.ids, theirs)
    known = np.flatnonzero(places >= 0)
    count, size = len(known), len(mine.ids)
    if size and not count:
        problems.append(
            f"table {table}: none of its {size:,} ids is among the {len(theirs):,} there; was it trained on other "
            "items, or with other names? Leave it out, or correct the ids."
        )
        return None
    summary = (
        f"table {table}: {count:,} of {size:,} rows taken from {where}, {size - count:,} keep their initial weights"
    )
    return TableCopy(table, rows, known + 1, places[known] + shared, summary)


def _check_modules(
    config: WarmStartConfig, mine: Mapping[str, Tensor], source: TableSource, problems: list[str]
) -> dict[str, str]:
    """Names of this model's weights to those in the source; what does not fit is added to `problems`."""
    theirs = source.modules()
    chosen = {name: _renamed(name, config) for name in mine if _chosen(name, config.modules)}
    for prefix in config.modules or ():
        if not any(_chosen(name, (prefix,)) for name in mine):
            problems.append(f"module {prefix}: not in this model; its weights begin with {_beginnings(mine)}.")
    wrong = []
    for name, other in chosen.items():
        shape = tuple(mine[name].shape)
        if other not in theirs:
            wrong.append(f"module {name}: {other} is not there")
        elif theirs[other] != shape:
            wrong.append(f"module {name}: has shape {theirs[other]} there, {shape} here")
    if config.modules is None:
        for other in sorted(set(theirs) - set(chosen.values())):
            wrong.append(f"module {other}: is there with shape {theirs[other]}, but not in this model")
    if wrong:
        problems += [
            *wrong,
            "modules: name them by warm_start.rename, or list in warm_start.modules what is to be taken",
        ]
    return chosen


def _chosen(name: str, prefixes: tuple[str, ...] | None) -> bool:
    return prefixes is None or any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def _renamed(name: str, config: WarmStartConfig) -> str:
    """A weight's name in the source: the longest renamed beginning decides."""
    found = {mine: other for mine, other in _pairs(config.rename).items() if f"{name}.".startswith(f"{mine}.")}
    if not found:
        return name
    longest = max(found, key=len)
    return found[longest] + name[len(longest) :]


def _beginnings(names: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))


def _check_renames(
    config: WarmStartConfig, ids: Mapping[str, RowIds], modules: Mapping[str, str], problems: list[str]
) -> None:
    for name, other in _pairs(config.rename).items():
        if name not in ids and not any(_chosen(module, (name,)) for module in modules):
            problems.append(
                f"rename {name}={other}: nothing that is taken is called {name}; write NAME-HERE=NAME-THERE."
            )
