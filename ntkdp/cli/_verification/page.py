"""The page of a verification: claims, the table with its evidence, and every counterexample."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from ntkdp import table_one
from ntkdp._results.page import render
from ntkdp._results.provenance import VERSION
from ntkdp.claims import Verdict
from ntkdp.table_one import Cell, Table


class _Example(NamedTuple):
    """A counterexample of the table: its cell, and its data as JSON."""

    clipping: str
    cell: Cell
    data: str


def page(verdicts: Sequence[Verdict], table: Table | None, seconds: float) -> str:
    """One self-contained HTML page."""
    title = "The theory, verified"
    return render(
        "cli/_verification/page.html",
        title=f"ntkdp: {title.lower()}",
        heading=title,
        summary=_summary(verdicts, table, seconds),
        verdicts=verdicts,
        table=table,
        columns=("clipping", "NTK matrix", *table_one.COLUMNS),
        examples=[] if table is None else _examples(table),
    )


def _summary(verdicts: Sequence[Verdict], table: Table | None, seconds: float) -> str:
    n_held = sum(verdict.holds for verdict in verdicts)
    summary = f"{n_held} of {len(verdicts)} claims hold, verified in {seconds:.0f} s"
    if table is not None:
        borne_out = "every cell" if table.holds else "not every cell"
        summary += f"; {borne_out} of Table 1 is borne out"
    return f"{summary}. ntkdp {VERSION}."


def _examples(table: Table) -> list[_Example]:
    return [
        _Example(row.clipping, cell, json.dumps(json.loads(cell.example.to_json())))
        for row in table.rows
        for cell in row.cells
        if cell.example is not None
    ]
