"""The command ``ntkdp verify``: claims of the theory, and Table 1."""

from pathlib import Path
from typing import Annotated

import typer

from ntkdp.cli._terminal import announce, explained, output_folder, progress


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
            folder = RunFolder(output_folder("verify", out), overwrite=overwrite)

    with explained(), progress() as report:
        from ntkdp import claims
        from ntkdp.cli._verification import run

        asked = claims.names() if whole else tuple(claims.get(name).name for name in names or ())
        verification = run.run(asked, table=whole, report=report)
        if folder is not None:
            with folder.replacing() as path:
                run.write(verification, path)
    if as_json:
        print(run.as_json(verification.verdicts))
    else:
        run.print_verdicts(verification)
        if verification.table is not None:
            run.print_table(verification.table)
    if folder is not None:
        written = f"written to {folder.path}: open {folder.path / 'report.html'}"
        announce(written, on_error=as_json)
    if not verification.holds:
        raise typer.Exit(1)
