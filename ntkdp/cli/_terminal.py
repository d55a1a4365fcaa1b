"""Output of the commands: a bar for long work, errors in one line, fields of a configuration."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import typer
from pydantic import BaseModel

from ntkdp._backend import stopping
from ntkdp._backend.config_files import describe
from ntkdp._results.standard_streams import printable
from ntkdp.sweep import TaskFailed


def silent(task: str, done: float) -> None:
    """What reports go to in a pipe."""


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A function (task, fraction done) that shows a bar on a terminal and nothing in a pipe."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console

    from ntkdp.cli._progress_bar import progress_bar

    with progress_bar(Console(stderr=True)) as report:
        yield report


def announce(text: str, *, on_error: bool = False) -> None:
    """Print one line on standard output, or error, whatever characters a file name in it has."""
    print(printable(text), file=sys.stderr if on_error else sys.stdout)


def output_folder(name: str, out: Path | None) -> Path:
    """The folder ``out``, by default a new one for this name and time."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}" if out is None else out


@contextmanager
def explained(continues: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Explain errors of input or machine in one line, and after Ctrl-C print how to continue.

    ``continues`` returns the options that continue the work, or None.
    """
    stopping.continued_by(continues)
    try:
        _check_backend()
        yield
    except KeyboardInterrupt as error:
        announce(stopping.line(continues()), on_error=True)
        raise typer.Exit(128 + signal.SIGINT) from error
    except (ValueError, MemoryError, OSError, ImportError, TaskFailed) as error:
        fail(error)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        allocation = str(error).splitlines()[0]
        fail(
            f"a device is out of memory ({allocation}); use fewer samples (data.n_train, "
            "data.n_test), a smaller batch_size, or dtype = 'float32'"
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether JAX raised the error because an array did not fit into a device's memory."""
    # Without JAX there is no such error, and importing it takes seconds.
    if "jax" not in sys.modules:
        return False
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _check_backend() -> None:
    """Raise unless matplotlib can draw; its own error would not name the environment variable."""
    if "MPLBACKEND" in os.environ:
        try:
            import matplotlib  # noqa: F401
        except ValueError as error:
            raise ValueError(f"environment variable MPLBACKEND: {error}; unset it") from error


def fail(error: BaseException | str) -> NoReturn:
    """Print the error in one line and end with exit status 2."""
    announce(f"ntkdp: error: {error}", on_error=True)
    raise typer.Exit(2)


def fields_help(kind: type[BaseModel]) -> str:
    """Every field of a configuration, in paragraphs, which the help page keeps apart."""
    lines = ["[bold]Fields of CONFIG.toml[/bold] (default): meaning"]
    for name, default, description in describe(kind):
        shown = f" ({default})" if default else ""
        field = f"{name}{shown}".replace("[", r"\[")
        text = description.replace("[", r"\[")
        lines.append(f"[cyan]{field}[/cyan]: {text}")
    return "\n\n".join(lines)
