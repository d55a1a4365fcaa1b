"""Curves over time: the run with its band, and the predictions with theirs upon it."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkdp._backend import figure_style
from ntkdp.trajectory import Trajectory, band

TIME = r"time $t$ = learning rate × step"
_BAND_LEVELS = (0.05, 0.95)
_BAND_TITLE = "{:g} to {:g}%".format(*(100 * level for level in _BAND_LEVELS))


def check_trajectory(name: str, value: Any) -> None:
    """Raise if it is none."""
    if not isinstance(value, Trajectory):
        raise TypeError(f"{name} must be a Trajectory, got {type(value).__name__}")


def recorded(trajectory: Trajectory, name: str, who: str) -> np.ndarray:
    """A quantity that must have been recorded."""
    value = getattr(trajectory, name)
    if value is None:
        way_out = "; pass test data where it is made" if name.startswith("test") else ""
        raise ValueError(f"{who} records no {name.replace('_', ' ')}{way_out}")
    return np.asarray(value, np.float64)


def draw(
    ax: Axes,
    name: str,
    predictions: dict[str, Trajectory],
    run: Trajectory | None,
    names: list[str] | None = None,
) -> dict[str, Line2D]:
    """Draw the run, then the predictions upon it, with the styles of their places in ``names``."""
    ax.set_xlabel(TIME)
    if run is not None:
        check_trajectory("run", run)
        values, quantiles = _over_seeds(recorded(run, name, "run"))
        label = "observed"
        if quantiles is not None:
            label += f", mean of {len(run.loss)}"
            figure_style.run_band(ax, run.times, *quantiles, label=f"{_BAND_TITLE} of runs")
        ax.plot(run.times, figure_style.drawable(ax, values), label=label, **figure_style.RUN_STYLE)
    names = list(predictions) if names is None else names
    lines = {}
    for label, prediction in predictions.items():
        values, quantiles = _over_seeds(recorded(prediction, name, f"predictions[{label!r}]"))
        times, style, finite = np.asarray(prediction.times), names.index(label), np.isfinite(values)
        note = "" if np.all(finite) else f" (not finite at t = {times[~finite][0]:.3g})"
        lines[label] = figure_style.prediction_line(ax, times, values, style, label + note)
        if quantiles is not None and len(prediction.loss) > 1:
            title = f"{label}, {_BAND_TITLE} of {len(prediction.loss)}"
            figure_style.prediction_band(ax, times, *quantiles, style=style, label=title)
    return lines


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Mean and quantiles of several seeds; one run as it is."""
    if values.ndim == 1:
        return values, None
    spread = band(values, _BAND_LEVELS)
    low, high = spread.quantiles
    return spread.mean, (low, high)
