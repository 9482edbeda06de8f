"""Plan a run on a cluster, from its configuration and its data set or only the size of one; needs no GPU.

    python -m torchx_apps.plan --preset billion --topology 128x8xH100 [--json] [--save FILE]
    python -m torchx_apps.plan --config shop.yaml --topology 8xH100 [--hardware hbm_bytes=40e9 ...]
    python -m torchx_apps.plan --preset demo --items 2e6 --content title=384 --topology 2xCPU

Prints what each table becomes, memory by rank, an estimate of a step's time, and a verdict; when it does not fit, what
would help, each planned again. A saved plan is used by `train --sharding.plan FILE` on the same number of ranks.
Exit code 0 when it fits, 2 when it does not, 1 for what cannot be planned.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from mufasa_rec.config import RunConfig
from mufasa_rec.data.manifest_json import from_json, load_json
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.distributed.env import setup_logging
from mufasa_rec.planning.plan_file import save_plan
from mufasa_rec.planning.report import page
from mufasa_rec.planning.topology import Topology
from torchx_apps import assembly, command_line
from torchx_apps.imagined import CATALOGS, add_options, described, imagined_manifest, numbers
from torchx_apps.plan_run import plan_run

_DOES_NOT_FIT = 2


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, plan, print the report and save the plan."""
    parser = make_parser()
    setup_logging(0, logging.WARNING)
    try:
        options, config = _parse(parser, argv)
        if not options.topology:
            raise ValueError("--topology: missing; give one such as 8xH100, 128x8xH100 or 2xCPU.")
        topology = Topology.parse(options.topology, **numbers("--hardware", options.hardware))
        manifest, item_rows = _data(config, options)
        report = plan_run(config, manifest, topology, item_rows=item_rows)
        if options.save and not report.fits:
            raise ValueError(f"--save {options.save}: {report.verdict}; there is no plan to save.")
        if options.save:
            save_plan(dict(report.document), options.save)
    except (ValueError, OSError) as error:
        raise SystemExit(f"plan: {error}") from error
    print(json.dumps(report.as_json(), indent=1) if options.json else page(report))
    if not report.fits:
        raise SystemExit(_DOES_NOT_FIT)


def make_parser() -> argparse.ArgumentParser:
    """The program's own options; the others are fields of the configuration."""
    parser = command_line.parser("plan", __doc__)
    parser.add_argument("--topology", metavar="TEXT", help="what it is to run on, such as 8xH100, 128x8xH100, 2xCPU")
    parser.add_argument(
        "--hardware", metavar="NAME=NUMBER", nargs="+", default=[],
        help="numbers of a rank that differ: hbm_bytes, ddr_bytes, inter_node_gb_s, ... (mufasa_rec.planning.topology)",
    )  # fmt: skip
    parser.add_argument("--manifest", metavar="FILE", help="a dataset.json, in place of --data.dataset")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", metavar="FILE", help="write the plan, for `train --sharding.plan FILE`")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, RunConfig]:
    try:
        return command_line.parse(parser, argv, lambda given: None)
    except SystemExit as stop:  # a parser's 2 would be taken for "does not fit"
        raise SystemExit(1 if stop.code == _DOES_NOT_FIT else stop.code) from None


def _data(config: RunConfig, options: argparse.Namespace) -> tuple[DatasetManifest, int | None]:
    """`dataset.json`, and the rows of the items' table where they are known exactly."""
    catalog = described(options)
    if catalog is not None:
        return catalog, None
    if options.manifest:
        return from_json(DatasetManifest, load_json(options.manifest), options.manifest), None
    if config.data.dataset:
        data = assembly.open_dataset(config)
        return data.manifest, data.catalog.vocabulary.size
    if options.preset in CATALOGS:
        return imagined_manifest(**CATALOGS[options.preset]), None
    raise ValueError(
        "data.dataset: missing; give the folder that `prepare` wrote, --manifest dataset.json, or --items N for a "
        "catalog that is not there yet."
    )


if __name__ == "__main__":
    main()
