"""The command line: one verb a job, each writing a run folder."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ntkdp import __version__, _config

app = typer.Typer(
    name="ntkdp",
    help="Predict how a neural network trains under differential privacy, and check it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _fields_help() -> str:
    """Every field of the configuration, a paragraph each: the help page keeps those apart."""
    lines = ["[bold]Fields of CONFIG.toml[/bold] (default): what they mean"]
    for name, default, description in _config.describe():
        shown = f" ({default})" if default else ""
        field = f"{name}{shown}".replace("[", r"\[")
        text = description.replace("[", r"\[")
        lines.append(f"[cyan]{field}[/cyan]: {text}")
    return "\n\n".join(lines)


def _version(asked: bool) -> None:
    if asked:
        print(f"ntkdp {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command(epilog=_fields_help())
def compare(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file; without it, handwritten digits.", metavar="CONFIG.toml"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default runs/NAME-TIME.", metavar="DIR"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")
    ] = False,
) -> None:
    """Predict training under each clipping rule, run it, and show how far apart they are.

    Writes metrics.json, trajectories.nc, pictures and report.html to the run folder.
    """
    from ntkdp._run_folder import RunFolder

    try:
        settings = _config.Config() if config is None else _config.load(config)
        name = f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = RunFolder(Path("runs") / name if out is None else out, overwrite=overwrite)
    except (_config.ConfigError, OSError) as error:
        _fail(error)

    import jax

    from ntkdp import _report, experiment

    jax.config.update("jax_enable_x64", settings.dtype == "float64")
    try:
        with _progress() as report:
            results = experiment.run(settings, report)
            report("writing the report", 0.0)
            with folder.replacing() as path:
                _report.write(results, path)
    except (_config.ConfigError, MemoryError, OSError) as error:
        _fail(error)
    _report.print_table(results)
    print(f"written to {folder.path}: open {folder.path / 'report.html'}")


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
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


def _fail(error: BaseException) -> NoReturn:
    print(f"ntkdp: error: {error}", file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the ``ntkdp`` command."""
    app()
