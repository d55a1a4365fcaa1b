"""The command ``ntkdp demo``: private training, predicted before it is run."""

from pathlib import Path
from typing import Annotated

import typer

from ntkdp.cli._terminal import announce, explained, output_folder, progress


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default runs/demo-TIME.", metavar="DIR"),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the run that the folder holds, and nothing else."
        ),
    ] = False,
) -> None:
    """Predict private training on handwritten digits, run it, and show both, in about a minute.

    Four parts: private runs inside the band that was drawn before them; the theory without noise;
    the map of learning rate and clipping norm, with the advised cell; and where a frozen kernel
    fails. Writes pictures, report.html and metrics.json to the run folder.
    """
    from ntkdp._results.run_folder import RunFolder

    with explained():
        folder = RunFolder(output_folder("demo", out), overwrite=overwrite)
    with explained(), progress() as report:
        from ntkdp.cli._demonstration import run

        shown = run.run(report)
        report("writing the report", 0.95)
        with folder.replacing() as path:
            run.write(shown, path)
    for sentence in run.sentences(shown).values():
        announce(f"- {sentence}")
    announce(run.in_seconds(shown))
    announce(f"written to {folder.path}: open {folder.path / 'report.html'}")
