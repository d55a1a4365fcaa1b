"""Tables and lines on standard output, shown as they are: rich reads nothing into them."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ntkdp._results.standard_streams import printable, spelled

#: In a pipe there is no width to fit into.
_WIDTH_IN_A_PIPE = 200


def open_console() -> Console:
    """Standard output: a terminal of its own width, or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_IN_A_PIPE)


def literal(text: str, style: str = "") -> Text:
    """Text without markup or control characters, in characters that standard output has."""
    return Text(spelled(printable(text), sys.stdout.encoding or "utf-8"), style=style)


def say(console: Console, line: str) -> None:
    """A line of any length."""
    console.print(literal(line), soft_wrap=True)


def add_row(table: Table, *cells: str) -> None:
    """A row of literal text."""
    table.add_row(*map(literal, cells))
