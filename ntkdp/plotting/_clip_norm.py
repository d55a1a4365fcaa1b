"""The picture of a result against the clipping norm, with its optimum, predicted and observed."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike
from ntkdp._results import figure_style
from ntkdp.trajectory import band

#: Standard errors to either side of an observed mean.
_BAR = 2


def clipping_norm_curve(
    clip_norms: ArrayLike,
    predicted: ArrayLike | Mapping[str, ArrayLike],
    observed: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    observed_clip_norms: ArrayLike | None = None,
    xlabel: str = "clipping norm $R$",
    ylabel: str = "final training loss",
    ax: Axes | None = None,
) -> Axes:
    """The end of training against the clipping norm, with the best norm marked.

    Parameters
    ----------
    clip_norms : array
        ``(m,)``, increasing and positive.
    predicted : array or mapping of str to array
        ``(m,)``, e.g. a final loss or risk: the less, the better. Several curves, e.g. for several
        noise multipliers, come with the names that the legend shows.
    observed : array or mapping of str to array, optional
        ``(S, p)`` for S runs at each norm, shown as mean and two standard errors to either side; or
        ``(p,)``, shown without. Several sets of runs come under names of ``predicted``.
    observed_clip_norms : array, optional
        ``(p,)``, the norms of the runs; by default ``clip_norms``.
    xlabel, ylabel : str
        Names of the axes, which are both logarithmic.
    ax : Axes, optional
        As for :func:`ntkdp.plotting.loss_curves`.

    Returns
    -------
    Axes
        A star marks the least predicted value. The legend gives its norm, and says so if that is an
        end of ``clip_norms``. Values that are not finite or not positive are gaps.

    Raises
    ------
    TypeError, ValueError
        If clipping norms are not positive or do not increase, shapes do not fit, or an observed
        name is not predicted.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> norms = np.array([0.1, 1.0, 10.0])
    >>> runs = np.array([[0.5, 0.2, 0.8], [0.7, 0.2, 1.0]])
    >>> ax = ntkdp.plotting.clipping_norm_curve(norms, [0.5, 0.25, 1.0], runs)
    >>> ax.get_legend().get_texts()[0].get_text()
    'predicted, least at 1'
    """
    norms = _norms("clip_norms", clip_norms)
    run_norms = norms
    if observed_clip_norms is not None:
        run_norms = _norms("observed_clip_norms", observed_clip_norms)
    curves = _curves("predicted", predicted, len(norms), (1,))
    points = {} if observed is None else _curves("observed", observed, len(run_norms), (1, 2))
    if unknown := set(points) - set(curves):
        raise ValueError(
            f"observed must have names of predicted, {', '.join(curves)}; got {min(unknown)!r}"
        )
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        ax.set_xscale("log")
        ax.set_yscale("log", nonpositive="mask")
        for style, (name, values) in enumerate(curves.items()):
            _draw_curve(ax, norms, values, style, name)
        for style, name in enumerate(curves):
            if name in points:
                _draw_points(ax, run_norms, points[name], style)
        if points:
            # One entry of the legend for the points of all curves.
            ax.errorbar([], [], [], label=_label_of_points(points), **_point_style("0.3", "o"))
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        figure_style.readable_log_ticks(ax)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.legend(loc="best")
    return ax


def _norms(name: str, values: ArrayLike) -> np.ndarray:
    validate.positive(**{name: values})
    return np.asarray(validate.increasing(**{name: values}), np.float64)


def _curves(
    side: str,
    given: ArrayLike | Mapping[str, ArrayLike],
    n_norms: int,
    dimensions: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """Arrays by name; one alone is called "predicted"."""
    named = given if isinstance(given, Mapping) else {"predicted": given}
    if not named:
        raise ValueError(f"{side} must hold at least one array, got none")
    shapes = " or ".join(("(m,)", "(S, m)")[d - 1] for d in dimensions)
    arrays = {name: np.asarray(values, np.float64) for name, values in named.items()}
    for name, values in arrays.items():
        if values.ndim not in dimensions or values.shape[-1] != n_norms or not values.size:
            where = f"{side}[{name!r}]" if isinstance(given, Mapping) else side
            raise ValueError(
                f"{where} must have shape {shapes}, m = {n_norms} clipping norms, "
                f"got {values.shape}"
            )
    return arrays


def _draw_curve(ax: Axes, norms: np.ndarray, values: np.ndarray, style: int, name: str) -> None:
    colour, dashes, _ = figure_style.STYLES[style % len(figure_style.STYLES)]
    shown = figure_style.drawable(ax, values)
    if np.all(np.isnan(shown)):
        ax.plot(norms, shown, color=colour, linestyle=dashes, label=f"{name}, not finite")
        return
    best = int(np.nanargmin(shown))
    at_an_end = ", an end" if best in (0, len(norms) - 1) else ""
    label = f"{name}, least at {norms[best]:.3g}{at_an_end}"
    ax.plot(norms, shown, color=colour, linestyle=dashes, label=label)
    ax.plot(
        norms[best], shown[best], marker="*", markersize=13.0, color=colour,
        markeredgecolor="white", markeredgewidth=0.8, zorder=4,
    )  # fmt: skip


def _draw_points(ax: Axes, norms: np.ndarray, values: np.ndarray, style: int) -> None:
    colour, _, marker = figure_style.STYLES[style % len(figure_style.STYLES)]
    errors = None
    if values.ndim == 2:
        spread = band(values)
        values, errors = spread.mean, _BAR * spread.standard_error
    ax.errorbar(norms, figure_style.drawable(ax, values), errors, **_point_style(colour, marker))


def _point_style(colour: str, marker: str) -> dict[str, Any]:
    return {
        "color": colour, "marker": marker, "markerfacecolor": "white", "linestyle": "none",
        "elinewidth": 1.2, "capsize": 2.5, "zorder": 3,
    }  # fmt: skip


def _label_of_points(points: dict[str, np.ndarray]) -> str:
    numbers = {len(values) for values in points.values() if values.ndim == 2}
    if not numbers:
        return "observed"
    number = f"{numbers.pop()} " if len(numbers) == 1 else ""
    return f"{number}runs, ± {_BAR} std. errors"
