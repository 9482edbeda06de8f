"""What is wrong (or worth knowing): which check says so, what, where, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mufasa_rec.diagnosis.source import failing_line

# In the order in which a reader wants them: what comes first explains what comes after.
CHECKS = ("configuration", "data", "tables", "pipeline", "step", "gradients", "host waits")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or that is as it is meant and worth knowing.

    Attributes:
        check: Which check found it, one of `CHECKS`.
        what: What is wrong.
        where: The line (`file:line`), field, table or parameter.
        remedy: What to do about it.
        is_fault: Whether it is wrong; False for what is meant.
        ranks: Ranks that found it.
    """

    check: str
    what: str
    where: str
    remedy: str
    is_fault: bool = True
    ranks: tuple[int, ...] = (0,)


def of_refusal(check: str, error: Exception) -> Finding:
    """A finding from an error that names `field=value: what; remedy`, as the errors of this project do.

    Example:
        >>> found = of_refusal("configuration", ValueError("data.batch_size=3: not a multiple of 8; choose 8 or 16."))
        >>> found.where, found.what, found.remedy
        ('data.batch_size=3', 'not a multiple of 8', 'choose 8 or 16.')
    """
    where, colon, rest = str(error).partition(": ")
    what, semicolon, remedy = rest.rpartition("; ")
    if not colon:
        where, what, remedy = check, str(error), "correct it and look again"
    elif not semicolon:  # what is refused and what to do instead are one sentence
        what, remedy = rest, "correct it as said, and look again"
    return Finding(check=check, what=what, where=where, remedy=remedy)


def of_failure(check: str, doing: str, error: BaseException) -> Finding:
    """A finding from an error that nobody foresaw, with the line of the user's code that it came from."""
    line = failing_line(error)
    said = str(error).strip().splitlines() or [""]
    return Finding(
        check=check,
        what=f"{doing} failed: {type(error).__name__}: {said[0]}",
        where=str(line) if line else type(error).__name__,
        remedy=f"correct `{line.text}`" if line and line.text else "see the traceback with --traceback",
    )


def merged(by_rank: Iterable[Iterable[Finding]]) -> list[Finding]:
    """The findings of all ranks, each once with the ranks that found it, in the order of the checks."""
    found: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            found.setdefault(replace(finding, ranks=()), []).append(rank)
    whole = [replace(finding, ranks=tuple(sorted(set(ranks)))) for finding, ranks in found.items()]
    return sorted(whole, key=lambda finding: (not finding.is_fault, CHECKS.index(finding.check)))
