"""The command ``ntkdp plan``: what to do with a privacy budget."""

from pathlib import Path
from typing import Annotated

import typer

from ntkdp._backend.config_files import load_as
from ntkdp.cli._planning.config import PlanningConfig
from ntkdp.cli._terminal import announce, explained, fields_help, output_folder, progress


def plan(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file; without it, handwritten digits.", metavar="CONFIG.toml"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the plan; by default runs/NAME-TIME.", metavar="DIR"),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the run that the folder holds, and nothing else."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Replaces the field data.name, e.g. with a file.", metavar="NAME"),
    ] = None,
) -> None:
    """Predict private runs over learning rate, clipping norm, steps, sampling rate and epsilon, and
    print what to do with each budget, how sure that is, and what twice the data would give.

    The folder gets all cells (cells.csv), metrics.json, pictures and report.html.
    """
    from ntkdp._results.run_folder import RunFolder

    with explained():
        settings = PlanningConfig() if config is None else load_as(PlanningConfig, config)
        if data is not None:
            changed = settings.data.model_copy(update={"name": data})
            settings = settings.model_copy(update={"data": changed})
        folder = RunFolder(output_folder(settings.name, out), overwrite=overwrite)

        import jax

        from ntkdp.cli._planning import report as reporting
        from ntkdp.cli._planning.run import planned

    jax.config.update("jax_enable_x64", settings.dtype == "float64")
    with explained(), progress() as report:
        found = planned(settings, report)
        report("writing the report", 0.0)
        with folder.replacing() as path:
            reporting.write(found, settings, path)
    for line in (*reporting.summary(found, settings), *str(found).splitlines()):
        announce(line)
    announce(f"written to {folder.path}: open {folder.path / 'report.html'}")


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(PlanningConfig)
