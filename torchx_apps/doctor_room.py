"""Where an examination takes place: the ranks, the report, and errors that become findings."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from mufasa_rec.diagnosis.examination import Examination, Ready, examine
from mufasa_rec.diagnosis.finding import Finding, merged, of_failure, of_refusal
from mufasa_rec.diagnosis.memory import PeakMemory
from mufasa_rec.diagnosis.report import Report
from mufasa_rec.distributed.collectives import RankExchange
from mufasa_rec.distributed.env import DistributedEnv

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Room:
    """What every step of an examination needs.

    Args:
        env: This process among its peers; the process group must be up.
        report: Takes what is found.
        show_traceback: Whether errors that nobody foresaw are logged with their traceback.
    """

    def __init__(self, env: DistributedEnv, report: Report, *, show_traceback: bool = False) -> None:
        self.env, self.report, self.show_traceback = env, report, show_traceback
        self.exchange = RankExchange()
        self.peak = PeakMemory(env.device)

    def look(self, check: str, work: Callable[[], Result]) -> Result | None:
        """Do something; what it refuses becomes a finding of this rank, and it gives None."""
        try:
            return work()
        except (ValueError, OSError) as error:
            self._remember(error)
            self.report.findings.append(of_refusal(check, error))
        except Exception as error:
            self._remember(error)
            self.report.findings.append(of_failure(check, check, error))
        return None

    def add(self, findings: Sequence[Finding]) -> None:
        """Take findings over."""
        self.report.findings += findings

    def in_the_way(self, *made: str) -> bool:
        """Whether a rank has found a fault, so that none should go on; collective.

        Args:
            made: Checks that are through with this.
        """
        self.report.made |= set(made)
        return any(self.exchange.objects(not self.report.is_healthy))

    def examine(self, build: Callable[[], Ready | None]) -> None:
        """Build a model, run two steps, and bring all ranks' findings together; collective."""
        ready = self.look("step", build)
        if ready is None:
            self._gather(Examination())
            return
        seen = examine(ready)
        if seen.num_steps < 2 and self.env.world_size > 1:  # the others may wait for this rank in an exchange
            self._alone(seen)
            return
        self._gather(seen)

    def _gather(self, seen: Examination) -> None:
        by_rank = self.exchange.objects((seen.memory, [*self.report.findings, *seen.findings]))
        memory, findings = [one[0] for one in by_rank], merged(one[1] for one in by_rank)
        self.report.take(seen, memory, findings)

    def _alone(self, seen: Examination) -> None:
        self.report.take(seen, [seen.memory], merged([[*self.report.findings, *seen.findings]]))
        for finding in self.report.faults:
            logger.error("%s: %s; %s", finding.where, finding.what, finding.remedy)

    def _remember(self, error: Exception) -> None:
        if self.show_traceback:
            logger.error("%s", "".join(traceback.format_exception(error)))
