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
    observed: Annotated[
        Path | None,
        typer.Option(
            help="Runs of the configuration's one rule that were recorded elsewhere, in a CSV file "
            "with columns step and loss, or a .nc file of a trajectory: nothing is trained.",
            metavar="RUNS.csv",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="The file's own name of a column in --observed, such as loss=train/loss; NAME= "
            "leaves a column out. Repeat it for more.",
            metavar="NAME=OWN",
        ),
    ] = None,
) -> None:
    """Predict training under each clipping rule, run it, and show how far apart they are.

    Writes metrics.json, trajectories.nc, pictures and report.html to the run folder, all at once.
    Until then finished cases are kept next to it, in .DIR-partial, or in its .partial if the folder
    exists. --overwrite removes files that are as ntkdp wrote them, and nothing at all if there are
    others. With --observed nothing is trained, and nothing is kept until then.
    """
    from ntkdp._results.checkpoints import CellFolder, resumable
    from ntkdp._results.run_folder import RunFolder

    with explained():
        settings = experiment.Config() if config is None else experiment.load_config(config)
        if predict_only and (out is not None or resume or overwrite):
            raise experiment.ConfigError(
                "--predict-only writes nothing: leave out --out, --resume and --overwrite"
            )
        if observed is not None and (resume or predict_only):
            raise experiment.ConfigError(
                "--observed trains nothing: leave out --resume and --predict-only"
            )
        columns = _columns(column, observed)
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
        if observed is not None or not resumable(folder.partial, "run"):
            return None
        return f"--out {folder.path} --resume{' --overwrite' if overwrite else ''}"

    jax.config.update("jax_enable_x64", settings.dtype == "float64")
    with explained(continues):
        recorded = None
        if observed is not None:
            recorded = experiment.read_recorded(settings, observed, columns)
        with progress() as report:
            results = experiment.run(
                settings,
                None if report is silent else report,
                observed=recorded,
                folder=None if recorded is not None else folder.partial,
                resume=resume,
                # Unfinished cases of a run that is replaced must not be continued.
                overwrite=overwrite and not resume and recorded is None,
            )
            report("writing the report", 0.0)
            with folder.replacing() as path:
                experiment.write_report(results, path)
        if recorded is None:
            CellFolder(folder.partial, settings_tree, resume=True, kind="run").remove()
    experiment.print_table(results)
    for note in results.notes:
        announce(note, on_error=True)
    announce(f"written to {folder.path}: open {folder.path / 'report.html'}")


def _columns(given: list[str] | None, observed: Path | None) -> dict[str, str | None]:
    """The file's own names of columns, None for one that is left out."""
    columns: dict[str, str | None] = {}
    for pair in given or []:
        name, separator, own = pair.partition("=")
        if not separator or not name:
            raise experiment.ConfigError(
                f"--column must be of the form NAME=OWN, such as loss=train/loss, got {pair!r}"
            )
        columns[name] = own or None
    if columns and observed is None:
        raise experiment.ConfigError("--column needs --observed, the file whose columns it names")
    return columns


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(experiment.Config)
