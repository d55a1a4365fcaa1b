"""What a claim is: a statement, where it comes from, and an experiment that can fail."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsFloat

from ntkdp._results.plain_json import as_json

Relation = Literal["=", "<=", ">="]


class Finding(NamedTuple):
    """One measured number next to the expected one.

    ``relation`` says how they must be related: within ``tolerance`` of each other, or one not above
    the other by more than it.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.claims.Finding("slope", 1.02, "=", 1.0, 0.05).holds
    True
    >>> ntkdp.claims.Finding("largest error", 0.2, "<=", 0.1, 0.0).holds
    False
    """

    quantity: str
    measured: float
    relation: Relation
    expected: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the number is where the claim says; never if it is not a number."""
        if not math.isfinite(self.measured):
            return False
        difference = self.measured - self.expected
        if self.relation == "<=":
            return difference <= self.tolerance
        if self.relation == ">=":
            return -difference <= self.tolerance
        return abs(difference) <= self.tolerance

    def __str__(self) -> str:
        within = f" +- {self.tolerance:.3g}" if self.relation == "=" and self.tolerance else ""
        return (
            f"{self.quantity} = {self.measured:.6g}, expected {self.relation} "
            f"{self.expected:.6g}{within}"
        )


def equal(
    quantity: str, measured: SupportsFloat, expected: SupportsFloat, *, within: float
) -> Finding:
    """The number is within ``within`` of the expected one."""
    return Finding(quantity, float(measured), "=", float(expected), float(within))


def at_most(
    quantity: str, measured: SupportsFloat, bound: SupportsFloat, *, slack: float = 0.0
) -> Finding:
    """The number is not above a bound."""
    return Finding(quantity, float(measured), "<=", float(bound), float(slack))


def at_least(
    quantity: str, measured: SupportsFloat, bound: SupportsFloat, *, slack: float = 0.0
) -> Finding:
    """The number is not below a bound."""
    return Finding(quantity, float(measured), ">=", float(bound), float(slack))


@dataclass(frozen=True)
class Verdict:
    """What checking a claim found.

    ``measured``, ``expected`` and ``tolerance`` are those of the first finding that fails or, where
    all hold, of the first one: the number by which the claim is known.

    Examples
    --------
    >>> import ntkdp
    >>> verdict = ntkdp.claims.verify("C3")
    >>> verdict.holds, round(verdict.measured, 3)
    (True, -0.334)
    """

    name: str
    statement: str
    assumptions: str
    source: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every finding holds."""
        return all(finding.holds for finding in self.findings)

    @property
    def shown(self) -> Finding:
        """The finding that is shown for the claim."""
        return next((finding for finding in self.findings if not finding.holds), self.findings[0])

    @property
    def measured(self) -> float:
        """The measured number."""
        return self.shown.measured

    @property
    def expected(self) -> float:
        """The number, or the bound, that the claim gives."""
        return self.shown.expected

    @property
    def tolerance(self) -> float:
        """How far the measured number may be off, in its own units."""
        return self.shown.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; a number that is not finite is given as text."""
        own = {name: getattr(self, name) for name in ("name", "holds", "measured", "expected")}
        own |= {name: getattr(self, name) for name in ("tolerance", "statement", "assumptions")}
        own |= {"source": self.source, "seconds": round(self.seconds, 3)}
        findings = [finding._asdict() | {"holds": finding.holds} for finding in self.findings]
        whole: dict[str, Any] = as_json(own | {"findings": findings})
        return whole


@dataclass(frozen=True)
class Claim:
    """A numbered claim; ``check`` runs its experiment through the public interface.

    ``statement``, ``assumptions`` and ``source`` are text. ``check`` returns the findings.

    Examples
    --------
    >>> import ntkdp
    >>> found = ntkdp.claims.Finding("half of two", 1.0, "=", 1.0, 0.0)
    >>> claim = ntkdp.claims.Claim("half", "Half of two is one.", "none", "known", lambda: [found])
    >>> all(finding.holds for finding in claim.check())
    True
    """

    name: str
    statement: str
    assumptions: str
    source: str
    check: Callable[[], list[Finding]]


def claim(
    name: str, *, statement: str, assumptions: str, source: str
) -> Callable[[Callable[[], list[Finding]]], Claim]:
    """Make a function without arguments, which returns findings, a claim."""

    def decorate(check: Callable[[], list[Finding]]) -> Claim:
        return Claim(name, statement, assumptions, source, check)

    return decorate
