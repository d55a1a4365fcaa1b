"""Tables and lines on standard output, printed literally, without rich's markup."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ntkdp._results.standard_streams import printable, spelled

#: Characters of a line in a pipe, which has no width of its own.
_WIDTH_IN_A_PIPE = 200


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
