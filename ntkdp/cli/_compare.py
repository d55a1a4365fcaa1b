"""The command ``ntkdp compare``: predicted against observed training."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ntkdp import experiment
from ntkdp.cli import _predict
from ntkdp.cli._terminal import announce, explained, fields_help, output_folder, progress, silent


def compare(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file; without it, handwritten digits.", metavar="CONFIG.toml"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; by default runs/NAME-TIME.", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the killed run in --out: finished cases stay."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the run that the folder holds, and nothing else."
        ),
    ] = False,
    predict_only: Annotated[
        bool,
        typer.Option("--predict-only", help="Train nothing and write nothing: as ntkdp predict."),
    ] = False,
) -> None:
    """Predict training under each clipping rule, run it, and show how far apart they are.

    Writes metrics.json, trajectories.nc, pictures and report.html to the run folder, all at once.
    Until then finished cases are kept next to it, in .DIR-partial, or in its .partial if the folder
    exists. --overwrite removes files that are as ntkdp wrote them, and nothing at all if there are
    others.
    """
    from ntkdp._results.checkpoints import CellFolder, resumable
    from ntkdp._results.run_folder import RunFolder

    with explained():
        settings = experiment.Config() if config is None else experiment.load_config(config)
        if predict_only and (out is not None or resume or overwrite):
            raise experiment.ConfigError(
                "--predict-only writes nothing: leave out --out, --resume and --overwrite"
            )
    if predict_only:
        _predict.show(settings)
        return
    with explained():
        if resume and out is None:
            raise experiment.ConfigError("--resume needs --out, the folder of the run")
        settings_tree = settings.model_dump(mode="json")
        folder = RunFolder(
            output_folder(settings.name, out),
            overwrite=overwrite,
            finished=settings_tree if resume else None,
        )
        if folder.is_finished:
            # A run that was killed at the very end has left its cases. Those of another run stay.
            with suppress(ValueError, FileExistsError, FileNotFoundError):
                CellFolder(folder.partial, settings_tree, resume=True, kind="run").remove()
            announce(f"{folder.path} holds the finished run already")
            return

        import jax

    def continues() -> str | None:
        if not resumable(folder.partial, "run"):
            return None
        return f"--out {folder.path} --resume{' --overwrite' if overwrite else ''}"

    jax.config.update("jax_enable_x64", settings.dtype == "float64")
    with explained(continues):
        with progress() as report:
            results = experiment.run(
                settings,
                None if report is silent else report,
                folder=folder.partial,
                resume=resume,
                # Unfinished cases of a run that is replaced must not be continued.
                overwrite=overwrite and not resume,
            )
            report("writing the report", 0.0)
            with folder.replacing() as path:
                experiment.write_report(results, path)
        CellFolder(folder.partial, settings_tree, resume=True, kind="run").remove()
    experiment.print_table(results)
    for note in results.notes:
        announce(note, on_error=True)
    announce(f"written to {folder.path}: open {folder.path / 'report.html'}")


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(experiment.Config)
