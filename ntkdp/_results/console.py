"""Tables and lines on standard output, printed literally, without rich's markup."""

import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ntkdp._results.standard_streams import printable, spelled

#: Characters of a line in a pipe, which has no width of its own.
_WIDTH_IN_A_PIPE = 200
#: Characters of the narrowest column of a table in plain text.
_LEAST_WIDTH = 4


def open_console() -> Console:
    """Standard output: a terminal with its own width, or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_IN_A_PIPE)


def literal(text: str, style: str = "") -> Text:
    """Text without markup or control characters, in characters that standard output has."""
    return Text(spelled(printable(text), sys.stdout.encoding or "utf-8"), style=style)


def say(console: Console, line: str) -> None:
    """Print a line of any length."""
    console.print(literal(line), soft_wrap=True)


def add_row(table: Table, *cells: str) -> None:
    """Add a row of literal text."""
    table.add_row(*map(literal, cells))


def plain_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """Lines of text: the first column is aligned to the left, the others to the right.

    A heading takes as many lines as the width of its column makes it.
    """
    headings, widths = [], []
    for heading, *cells in zip(head, *rows, strict=True):
        width = max(_LEAST_WIDTH, *map(len, cells), *map(len, heading.split()))
        headings.append(textwrap.wrap(heading, width, break_long_words=False))
        widths.append(width)
    depth = max(map(len, headings))
    lines = zip_longest(*([""] * (depth - len(part)) + part for part in headings), fillvalue="")

    def aligned(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(parts).rstrip()

    return "\n".join([title, *map(aligned, lines), *map(aligned, rows), *notes])
