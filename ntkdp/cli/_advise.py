"""The command ``ntkdp advise``: where to train, from predictions alone."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ntkdp import experiment
from ntkdp import sweep as sweeping
from ntkdp.cli._terminal import announce, explained, fields_help, progress


def advise(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="TOML file as of ntkdp sweep, or features in a .npz or .csv file for a "
            "linear head; without it, handwritten digits.",
            metavar="CONFIG.toml|FEATURES",
        ),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Replaces grid.epsilons.")] = None,
    delta: Annotated[float | None, typer.Option(help="Replaces training.delta.")] = None,
    steps: Annotated[int | None, typer.Option(help="Replaces training.steps.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Replaces training.sample_rate.")
    ] = None,
) -> None:
    """Predict a grid of learning rates and clipping norms, and say which cell to train at.

    Nothing is trained. ntkdp sweep trains the cells too and shows both maps; ntkdp plan chooses the
    steps, the sampling rate and epsilon as well.
    """
    with explained():
        settings = _settings(source, epsilon, delta, steps, sample_rate)

        import jax

        jax.config.update("jax_enable_x64", settings.dtype == "float64")
        with progress() as report:
            results = sweeping.run(settings, report=report)
            words = sweeping.advice_in_words(results)
    for sentence in words:
        announce(sentence)


def _settings(
    source: Path | None,
    epsilon: float | None,
    delta: float | None,
    steps: int | None,
    sample_rate: float | None,
) -> sweeping.SweepConfig:
    """The configuration of a file, or of features, with the options in place of its fields."""
    fields: dict[str, Any] = {}
    if source is not None and source.suffix.lower() != ".toml":
        fields = experiment.fields_of_features(source)
    elif source is not None:
        fields = sweeping.load_config(source).model_dump(exclude_unset=True)
    given = {"delta": delta, "steps": steps, "sample_rate": sample_rate}
    training = {name: value for name, value in given.items() if value is not None}
    fields["training"] = {**fields.get("training", {}), **training}
    if epsilon is not None:
        grid = {**fields.get("grid", {}), "epsilons": [epsilon]}
        grid.pop("noise_multipliers", None)
        fields["grid"] = grid
    if fields.get("loss") == "squared_error" and "objective" not in fields:
        fields["objective"] = "loss"
    return sweeping.config(**{**fields, "observe": False})


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(sweeping.SweepConfig)
