"""The command ``ntkdp sweep``: the map of learning rate against clipping norm."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ntkdp import sweep as sweeping
from ntkdp.cli._terminal import announce, explained, fields_help, output_folder, progress
from ntkdp.experiment import ConfigError


def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file; without it, handwritten digits.", metavar="CONFIG.toml"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the sweep; by default runs/NAME-TIME.", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the killed sweep in --out: finished cells stay."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the sweep that the folder holds, and nothing else."
        ),
    ] = False,
    predict_only: Annotated[
        bool,
        typer.Option("--predict-only", help="Only predict: seconds in place of minutes."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Replaces the field data.name, e.g. with a file.", metavar="NAME"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Train the cells on a dask cluster: its address, or 'local' for processes here.",
            metavar="ADDRESS",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --scheduler local; by default one a core."),
    ] = None,
) -> None:
    """Predict accuracy, loss and calibration for a whole grid of learning rates and clipping
    norms, train every cell, and show both maps, how far they agree, and the cell to choose.

    Each cell is written to the folder as it finishes, and metrics.json, pictures and report.html
    at the end.
    """
    with explained():
        settings = sweeping.SweepConfig() if config is None else sweeping.load_config(config)
        changes: dict[str, Any] = {}
        if predict_only:
            changes["observe"] = False
        if data is not None:
            changes["data"] = settings.data.model_copy(update={"name": data})
        settings = settings.model_copy(update=changes)
        if resume and out is None:
            raise ConfigError("--resume needs --out, the folder of the sweep")
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        if workers is not None and scheduler != sweeping.LOCAL:
            raise ConfigError("--workers needs --scheduler local: other clusters have their own")

        import jax

        from ntkdp._results.checkpoints import resumable

    folder = output_folder(settings.name, out)
    # Workers only train, so that a prediction needs none.
    alone = scheduler is None or not settings.observe
    jax.config.update("jax_enable_x64", settings.dtype == "float64")
    with explained(lambda: f"--out {folder} --resume" if resumable(folder) else None):
        cluster = nullcontext() if alone else sweeping.connected(str(scheduler), workers)
        with cluster as client, progress() as report:
            results = sweeping.run(
                settings, folder, resume=resume, overwrite=overwrite, client=client, report=report
            )
            report("writing the report", 0.0)
            measured = sweeping.write_report(results, folder)
    sweeping.print_table(results, measured)
    announce(f"written to {folder}: open {folder / 'report.html'}")


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(sweeping.SweepConfig)
