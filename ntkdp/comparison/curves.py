"""Curves over time: the run with its band, and on top of it the predictions with theirs."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkdp._results import figure_style
from ntkdp.trajectory import Trajectory, band, mean_over_seeds

#: Label of the time axis.
TIME = r"time $t$ = learning rate × step"
#: Quantiles over seeds between which a band is shaded.
LEVELS = (0.05, 0.95)
_BAND_TITLE = "{:g} to {:g}%".format(*(100 * level for level in LEVELS))


def check_trajectory(name: str, value: object) -> None:
    """Raise unless it is a trajectory."""
    if not isinstance(value, Trajectory):
        raise TypeError(f"{name} must be a Trajectory, got {type(value).__name__}")


def recorded(trajectory: Trajectory, name: str, who: str) -> np.ndarray:
    """A quantity of a trajectory, which must have recorded it."""
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
    """Draw the run, then the predictions on it, in the styles of their places in ``names``."""
    ax.set_xlabel(TIME)
    if run is not None:
        check_trajectory("run", run)
        values, quantiles = _over_seeds(recorded(run, name, "run"))
        label = "observed" if mean_over_seeds(run, name) is not None else "observed: not recorded"
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
    """Mean and quantiles over several seeds; one run as it is."""
    if values.ndim == 1:
        return values, None
    spread = band(values, LEVELS)
    low, high = spread.quantiles
    return spread.mean, (low, high)


#: One prediction, or several under the names that the legend shows.
Predictions = Trajectory | Mapping[str, Trajectory]


def loss_curves(
    predictions: Predictions,
    run: Trajectory | None = None,
    *,
    test: bool = False,
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Predicted losses over time, against a run.

    Parameters
    ----------
    predictions : Trajectory or mapping of str to Trajectory
        One, or several with the names that the legend shows. A trajectory with a seed axis is
        drawn as its mean, in a band from the 5% to the 95% quantile.
    run : Trajectory, optional
        Drawn in grey.
    test : bool
        The loss on the test set.
    log : bool
        Logarithmic axis for the loss. A prediction that is off by more than a factor of ten leaves
        the picture.
    ax : Axes, optional
        Where to draw; by default on a new figure, the ``.figure`` of the returned axes.

    Returns
    -------
    Axes

    Raises
    ------
    TypeError
        If an argument is not a Trajectory, or a mapping of them.
    ValueError
        If a trajectory did not record the loss, or there is no prediction.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> t = jnp.arange(3.0)
    >>> run = ntkdp.Trajectory(t, loss=jnp.exp(-t), clip_fraction=jnp.zeros(3))
    >>> ax = ntkdp.plotting.loss_curves({"flow": run, "recursion": run}, run)
    >>> [line.get_label() for line in ax.lines]
    ['observed', 'flow', 'recursion']
    """
    name = "test_loss" if test else "loss"
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        if log:
            ax.set_yscale("log", nonpositive="mask")
        draw(ax, name, named_predictions(predictions), run)
        ax.set_ylabel("test loss" if test else "training loss")
        if log:
            figure_style.limit_log_loss(ax, has_run=run is not None)
        ax.legend(loc="best")
    return ax


def accuracy(
    predictions: Predictions,
    run: Trajectory | None = None,
    *,
    test: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Share of samples classified correctly over time; arguments as for :func:`loss_curves`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> t, zero = jnp.arange(3.0), jnp.zeros(3)
    >>> run = ntkdp.Trajectory(t, loss=zero, clip_fraction=zero, accuracy=t / 2)
    >>> ntkdp.plotting.accuracy(run).lines[0].get_ydata().tolist()
    [0.0, 0.5, 1.0]
    """
    name = "test_accuracy" if test else "accuracy"
    return _share_curves(name, name.replace("_", " ") if test else "training accuracy",
                         predictions, run, ax)  # fmt: skip


def clip_fraction(
    predictions: Predictions, run: Trajectory | None = None, *, ax: Axes | None = None
) -> Axes:
    """Share of clipped samples over time (layerwise: of samples and groups).

    Arguments as for :func:`loss_curves`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> run = ntkdp.Trajectory(jnp.arange(2.0), jnp.ones(2), clip_fraction=jnp.array([1.0, 0.5]))
    >>> ntkdp.plotting.clip_fraction(run).lines[0].get_ydata().tolist()
    [1.0, 0.5]
    """
    return _share_curves("clip_fraction", "clip fraction", predictions, run, ax)


def named_predictions(predictions: object) -> dict[str, Trajectory]:
    """Predictions by name; one alone is called "predicted"."""
    if isinstance(predictions, Trajectory):
        return {"predicted": predictions}
    if not isinstance(predictions, Mapping):
        raise TypeError(
            "predictions must be a Trajectory or a mapping of names to them, "
            f"got {type(predictions).__name__}"
        )
    if not predictions:
        raise ValueError("predictions must hold at least one Trajectory, got none")
    for name, prediction in predictions.items():
        check_trajectory(f"predictions[{name!r}]", prediction)
    return dict(predictions)


def _share_curves(
    name: str, label: str, predictions: Predictions, run: Trajectory | None, ax: Axes | None
) -> Axes:
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        draw(ax, name, named_predictions(predictions), run)
        ax.set_ylabel(label)
        ax.set_ylim(-0.03, 1.03)
        ax.legend(loc="best")
    return ax
