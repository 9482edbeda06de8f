"""What the doctor says, for a reader and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mufasa_rec.diagnosis.examination import Examination
from mufasa_rec.diagnosis.finding import CHECKS, Finding

_MEMORY = ("tables", "dense", "gradients", "optimizer", "peak_growth")


@dataclass
class Report:
    """All that was found, on all ranks.

    Attributes:
        subject: What was examined.
        device: On what kind of device.
        world_size: On how many ranks.
        findings: What is wrong, then what is meant.
        modules: Sharded modules, and whether each is pipelined.
        parameters: Data-parallel parameters, and whether each has a gradient.
        memory: Bytes by what they are for, of each rank.
        num_steps: Steps that were done.
        notes: What a reader should know of the examination.
        made: Checks before the steps that were made.
    """

    subject: str
    device: str
    world_size: int
    findings: list[Finding] = field(default_factory=list)
    modules: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, bool] = field(default_factory=dict)
    memory: list[dict[str, int]] = field(default_factory=list)
    num_steps: int = 0
    notes: list[str] = field(default_factory=list)
    made: set[str] = field(default_factory=set)

    @property
    def faults(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.is_fault]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def take(self, seen: Examination, memory: Sequence[dict[str, int]], findings: Sequence[Finding]) -> None:
        """Take over what two steps showed: of this rank, and the memory and findings of all."""
        self.modules, self.parameters, self.num_steps = seen.modules, seen.parameters, seen.num_steps
        self.memory = [dict(one) for one in memory if one]
        self.findings = list(findings)

    def as_json(self) -> dict[str, Any]:
        """One object: the verdict, each check, and everything behind it."""
        return {
            "healthy": self.is_healthy,
            "subject": self.subject,
            "device": self.device,
            "world_size": self.world_size,
            "steps": self.num_steps,
            "checks": {name: {"state": state, "said": said} for name, state, said in self._checks()},
            "findings": [asdict(finding) for finding in self.findings],
            "modules": [{"name": name, "pipelined": done} for name, done in self.modules.items()],
            "parameters_without_gradient": [name for name, has in self.parameters.items() if not has],
            "memory": [{"rank": rank, **sizes} for rank, sizes in enumerate(self.memory)],
            "notes": self.notes,
        }

    def page(self) -> str:
        """The report for a reader."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        lines = [f"doctor: {self.subject} · {self.device}, {ranks}", ""]
        lines += [f"  {state:<7} {name:<14} {said}" for name, state, said in self._checks()]
        lines += self._memory_lines()
        for number, finding in enumerate(self.faults, start=1):
            lines += ["", *_paragraph(f"{number}. ", finding, self.world_size)]
        meant = [finding for finding in self.findings if not finding.is_fault]
        if meant:
            lines += ["", "meant, and no fault:"]
            lines += [f"  {finding.where}: {finding.remedy.removeprefix('none: ')}" for finding in meant]
        lines += [f"note: {note}" for note in self.notes]
        number = len(self.faults)
        return "\n".join([*lines, "", "healthy" if not number else f"{number} fault{'s' * (number > 1)}"])

    def _checks(self) -> list[tuple[str, str, str]]:
        """Every check with `ok`, `FAULT` or `not run`, and a sentence."""
        found = []
        for name in CHECKS:
            faults = sum(finding.check == name for finding in self.faults)
            said = self._said(name)
            if faults:
                counted = f"; {said}" if said and name not in self.made else ""
                found.append((name, "FAULT", f"{faults} found{counted}"))
            elif said:
                found.append((name, "ok", said))
            else:
                found.append((name, "not run", "an earlier fault is in the way"))
        return found

    def _said(self, name: str) -> str:
        """What a check has to say; empty when it was not made."""
        if name in ("pipeline", "gradients", "host waits", "step"):
            if name != "step" and not self.num_steps:
                return ""
            pipelined, gradients = sum(self.modules.values()), sum(self.parameters.values())
            meant = sum(not finding.is_fault for finding in self.findings)
            return {
                "pipeline": f"{pipelined} of {len(self.modules)} sharded modules are looked up ahead of their step",
                "gradients": f"{gradients} of {len(self.parameters)} data-parallel parameters have a gradient",
                "host waits": f"watched one step; {meant} that are meant" if self.num_steps > 1 else "",
                "step": f"{self.num_steps} of 2 steps done" if self.num_steps else "",
            }[name]
        said = {
            "configuration": "accepted",
            "data": "every column and feature is there",
            "tables": "every table is what was asked for",
        }
        return said[name] if name in self.made else ""

    def _memory_lines(self) -> list[str]:
        if not self.memory:
            return []
        head = f"{'memory, MiB':<16}" + "".join(f"{name.replace('_', ' '):>14}" for name in _MEMORY)
        rows = [
            f"{f'rank {rank}':<16}" + "".join(f"{sizes[name] / 2**20:>14,.1f}" for name in _MEMORY)
            for rank, sizes in enumerate(self.memory)
        ]
        return ["", *(f"  {line}" for line in (head, *rows))]


def _paragraph(number: str, finding: Finding, world_size: int) -> list[str]:
    indent = " " * len(number)
    ranks = ", ".join(map(str, finding.ranks))
    where = finding.where + (f" (rank {ranks})" if len(finding.ranks) < world_size else "")
    return [f"{number}{where}", f"{indent}{finding.what}", f"{indent}remedy: {finding.remedy}"]
