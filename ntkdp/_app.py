"""The command line: one verb a job, each writing a run folder."""

from pathlib import Path
from typing import Annotated

import typer

from ntkdp import __version__, _compare_command, _privacy_command, _sweep_command
from ntkdp._terminal import announce, explained, folder_of, progress

app = typer.Typer(
    name="ntkdp",
    help="Predict how a neural network trains under differential privacy, and check it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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


app.command("compare", epilog=_compare_command.epilog())(_compare_command.compare)
app.command("sweep", epilog=_sweep_command.epilog())(_sweep_command.sweep)
app.command("privacy")(_privacy_command.privacy)


@app.command()
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Claims, e.g. C13 C26; by default all, and Table 1.", metavar="CLAIM"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the verdicts as one JSON list.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; by default runs/verify-TIME, and none if claims are named.",
            metavar="DIR",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the run that the folder holds, and nothing else."
        ),
    ] = False,
) -> None:
    """Verify the claims of the theory, and rebuild Table 1 of the paper from computed evidence.

    Exits with 1 if a claim, or a cell of the table, does not hold.
    """
    from ntkdp._results.run_folder import RunFolder

    whole = not names
    folder = None
    with explained():
        if out is not None or whole:
            folder = RunFolder(folder_of("verify", out), overwrite=overwrite)

    with explained(), progress() as report:
        from ntkdp import _verification, claims

        asked = claims.names() if whole else tuple(claims.get(name).name for name in names or ())
        found = _verification.run(asked, table=whole, report=report)
        if folder is not None:
            with folder.replacing() as path:
                _verification.write(found, path)
    if as_json:
        print(_verification.as_json(found.verdicts))
    else:
        _verification.print_verdicts(found)
        if found.table is not None:
            _verification.print_table(found.table)
    if folder is not None:
        written = f"written to {folder.path}: open {folder.path / 'report.html'}"
        announce(written, on_error=as_json)
    if not found.holds:
        raise typer.Exit(1)
