"""The page of a verification: claims, the table with its evidence, and every counterexample."""

import html
import json
from collections.abc import Sequence

from ntkdp import table_one
from ntkdp._results import page as _page
from ntkdp._results.provenance import VERSION
from ntkdp.claims import Finding, Verdict
from ntkdp.table_one import Cell, Table


def page(verdicts: Sequence[Verdict], table: Table | None, seconds: float) -> str:
    """One self-contained HTML page."""
    held = sum(verdict.holds for verdict in verdicts)
    summary = f"{held} of {len(verdicts)} claims hold, verified in {seconds:.0f} s"
    if table is not None:
        borne_out = "every cell" if table.holds else "not every cell"
        summary += f"; {borne_out} of Table 1 is borne out"
    body = [
        _page.paragraph(f"{summary}. ntkdp {VERSION}."),
        "<h2>Claims</h2>",
        *(_claim(verdict) for verdict in verdicts),
        "" if table is None else _table(table),
    ]
    title = "The theory, verified"
    return _page.document(f"ntkdp: {title.lower()}", title, "\n".join(body), style=_STYLE)


def _claim(verdict: Verdict) -> str:
    findings = "".join(_finding(finding) for finding in verdict.findings)
    verdict_class = "holds" if verdict.holds else "fails"
    escaped = {
        name: html.escape(getattr(verdict, name)) for name in ("statement", "assumptions", "source")
    }
    return (
        f'<details class="{verdict_class}"><summary><b>{verdict.name}</b> '
        f"<span class=verdict>{verdict_class}</span> {escaped['statement']}</summary>"
        f"<p>Assumptions: {escaped['assumptions']}. Source: {escaped['source']}. "
        f"{verdict.seconds:.1f} s.</p><div class=scroll><table><thead><tr><th>quantity</th>"
        f"<th>measured</th><th>expected</th><th></th></tr></thead><tbody>{findings}</tbody>"
        "</table></div></details>"
    )


def _finding(finding: Finding) -> str:
    relation = {"=": "", "<=": "&le; ", ">=": "&ge; "}[finding.relation]
    within = f" &plusmn; {finding.tolerance:.2g}" if finding.tolerance else ""
    return (
        f"<tr><td>{html.escape(finding.quantity)}</td><td>{finding.measured:.6g}</td>"
        f"<td>{relation}{finding.expected:.6g}{within}</td>"
        f"<td>{'holds' if finding.holds else '<b>fails</b>'}</td></tr>"
    )


def _table(table: Table) -> str:
    head = "".join(
        f"<th>{html.escape(name)}</th>" for name in ("clipping", "NTK matrix", *table_one.COLUMNS)
    )
    rows = "".join(
        f"<tr><td>{html.escape(row.clipping)}</td><td>{html.escape(row.matrix)}</td>"
        + "".join(_cell(cell) for cell in row.cells)
        + "</tr>"
        for row in table.rows
    )
    examples = "".join(
        f"<h3>{html.escape(row.clipping)}: {html.escape(cell.column)}</h3>"
        f"<p>{html.escape(cell.evidence)}: {cell.value:.4g}. {html.escape(cell.added)}</p>"
        f"<pre>{html.escape(json.dumps(json.loads(cell.example.to_json())))}</pre>"
        for row in table.rows
        for cell in row.cells
        if cell.example is not None
    )
    return (
        "<h2>Table 1, computed</h2><p>Yes and no: guaranteed or not, the training loss, given a "
        "kernel that stays positive definite, as the paper has it; computed where it does not say "
        f"(in brackets). Below each, the evidence.</p><div class=scroll><table class=one><thead>"
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<h2>Counterexamples</h2><p>Those that the search found are data that replays: "
        "<code>ntkdp.counterexamples.Counterexample.from_json(text).replay()</code>.</p>" + examples
    )


def _cell(cell: Cell) -> str:
    answer = cell.answer if cell.paper is not None else f"({cell.answer})"
    if not cell.holds:
        answer += ", not borne out"
    added = f"<small class=added>{html.escape(cell.added)}</small>" if cell.added else ""
    return (
        f"<td class={'yes' if cell.guaranteed else 'no'}><b>{answer}</b>"
        f"<small>{html.escape(cell.evidence)}: {cell.value:.3g}</small>{added}</td>"
    )


_STYLE = """body { max-width: 80rem; }
th, td { vertical-align: top; }
table.one td { min-width: 7.4rem; }
small { display: block; color: #444; line-height: 1.3; }
small.added { color: #0b4f7d; margin-top: .3rem; }
.yes b { color: #00694b; }
.no b { color: #a34400; }
details { border-bottom: 1px solid #ddd; padding: .35rem 0; }
summary { cursor: pointer; }
.verdict { color: #00694b; margin: 0 .4rem; }
.fails .verdict { color: #fff; background: #a30000; padding: 0 .5rem; }
"""
