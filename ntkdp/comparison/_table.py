"""A comparison as a table, for a terminal or a notebook."""

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from ntkdp.comparison._comparison import SHARES
from ntkdp.trajectory import last_value

if TYPE_CHECKING:
    from ntkdp.comparison._comparison import Comparison

_TITLES = {
    "loss": "training loss",
    "accuracy": "training accuracy",
    "outputs": "training outputs",
    "clip_fraction": "clip fraction",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "test_outputs": "test outputs",
}


def table(comparison: "Comparison") -> Table:
    """A row for each quantity, then rows about the predicted distribution."""
    times = comparison.times
    shown = f"{len(times)} times, t = {times[0]:.4g} to {times[-1]:.4g}"
    caption = [] if comparison.message == "success" else [comparison.message]
    if comparison.coverage < 1:
        caption.append(f"{comparison.coverage:.0%} of the run's recorded times have a prediction")
    if comparison.neglected:
        caption.append(f"The prediction leaves out the run's {' and '.join(comparison.neglected)}.")
    drawn = Table(title=f"Prediction against run at {shown}", caption="\n".join(caption) or None)
    drawn.add_column("")
    for heading in ("predicted", "observed", "largest error", "of the fall", "at t", "mean error"):
        drawn.add_column(heading, justify="right")
    for name, errors in comparison.errors.items():
        sides = (comparison.predicted, comparison.observed)
        final_values = [last_value(side, name) for side in sides]
        drawn.add_row(
            _TITLES[name],
            *("" if value is None else f"{value:.4g}" for value in final_values),
            _readable(errors.sup, name),
            "" if errors.of_fall is None else _finite(100 * errors.of_fall, " %"),
            f"{errors.time_of_sup:.4g}",
            _readable(errors.mean, name),
        )
    _add_distribution(drawn, comparison)
    return drawn


def _add_distribution(drawn: Table, comparison: "Comparison") -> None:
    covered, z = comparison.band_coverage, comparison.standardised_error
    if covered is None:
        return

    def add(title: str, errors: np.ndarray, *final_values: str) -> None:
        worst = int(np.argmax(errors))
        largest, mean = _finite(errors[worst]), _finite(np.mean(errors))
        drawn.add_row(title, *final_values, largest, "", f"{comparison.times[worst]:.4g}", mean)

    drawn.add_section()
    add(
        "runs in the band",
        np.abs(covered.share - covered.level),
        f"{covered.level:.4g}",
        f"{covered.share[-1]:.4g}",
    )
    add("CRPS", comparison.crps, "", "")
    if z is not None:
        add("error in std. errors", np.abs(z), "", "")


def _readable(error: float, name: str) -> str:
    return _finite(error) if name in SHARES else _finite(100 * error, " %")


def _finite(error: float, unit: str = "") -> str:
    return f"{error:.3g}{unit}" if np.isfinite(error) else "infinite"
