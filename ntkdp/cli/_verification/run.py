"""Verification of the theory: run the claims and the table, show them, and keep them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from pathlib import Path
from typing import Any, NamedTuple

from ntkdp import claims, table_one
from ntkdp._results.console import add_row, literal, open_console, say
from ntkdp._results.own_files import OwnFiles
from ntkdp._results.plain_json import as_text
from ntkdp._results.provenance import provenance
from ntkdp.claims import Verdict
from ntkdp.cli._verification import page as verification_page
from ntkdp.table_one import Table

Report = Callable[[str, float], None]


class Verification(NamedTuple):
    """Verdicts, the table if it was requested, and the seconds that all took."""

    verdicts: tuple[Verdict, ...]
    table: Table | None
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every claim and every cell of the table holds."""
        whole = self.table is None or self.table.holds
        return whole and all(verdict.holds for verdict in self.verdicts)


def run(names: Sequence[str], *, table: bool, report: Report) -> Verification:
    """Verify the named claims, which must exist, and rebuild the table if requested.

    Most of the time is spent on tracing programs, which uses one core and Python's lock, so several
    claims are verified at a time, in processes.
    """
    start = time.perf_counter()
    report("compiling the first claims", 0.0)
    n_tasks = len(names) + table
    with _workers(n_tasks) as workers:
        # The table takes longest: it starts first.
        rebuilt = workers.submit(table_one.compute) if table else None
        verdicts = [workers.submit(claims.verify, name) for name in names]
        tasks: dict[Future[Any], str] = dict(zip(verdicts, names, strict=True))
        if rebuilt is not None:
            tasks[rebuilt] = "Table 1, computed"
        try:
            for number, done in enumerate(as_completed(tasks)):
                done.result()
                report(f"{tasks[done]} done", (number + 1) / len(tasks))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return Verification(
        tuple(verdict.result() for verdict in verdicts),
        None if rebuilt is None else rebuilt.result(),
        time.perf_counter() - start,
    )


def _workers(n_tasks: int) -> Executor:
    """One process a core, or this one if there is nothing to divide."""
    n_workers = min(os.cpu_count() or 1, n_tasks)
    if n_workers < 2:
        return ThreadPoolExecutor(1)
    # Threads of JAX do not survive a fork.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n_workers, mp_context=context, initializer=_end_with_the_command)


def _end_with_the_command() -> None:
    """Let a worker end without a word when the command does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = multiprocessing.parent_process()

    def watch() -> None:
        if command is not None:
            command.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def as_json(verdicts: Sequence[Verdict]) -> str:
    """One JSON list of the verdicts."""
    return as_text([verdict.as_dict() for verdict in verdicts])


def write(verification: Verification, folder: Path) -> None:
    """Write metrics.json and report.html."""
    table = verification.table
    metrics: dict[str, object] = {
        **provenance("jax", "diffrax", "neural-tangents"),
        "holds": verification.holds,
        "seconds": round(verification.seconds, 1),
        "claims": [verdict.as_dict() for verdict in verification.verdicts],
        "table_one": None if table is None else table.as_dict(),
    }
    page = verification_page.page(verification.verdicts, table, verification.seconds)
    files = OwnFiles(folder)
    files.write("report.html", page)
    # Last, because a folder with metrics is complete.
    files.write("metrics.json", as_text(metrics) + "\n")


def print_verdicts(verification: Verification) -> None:
    """Print one line for each claim, then the numbers that fail."""
    from rich.table import Table as Grid

    console = open_console()
    grid = Grid(box=None, pad_edge=False)
    for heading in ("claim", "statement", "source", "measured", "expected", "verdict"):
        numeric = heading in ("measured", "expected")
        grid.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=heading in ("claim", "measured", "expected", "verdict"),
            ratio=4 if heading == "statement" else None,
        )
    verdicts = verification.verdicts
    for verdict in verdicts:
        texts = (
            verdict.name,
            verdict.statement,
            verdict.source,
            f"{verdict.measured:.5g}",
            expected(verdict),
        )
        end = literal("holds") if verdict.holds else literal("FAILS", "bold red")
        grid.add_row(*map(literal, texts), end)
    console.print(grid)
    for verdict in verdicts:
        for finding in verdict.findings:
            if not finding.holds:
                say(console, f"{verdict.name} fails: {finding}")
    held = sum(verdict.holds for verdict in verdicts)
    say(console, f"{held} of {len(verdicts)} claims hold ({verification.seconds:.0f} s)")


def expected(verdict: Verdict) -> str:
    """The expected number with its relation and tolerance, in a few characters."""
    shown = verdict.shown
    if shown.relation == "=":
        within = f" ± {shown.tolerance:.2g}" if shown.tolerance else ""
        return f"{shown.expected:.5g}{within}"
    return f"{'≤' if shown.relation == '<=' else '≥'} {shown.expected:.5g}"


def print_table(table: Table) -> None:
    """Print the table: the paper's answers, with notes where more is known."""
    from rich.table import Table as Grid

    console = open_console()
    grid = Grid(box=None, pad_edge=False, title="Table 1, computed", title_justify="left")
    for heading in ("clipping", "NTK matrix", *table_one.COLUMNS):
        grid.add_column(heading)
    notes: list[str] = []
    for row in table.rows:
        cells = []
        for cell in row.cells:
            text = cell.answer if cell.holds else f"{cell.answer}, NOT BORNE OUT"
            if cell.added:
                if cell.added not in notes:
                    notes.append(cell.added)
                text += f" ({notes.index(cell.added) + 1})"
            cells.append(text)
        add_row(grid, row.clipping, row.matrix, *cells)
    console.print(grid)
    for number, note in enumerate(notes):
        say(console, f"({number + 1}) {note}")
