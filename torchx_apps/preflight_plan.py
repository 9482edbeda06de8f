"""Whether a training fits the machines that its job asks for, by the plan that TorchRec makes of its tables."""

from __future__ import annotations

import re

from mufasa_rec.config import RunConfig
from mufasa_rec.data.schema import DatasetManifest
from mufasa_rec.planning.report import PlanReport, Remedy, size
from mufasa_rec.planning.topology import Topology
from torchx_apps import assembly
from torchx_apps.plan_run import plan_run
from torchx_apps.preflight_findings import Findings, Machines

MB = 10**6
_MOST_REMEDIES = 3


def check_tables(config: RunConfig, manifest: DatasetManifest, findings: Findings) -> None:
    """Plan a training on the machines of its job.

    Args:
        config: The run.
        manifest: `dataset.json` of its data set, which can be read from here.
        findings: Takes what is found.

    Raises:
        ValueError: For what such machines cannot do.
    """
    topology = topology_of(findings.machines)
    if topology is None:
        findings.unseen.append(
            "plan of the tables: the make of the GPUs is not known; ask for a machine by its name (-h h100x8), or see "
            "`python -m torchx_apps.plan --topology ...`"
        )
        return
    report = plan_run(config, manifest, topology, remedies=False)
    if not report.fits:  # counted with a row for every item; rare ones share one
        rows = assembly.open_dataset(config).catalog.vocabulary.size
        report = plan_run(config, manifest, topology, item_rows=rows)
    if report.fits:
        findings.checked.append(f"plan of the tables on {topology.name}: {report.verdict}")
    else:
        findings.problems.append(refusal(report))


def topology_of(machines: Machines) -> Topology | None:
    """The machines of a job as they are planned for; None when that is not known."""
    if not machines.processes or (machines.gpus and machines.accelerator is None):
        return None
    device = machines.accelerator if machines.gpus else "CPU"
    own = {"ddr_bytes": machines.memory_mb * MB // machines.processes} if machines.memory_mb else {}
    try:
        return Topology.parse(f"{machines.nodes}x{machines.processes}x{device}", **own)
    except ValueError:  # a make that nobody has described yet
        return None


def refusal(report: PlanReport) -> str:
    """What does not fit, and what would."""
    fitting = [remedy for remedy in report.remedies if remedy.fits]
    if fitting:
        remedies = "; or ".join(_words(remedy) for remedy in fitting[:_MOST_REMEDIES])
        return f"plan of the tables on {report.topology.name}: {report.verdict}. It fits with {remedies}"
    helping = "; ".join(
        f"{_words(remedy)} (then {size(remedy.memory_bytes)})" for remedy in report.remedies[:_MOST_REMEDIES]
    )
    return (
        f"plan of the tables on {report.topology.name}: {report.verdict}. No single change makes it fit; what helps "
        f"most: {helping or 'more or larger machines'}"
    )


def _words(remedy: Remedy) -> str:
    options = re.sub(r"--topology (\d+x\d+)x\w+", r"-j \1", remedy.options)
    return f"{remedy.change}: {options}"
