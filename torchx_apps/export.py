"""Export the tables of a trained run as safetensors and JSON, to be read by name and by rows.

    python -m torchx_apps.export --run RUN [--checkpoint best|newest|STEP] [--tables item,event.device] --output FOLDER

Every process writes its own share of each table's rows, straight from the checkpoint: no model is built, and no process
holds a table. Without --tables all tables are exported, and the data-parallel weights with them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.distributed.agreement import on_all_ranks
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import distributed
from mufasa_rec.training.table_files import write_tables
from mufasa_rec.training.table_sources import TableSource, open_source
from torchx_apps import tables as run_tables

logger = logging.getLogger(__name__)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and export."""
    options = make_parser().parse_args(argv)
    names = None if options.tables is None else tuple(filter(None, options.tables.split(",")))
    try:
        with distributed():
            export(options.run, options.output, RankExchange(), checkpoint=options.checkpoint, tables=names)
    except (ValueError, OSError) as error:
        raise SystemExit(f"export: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder")
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best (by validation), newest, or a step (best)"
    )
    parser.add_argument("--tables", metavar="NAME,...", help="tables to export, such as item; all when left out")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder or URL to write; must not exist")
    return parser


def export(
    run: str,
    output: str,
    exchange: RankExchange,
    *,
    checkpoint: str = "best",
    tables: tuple[str, ...] | None = None,
) -> None:
    """Export tables of a run; collective.

    Args:
        run: Run folder.
        output: Folder or URL to write.
        exchange: Reaches the other ranks.
        checkpoint: Which checkpoint: `best`, `newest`, or a step.
        tables: Tables to export; None for all of them and the data-parallel weights.

    Raises:
        ValueError: When the run has no such checkpoint or table, or the output exists.
    """
    location = on_all_ranks(exchange, lambda: run_tables.checkpoints_of(run))
    source = open_source(run, exchange, checkpoint=checkpoint, checkpoints=location)
    names = on_all_ranks(exchange, lambda: _chosen(source, tables))
    opened = on_all_ranks(exchange, lambda: {name: (source.rows(name), source.ids(name)) for name in names})
    modules = on_all_ranks(exchange, lambda: _modules(source) if tables is None and exchange.rank == 0 else {})
    write_tables(output, opened, modules, source.about, exchange)
    if exchange.rank == 0:
        for name, (rows, _) in opened.items():
            logger.info("table %s: %d rows of %d exported", name, rows.rows, rows.dim)
        logger.info("%s exported to %s", source.where, output)


def _chosen(source: TableSource, tables: tuple[str, ...] | None) -> list[str]:
    there = source.tables()
    if tables is None:
        return there
    missing = [name for name in tables if name not in there]
    if missing or not tables:
        raise ValueError(
            f"--tables {','.join(tables)}: no {', '.join(missing) or 'table'}; there are {', '.join(there)}."
        )
    return list(dict.fromkeys(tables))


def _modules(source: TableSource) -> dict[str, Tensor]:
    return {name: source.module(name) for name in source.modules()}


if __name__ == "__main__":
    main()
