"""What commands show: a bar for long work, errors without a traceback, fields of a config."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import typer
from pydantic import BaseModel

from ntkdp import _config
from ntkdp._cluster import TaskFailed


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A function (what, fraction done) that shows a bar on a terminal and nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda what, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def folder_of(name: str, out: Path | None) -> Path:
    """The folder that is asked for, by default one of this name and time."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}" if out is None else out


@contextmanager
def explained(continues: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """What is wrong with input or machine in one line, and of Ctrl-C what ``continues`` after."""
    try:
        yield
    except KeyboardInterrupt:
        options = continues()
        fail(RuntimeError("stopped" if options is None else f"stopped; {options} continues"))
    except (ValueError, MemoryError, OSError, ImportError, TaskFailed) as error:
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print the error and end with exit status 2."""
    print(f"ntkdp: error: {error}", file=sys.stderr)
    raise typer.Exit(2)


def fields_help(kind: type[BaseModel]) -> str:
    """Every field of a configuration, a paragraph each: the help page keeps those apart."""
    lines = ["[bold]Fields of CONFIG.toml[/bold] (default): what they mean"]
    for name, default, description in _config.describe(kind):
        shown = f" ({default})" if default else ""
        field = f"{name}{shown}".replace("[", r"\[")
        text = description.replace("[", r"\[")
        lines.append(f"[cyan]{field}[/cyan]: {text}")
    return "\n\n".join(lines)
