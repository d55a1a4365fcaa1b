"""The page of a verification: claims, the table with its evidence, and every counterexample."""

import html
import json
from collections.abc import Sequence

from ntkdp import __version__, table_one
from ntkdp.claims import Finding, Verdict
from ntkdp.table_one import Cell, Table


def page(verdicts: Sequence[Verdict], table: Table | None, seconds: float) -> str:
    """One self-contained HTML page."""
    held = sum(verdict.holds for verdict in verdicts)
    summary = f"{held} of {len(verdicts)} claims hold, verified in {seconds:.0f} s"
    if table is not None:
        borne_out = "every cell" if table.holds else "not every cell"
        summary += f"; {borne_out} of Table 1 is borne out"
    return _TEMPLATE.format(
        summary=html.escape(f"{summary}. ntkdp {__version__}."),
        claims="\n".join(_claim(verdict) for verdict in verdicts),
        table="" if table is None else _table(table),
    )


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


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ntkdp: the theory, verified</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }}
h3 {{ font-size: 1rem; margin-bottom: 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #ccc; text-align: left;
  vertical-align: top; }}
th {{ border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }}
table.one td {{ min-width: 7.4rem; }}
small {{ display: block; color: #444; line-height: 1.3; }}
small.added {{ color: #0b4f7d; margin-top: .3rem; }}
.yes b {{ color: #00694b; }}
.no b {{ color: #a34400; }}
details {{ border-bottom: 1px solid #ddd; padding: .35rem 0; }}
summary {{ cursor: pointer; }}
.verdict {{ color: #00694b; margin: 0 .4rem; }}
.fails .verdict {{ color: #fff; background: #a30000; padding: 0 .5rem; }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8rem; }}
</style>
</head>
<body>
<h1>The theory, verified</h1>
<p>{summary}</p>
<h2>Claims</h2>
{claims}
{table}
</body>
</html>
"""
