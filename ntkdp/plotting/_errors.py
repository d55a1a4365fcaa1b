"""Errors of predictions over time, alone and in a grid of comparisons."""

from collections.abc import Iterable, Mapping
from itertools import product

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkdp._results import figure_style
from ntkdp.comparison import compare
from ntkdp.comparison.curves import (
    TIME,
    Predictions,
    check_trajectory,
    draw,
    named_predictions,
    recorded,
)
from ntkdp.trajectory import Trajectory


def relative_error(
    predictions: Predictions,
    run: Trajectory,
    *,
    test: bool = False,
    allow: str | Iterable[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Relative error of the loss over time, in percent, on a logarithmic axis.

    Arguments are as for :func:`loss_curves`, and ``allow`` as for :func:`ntkdp.compare`, which also
    says what times are shared. Where the error is infinite or zero, the curve has a gap, and the
    legend says so.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> t, zero = jnp.arange(3.0), jnp.zeros(3)
    >>> run = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.0, 1.0]), clip_fraction=zero)
    >>> near = ntkdp.Trajectory(t, loss=jnp.array([4.0, 2.5, 1.5]), clip_fraction=zero)
    >>> ntkdp.plotting.relative_error(near, run).lines[0].get_ydata().tolist()
    [25.0, 50.0]
    """
    name = "test_loss" if test else "loss"
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        ax.set_yscale("log", nonpositive="mask")
        for style, (label, prediction) in enumerate(named_predictions(predictions).items()):
            comparison = compare(prediction, run, allow=allow)
            for who, side in ((f"predictions[{label!r}]", prediction), ("run", run)):
                recorded(side, name, who)
            errors = comparison.errors[name]
            shown = f"{label}: at most {_percent(errors.sup)}"
            figure_style.prediction_line(ax, comparison.times, 100 * errors.over_time, style, shown)
        ax.set_xlabel(TIME)
        ax.set_ylabel(f"relative error of the {'test' if test else 'training'} loss (%)")
        figure_style.readable_log_ticks(ax)
        ax.legend(loc="best")
    return ax


def comparison_grid(
    panels: Mapping[tuple[str, str], tuple[Trajectory, Mapping[str, Trajectory]]],
    *,
    title: str | None = None,
    allow: str | Iterable[str] = (),
) -> Figure:
    """Predicted and observed training losses with their errors, one panel for each setting.

    Parameters
    ----------
    panels : mapping of (row, column) to (run, predictions)
        Row and column are parts of the panel's title, e.g. ``("flat", "R = 0.1")``; rows and
        columns come in the order of their first appearance. Predictions have the names that the
        legend shows, with one style in all panels.
    title : str, optional
        Above all panels.
    allow : str or sequence of str
        Settings in which a prediction and its run may differ, as for :func:`ntkdp.compare`.

    Returns
    -------
    Figure
        Besides the lines, each panel lists the largest relative error of each prediction, as
        :func:`ntkdp.compare` defines it.

    Raises
    ------
    TypeError, ValueError
        If there is no panel, a panel is not such a pair, or a run and a prediction share no time.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> t = jnp.arange(3.0)
    >>> run = ntkdp.Trajectory(t, loss=jnp.exp(-t), clip_fraction=jnp.zeros(3))
    >>> panels = {("flat", f"R = {R}"): (run, {"frozen kernel": run}) for R in (0.1, 10.0)}
    >>> [ax.get_title() for ax in ntkdp.plotting.comparison_grid(panels).axes]
    ['flat, R = 0.1', 'flat, R = 10.0']
    """
    _check_panels(panels)
    rows = list(dict.fromkeys(row for row, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    names = list(dict.fromkeys(name for _, given in panels.values() for name in given))
    with mpl.rc_context(figure_style.LOOK):
        figure = Figure(
            figsize=(3.6 * len(columns) + 0.4, 2.7 * len(rows) + 0.8), layout="constrained"
        )
        grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True)
        grid[0, 0].set_yscale("log", nonpositive="mask")
        observed: dict[str, Artist] = {}
        predicted: dict[str, Artist] = {}
        for place, ax in zip(product(rows, columns), grid.flat, strict=True):
            if place not in panels:
                ax.remove()
                continue
            run, predictions = panels[place]
            lines = draw(ax, "loss", dict(predictions), run, names)
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                if handle not in lines.values():
                    observed.setdefault(label, handle)
            predicted |= lines
            errors = [
                compare(predictions[name], run, allow=allow).sup_relative_error for name in lines
            ]
            ax.legend(
                list(lines.values()), [_percent(error) for error in errors],
                title="max. relative error", loc="best", labelspacing=0.3, alignment="left",
            )  # fmt: skip
            ax.set_title(", ".join(place))
            is_lowest = not any(
                (row, place[1]) in panels for row in rows[rows.index(place[0]) + 1 :]
            )
            ax.set_xlabel(TIME if is_lowest else "")
            is_first = not any((place[0], c) in panels for c in columns[: columns.index(place[1])])
            ax.set_ylabel("training loss" if is_first else "")
            ax.tick_params(labelleft=is_first)
        figure_style.limit_log_loss(*figure.axes, has_run=True)
        if title is not None:
            figure.suptitle(title, fontsize=11)
        shown = observed | {name: predicted[name] for name in names}
        for n_columns in range(len(shown), 0, -1):
            legend = figure.legend(
                list(shown.values()), list(shown), loc="outside lower center", ncols=n_columns
            )
            if n_columns == 1 or legend.get_window_extent().width < figure.bbox.width:
                break
            legend.remove()
    return figure


def _check_panels(panels: object) -> None:
    if not isinstance(panels, Mapping):
        raise TypeError(
            "panels must be a mapping of (row, column) to (run, predictions), "
            f"got {type(panels).__name__}"
        )
    if not panels:
        raise ValueError("panels must hold at least one panel, got none")
    for place, panel in panels.items():
        if not (isinstance(place, tuple) and len(place) == 2):
            raise TypeError(f"keys of panels must be pairs (row, column), got {place!r}")
        if not (isinstance(panel, tuple) and len(panel) == 2 and isinstance(panel[1], Mapping)):
            raise TypeError(
                f"panels[{place!r}] must be a pair of a run and a mapping of names to predictions, "
                f"got {type(panel).__name__}"
            )
        check_trajectory(f"the run of panels[{place!r}]", panel[0])
        named_predictions(panel[1])


def _percent(error: float) -> str:
    return f"{100 * error:.2g}%" if np.isfinite(error) else "infinite"
