"""Errors that become findings, findings of several ranks, and what a process held at most."""

from __future__ import annotations

import pytest
import torch

from mufasa_rec.diagnosis.examination import Examination
from mufasa_rec.diagnosis.finding import Finding, merged, of_failure, of_refusal
from mufasa_rec.diagnosis.memory import PeakMemory
from mufasa_rec.diagnosis.report import Report
from mufasa_rec.diagnosis.source import failing_line
from mufasa_rec.distributed.env import DistributedEnv
from tests.helpers.ranks import run_ranks


def finding(where: str, check: str = "step", *, is_fault: bool = True) -> Finding:
    return Finding(check=check, what="it is", where=where, remedy="do", is_fault=is_fault)


@pytest.mark.parametrize(
    ("said", "where", "what"),
    [
        ("a.b=3: too small; choose 4.", "a.b=3", "too small"),
        ("file x: row 3: no item; add it.", "file x", "row 3: no item"),
        ("a.b: choose 4.", "a.b", "choose 4."),
        ("no colon", "data", "no colon"),
    ],
)
def test_refusal_is_taken_apart_into_place_fault_and_remedy(said: str, where: str, what: str) -> None:
    found = of_refusal("data", ValueError(said))
    assert (found.check, found.where, found.what) == ("data", where, what)
    assert found.remedy


def test_failure_is_put_down_to_the_users_line_and_not_to_the_librarys() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.ones(2, 3) @ torch.ones(2, 3)  # this line
    found, line = of_failure("step", "step 1", failed.value), failing_line(failed.value)
    assert line is not None
    assert line.text.endswith("# this line")
    assert found.where.startswith("tests/diagnosis/test_finding.py:")
    assert "RuntimeError" in found.what


def test_findings_of_ranks_are_merged_and_ordered_faults_first() -> None:
    note, early, late = finding("n", "data", is_fault=False), finding("e", "data"), finding("l", "gradients")
    found = merged([[note, late], [late, early]])
    assert [(one.where, one.ranks) for one in found] == [("e", (1,)), ("l", (0, 1)), ("n", (0,))]


def test_page_says_which_rank_found_a_fault_when_not_all_did() -> None:
    report = Report(subject="x", device="cpu", world_size=2)
    report.take(Examination(), [], merged([[], [finding("somewhere")]]))
    assert "1. somewhere (rank 1)" in report.page()
    assert not report.is_healthy


def grown(env: DistributedEnv) -> tuple[int, int]:
    """Bytes that were touched, and the growth that is measured."""
    peak = PeakMemory(env.device)
    held = torch.ones(32 * 2**20)
    return held.nbytes, peak.growth()


def test_growth_of_memory_is_what_was_touched() -> None:
    ((held, growth),) = run_ranks(grown, 1)  # a process that has nothing to use again
    assert 0.95 * held <= growth <= 1.25 * held
