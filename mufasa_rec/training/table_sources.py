"""Where tables and modules can be taken from by name: the checkpoint of a run, or an exported folder."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Protocol

from torch import Tensor

from mufasa_rec.data import paths
from mufasa_rec.data.item_lookup import VOCABULARY_FILE, ItemVocabulary
from mufasa_rec.data.matrices import Rows
from mufasa_rec.data.row_ids import RowIds, load_row_ids
from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.table_rows import is_of_tables
from mufasa_rec.training.checkpoint import check_intact, find_checkpoint
from mufasa_rec.training.checkpoint_manifest import FileFacts, file_facts
from mufasa_rec.training.checkpoint_tensors import CheckpointTensors
from mufasa_rec.training.saver import FOLDER as CHECKPOINTS
from mufasa_rec.training.table_files import TABLES_FILE, ExportedTables

_MODEL = "model."


class TableSource(Protocol):
    """Tables and data-parallel weights by name.

    Attributes:
        where: What messages call it.
        about: What is known of its origin, such as the `split` that it was trained on.
    """

    where: str
    about: dict[str, Any]

    def tables(self) -> list[str]:
        """Names of the tables."""
        ...

    def rows(self, table: str) -> Rows:
        """Open a table's rows."""
        ...

    def ids(self, table: str) -> RowIds | None:
        """What a table's rows stand for."""
        ...

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the data-parallel weights."""
        ...

    def module(self, name: str) -> Tensor:
        """One data-parallel weight."""
        ...


class CheckpointTables:
    """Tables and modules of a run's checkpoint; implements `TableSource`.

    Args:
        run: The run folder.
        checkpoint: One of its checkpoints, whose files were found to be as they were written.

    Raises:
        ValueError: When the run does not say what its tables' rows stand for.
    """

    def __init__(self, run: paths.Location, checkpoint: paths.Location) -> None:
        self.where = str(checkpoint)
        self.about = {"run": PurePosixPath(str(run)).name, "checkpoint": PurePosixPath(self.where).name}
        if paths.exists(paths.join(run, VOCABULARY_FILE)):
            self.about["split"] = ItemVocabulary.load(run).split
        self._ids = load_row_ids(run)
        if not self._ids:
            raise ValueError(f"{run}: has no folder row_ids, which names the rows of its tables; give a run folder.")
        self._tensors = CheckpointTensors(checkpoint)
        endings = {f".{ids.parameter}.weight": table for table, ids in self._ids.items()}
        self._tables: dict[str, str] = {}
        self._modules: list[str] = []
        for name in self._tensors.names(_MODEL):
            ending = "." + ".".join(name.rsplit(".", 2)[-2:])
            if ending in endings:
                self._tables[endings[ending]] = name
            elif not is_of_tables(name):  # tables that row_ids does not name have no rows by id
                self._modules.append(name.removeprefix(_MODEL))

    def tables(self) -> list[str]:
        """Names of the tables."""
        return sorted(self._tables)

    def rows(self, table: str) -> Rows:
        """Open a table's rows."""
        return self._tensors.rows(self._tables[table])

    def ids(self, table: str) -> RowIds | None:
        """What a table's rows stand for."""
        return self._ids[table]

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the data-parallel weights."""
        return {name: self._tensors.shape(_MODEL + name) for name in self._modules}

    def module(self, name: str) -> Tensor:
        """One data-parallel weight."""
        return self._tensors.tensor(_MODEL + name)


def open_source(
    source: paths.Location,
    exchange: RankExchange,
    *,
    checkpoint: str = "best",
    checkpoints: paths.Location | None = None,
) -> TableSource:
    """Open a run or an exported folder after its checksums; collective, and an error on all ranks or on none.

    Args:
        source: Run folder or exported folder.
        exchange: Reaches the other ranks; each checks some of the files.
        checkpoint: Which checkpoint of a run: `best`, `newest`, or a step.
        checkpoints: Where the run's checkpoints lie; in the run folder when None.

    Raises:
        ValueError: When there is nothing of the kind, or a file is not as it was written.
    """
    if on_all_ranks(exchange, lambda: paths.exists(paths.join(source, TABLES_FILE))):
        exported = on_all_ranks(exchange, lambda: ExportedTables(source))
        mine = dict(sorted(exported.facts.items())[exchange.rank :: exchange.world_size])
        on_all_ranks(exchange, lambda: _check_files(exported.where, mine))
        return exported
    if not on_all_ranks(exchange, lambda: paths.exists(source)):
        raise ValueError(f"{source}: no such folder; give a run folder, or one that the export wrote.")
    location = checkpoints or paths.join(source, CHECKPOINTS)
    folder = on_all_ranks(exchange, lambda: find_checkpoint(location, checkpoint))
    check_intact(folder, exchange)
    return on_all_ranks(exchange, lambda: CheckpointTables(source, folder))


def _check_files(folder: str, files: dict[str, FileFacts]) -> None:
    """Refuse a file that is not as it was written."""
    for name, wanted in files.items():
        file = paths.join(folder, name)
        if file_facts(file) != wanted:
            raise ValueError(f"{file}: not as it was written (size or checksum); copy it again, or export it again.")
