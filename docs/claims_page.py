"""Writes docs/claims.md, each claim with the numbers of its check: `python docs/claims_page.py`."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ntkdp import claims
from ntkdp.claims import Claim, Finding

HERE = Path(__file__).parent
PAGE = HERE / "claims.md"

_HEAD = """\
# The claims, and what their checks measure

Each claim is checked by an experiment through the public interface: `uv run ntkdp verify` runs
them all, `uv run ntkdp verify C13` one, and `ntkdp.claims.verify("C13")` does so in Python.

Sources: *paper* is Bu, Wang, Dai, Long (TMLR 2023), *paper (v3)* the third version of its
preprint; *derived* means worked out for this project; others are named. Sketches of proofs are on
the page of the [theory](theory.md), symbols on that of the [notation](notation.md).

This page is written by `python docs/claims_page.py`, and a test compares it with the code. The
last digits of what is drawn at random depend on the processor.
"""


def static_part(claim: Claim) -> str:
    """The part of a claim that the code states without running it."""
    file = claim.check.__module__.replace(".", "/") + ".py"
    function = claim.check.__name__
    return (
        f"## {claim.name}: {function.replace('_', ' ')}\n\n"
        f"{_escaped(claim.statement)}\n\n"
        f"- Assumptions: {_escaped(claim.assumptions)}.\n"
        f"- Source: {_escaped(claim.source)}. Why: [sketch](theory.md#{claim.name.lower()}).\n"
        f"- Checked by [`{function}`](../{file}).\n"
    )


def numbers(findings: Iterable[Finding]) -> str:
    """Every number that the check measures, next to the expected one."""
    lines = ["| quantity | measured | expected |", "|---|---:|---:|"]
    for finding in findings:
        relation = {"=": "", "<=": "≤ ", ">=": "≥ "}[finding.relation]
        within = f" ± {finding.tolerance:.2g}" if finding.tolerance else ""
        expected = f"{relation}{finding.expected:.5g}{within}"
        quantity = _escaped(finding.quantity)
        lines.append(f"| {quantity} | {finding.measured:.4g} | {expected} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text with its markup escaped."""
    return re.sub(r"([\\*_\[\]<>$`|])", r"\\\1", text)


def page(verify: Callable[[str], Any] = claims.verify) -> str:
    """The whole page; raises if a claim does not hold."""
    parts = [_HEAD]
    for name in claims.names():
        verdict = verify(name)
        if not verdict.holds:
            failed = "; ".join(str(finding) for finding in verdict.findings if not finding.holds)
            raise RuntimeError(f"{name} does not hold: {failed}")
        parts.append(f"{static_part(claims.get(name))}\n{numbers(verdict.findings)}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
