"""A comparison as a table: for a terminal, as plain text, for a notebook, and as a pandas frame."""

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from ntkdp._results import console, page
from ntkdp.comparison._comparison import SHARES
from ntkdp.trajectory import last_value, mean_over_seeds

if TYPE_CHECKING:
    import pandas

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
_HEAD = ("", "predicted", "observed", "largest error", "of the fall", "at t", "mean error")


def table(comparison: "Comparison") -> Table:
    """A row for each quantity, then rows about the predicted distribution."""
    caption = "\n".join(_notes(comparison))
    drawn = Table(title=_title(comparison), caption=Text(caption) if caption else None)
    drawn.add_column(_HEAD[0])
    for heading in _HEAD[1:]:
        drawn.add_column(heading, justify="right")
    for rows in (_quantities(comparison), _distribution(comparison)):
        for row in rows:
            drawn.add_row(*row)
        drawn.add_section()
    return drawn


def as_text(comparison: "Comparison") -> str:
    """The table in plain text, for ``print``."""
    rows = _quantities(comparison) + _distribution(comparison)
    return console.plain_table(_title(comparison), _HEAD, rows, _notes(comparison))


def as_html(comparison: "Comparison") -> str:
    """The table as HTML, for a notebook."""
    rows = _quantities(comparison) + _distribution(comparison)
    return page.summary(_title(comparison), _HEAD, rows, _notes(comparison))


def as_frame(comparison: "Comparison") -> "pandas.DataFrame":
    """A row for each time, with means over seeds."""
    import pandas as pd

    n_times = len(comparison.times)
    columns: dict[tuple[str, str], np.ndarray] = {}
    for name, errors in comparison.errors.items():
        for title in ("predicted", "observed"):
            values = mean_over_seeds(getattr(comparison, title), name)
            if values is not None and values.ndim == 1:
                columns[name, title] = values[-n_times:]
        columns[name, "error"] = errors.over_time
    frame = pd.DataFrame(columns, index=pd.Index(comparison.times, name="time"))
    frame.columns.names = ["quantity", "value"]
    return frame


def _title(comparison: "Comparison") -> str:
    times = comparison.times
    shown = f"{len(times)} times, t = {times[0]:.4g} to {times[-1]:.4g}"
    return f"Prediction against run at {shown}"


def _notes(comparison: "Comparison") -> list[str]:
    notes = [] if comparison.message == "success" else [comparison.message]
    if comparison.coverage < 1:
        notes.append(f"{comparison.coverage:.0%} of the run's recorded times have a prediction")
    if comparison.steps is not None:
        notes.append("The prediction is of {} steps, the run of {}.".format(*comparison.steps))
    if comparison.neglected:
        notes.append(f"The prediction leaves out the run's {' and '.join(comparison.neglected)}.")
    return notes


def _quantities(comparison: "Comparison") -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, errors in comparison.errors.items():
        sides = (comparison.predicted, comparison.observed)
        final_values = [last_value(side, name) for side in sides]
        rows.append(
            (
                _TITLES[name],
                *("" if value is None else f"{value:.4g}" for value in final_values),
                _readable(errors.sup, name),
                "" if errors.of_fall is None else _finite(100 * errors.of_fall, " %"),
                f"{errors.time_of_sup:.4g}",
                _readable(errors.mean, name),
            )
        )
    return rows


def _distribution(comparison: "Comparison") -> list[tuple[str, ...]]:
    covered, z = comparison.band_coverage, comparison.standardised_error
    if covered is None:
        return []

    def row(title: str, errors: np.ndarray, *final_values: str) -> tuple[str, ...]:
        worst = int(np.argmax(errors))
        largest, mean = _finite(errors[worst]), _finite(np.mean(errors))
        return (title, *final_values, largest, "", f"{comparison.times[worst]:.4g}", mean)

    level, share = f"{covered.level:.4g}", f"{covered.share[-1]:.4g}"
    rows = [
        row("runs in the band", np.abs(covered.share - covered.level), level, share),
        row("CRPS", comparison.crps, "", ""),
    ]
    if z is not None:
        rows.append(row("error in std. errors", np.abs(z), "", ""))
    return rows


def _readable(error: float, name: str) -> str:
    return _finite(error) if name in SHARES else _finite(100 * error, " %")


def _finite(error: float, unit: str = "") -> str:
    return f"{error:.3g}{unit}" if np.isfinite(error) else "infinite"
