"""What a pre-flight looks at for the programs that come before a run: the doctor and the plan."""

from __future__ import annotations

import argparse
import os

from mufasa_rec.config import RunConfig
from mufasa_rec.planning.topology import Topology
from torchx_apps import command_line, doctor, plan
from torchx_apps.imagined import CATALOGS, described, numbers
from torchx_apps.preflight_data import check_dataset
from torchx_apps.preflight_findings import Findings


def check_doctor(arguments: list[str], findings: Findings) -> None:
    """Look at an examination."""
    _check_configured(doctor.make_parser(), arguments, findings)


def check_plan(arguments: list[str], findings: Findings) -> None:
    """Look at a planning."""
    options = _check_configured(plan.make_parser(), arguments, findings)
    if not options.topology:
        raise ValueError("--topology: missing; give one such as 8xH100, 128x8xH100 or 2xCPU.")
    Topology.parse(options.topology, **numbers("--hardware", options.hardware))
    if options.save:
        findings.writable("--save", os.path.dirname(options.save) or ".")


def _check_configured(parser: argparse.ArgumentParser, arguments: list[str], findings: Findings) -> argparse.Namespace:
    """Look at what a program is told of a configuration and its data, that may be only described."""
    options, _ = parser.parse_known_args(arguments)
    if options.config and not findings.readable("--config", options.config, "check the path"):
        return options
    options, config = command_line.parse(parser, arguments, lambda given: None)
    if getattr(options, "factory", None):
        findings.unseen.append(f"--factory {options.factory}: is imported where the job runs")
    elif getattr(options, "manifest", None):
        findings.readable("--manifest", options.manifest, "give a dataset.json")
    elif not _is_described(options, config):
        check_dataset("data.dataset", config.data.dataset, config.data.split, findings)
    return options


def _is_described(options: argparse.Namespace, config: RunConfig) -> bool:
    """Whether a program needs no data set: a catalog is described, or `plan` takes that of a preset."""
    of_preset = hasattr(options, "manifest") and options.preset in CATALOGS and not config.data.dataset
    return of_preset or described(options) is not None
