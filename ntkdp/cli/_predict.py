"""The command ``ntkdp predict``: private runs predicted, and nothing trained."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntkdp import experiment
from ntkdp.cli._terminal import explained, fields_help, progress

if TYPE_CHECKING:
    from ntkdp.experiment import Forecast

#: Fields of a file of features, unless options set them.
_OF_FEATURES: dict[str, Any] = {"learning_rate": 1.0, "steps": 100, "epsilon": 3.0}


class PredictionMethod(StrEnum):
    """How runs are predicted, as for :func:`ntkdp.predict`."""

    auto = "auto"
    frozen = "frozen"
    shifted = "shifted"
    two_time = "two_time"
    noise_path = "noise_path"
    response = "response"


def predict(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="TOML file as of ntkdp compare, or features in a .npz or .csv file for a "
            "linear head; without it, handwritten digits.",
            metavar="CONFIG.toml|FEATURES",
        ),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Replaces training.epsilon.")] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="Replaces training.delta; by default the smaller of 1e-5 and 1/(10 n)."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Replaces training.learning_rate.")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Replaces the clipping rules by abadi of this norm.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Replaces training.steps.")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Replaces training.sample_rate.")
    ] = None,
    method: Annotated[
        PredictionMethod,
        typer.Option(help="auto takes the one that may be trusted; frozen takes seconds."),
    ] = PredictionMethod.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Predict private runs by the method that may be trusted, and train nothing in private.

    Prints the loss and accuracy after the last step with the band that holds 90% of the runs, and
    how they were predicted. Features are 80% for training, and epsilon is 3 unless set.
    """
    with explained():
        settings = _settings(source, epsilon, delta, learning_rate, clip_norm, steps, sample_rate)

    show(settings, method, as_json=as_json)


def show(
    settings: experiment.Config,
    method: PredictionMethod = PredictionMethod.auto,
    *,
    as_json: bool = False,
) -> None:
    """Predict the runs of a configuration, and print them."""
    with explained():
        import jax

        jax.config.update("jax_enable_x64", settings.dtype == "float64")
        with progress() as report:
            forecasts = experiment.forecast(settings, report, method=method.value)
    if as_json:
        from ntkdp._results.plain_json import as_text

        print(as_text([_entry(one) for one in forecasts]))
    else:
        _print(forecasts)


def _settings(
    source: Path | None,
    epsilon: float | None,
    delta: float | None,
    learning_rate: float | None,
    clip_norm: float | None,
    steps: int | None,
    sample_rate: float | None,
) -> experiment.Config:
    """The configuration of a file, or of features, with the options in place of its fields."""
    given: dict[str, Any] = {
        "epsilon": epsilon, "delta": delta, "learning_rate": learning_rate, "steps": steps,
        "sample_rate": sample_rate,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    fields: dict[str, Any] = {}
    if source is not None and source.suffix.lower() != ".toml":
        fields = experiment.fields_of_features(source)
        given = {**_OF_FEATURES, **given}
        clip_norm = 1.0 if clip_norm is None else clip_norm
    elif source is not None:
        fields = experiment.load_config(source).model_dump(exclude_unset=True)
    training = {**fields.get("training", {}), **given}
    if "epsilon" in given and "delta" not in training:
        n = fields.get("data", {}).get("n_train", experiment.DataConfig().n_train)
        training["delta"] = min(1e-5, 1 / (10 * n))
    if clip_norm is not None:
        fields["clipping"] = [{"clip_norm": clip_norm}]
    return experiment.config(**{**fields, "training": training})


def _entry(one: "Forecast") -> dict[str, Any]:
    """A prediction as plain numbers."""
    names = ("loss", "accuracy", "test_loss", "test_accuracy")
    final = {name: one.final(name) for name in names}
    return {
        "clipping": one.clipping.label,
        "learning_rate": one.learning_rate,
        "steps": one.steps,
        "noise_multiplier": one.noise_multiplier,
        "epsilon": one.epsilon,
        "delta": one.delta,
        "final": {
            name: None if ends is None else dict(zip(("mean", "low", "high"), ends, strict=True))
            for name, ends in final.items()
        },
        "method": one.trajectory.method,
        "seconds": one.seconds,
    }


def _print(forecasts: list["Forecast"]) -> None:
    from rich.table import Table

    from ntkdp._results.console import add_row, open_console, say

    console = open_console()
    table = Table(title="Private runs, predicted", title_justify="left")
    columns = ("clipping", "learning rate", "epsilon", "loss [90%]", "test loss", "test accuracy")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 1 else "right")
    for one in forecasts:
        add_row(
            table,
            one.clipping.label,
            f"{one.learning_rate:g}",
            "no noise" if one.epsilon is None else f"{one.epsilon:.3g}",
            _with_band(one.final("loss"), ".4g"),
            _with_band(one.final("test_loss"), ".4g"),
            _with_band(one.final("test_accuracy"), ".1%"),
        )
    console.print(table)
    for one in forecasts:
        say(console, f"{one.clipping.label} ({one.seconds:.1f} s): {one.trajectory.method}")


def _with_band(ends: tuple[float, float, float] | None, form: str) -> str:
    if ends is None:
        return ""
    mean, low, high = ends
    return f"{mean:{form}}" if low == high else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def epilog() -> str:
    """Fields of the configuration, for the help page."""
    return fields_help(experiment.Config)
