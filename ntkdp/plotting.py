r"""Pictures of predictions and runs in one look, readable in print and without colour vision.

The run is a thick grey line; predictions lie on it in thin lines that differ in colour (Okabe and
Ito's palette), dashes and markers. Bands of several seeds are shaded, those of predictions between
thin lines of the prediction's own colour and dashes. Times are in units of learning rate times
steps. Functions draw on the Axes that they are given, or on a new figure; neither pyplot nor
``rcParams`` is touched.
"""

import os
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ntkdp._backend import figure_style
from ntkdp._backend.files import replacing
from ntkdp._backend.validate import positive
from ntkdp._certificate_plot import certificate as certificate
from ntkdp._clip_norm_plot import clipping_norm_curve as clipping_norm_curve
from ntkdp._curves import TIME, check_trajectory, draw, recorded
from ntkdp._heat_maps import heat_maps as heat_maps
from ntkdp._heat_maps import trade_off as trade_off
from ntkdp.comparison import compare
from ntkdp.ntk import LayerwiseKernel
from ntkdp.trajectory import Trajectory

#: One prediction, or several under the names that the legend shows.
Predictions = Trajectory | Mapping[str, Trajectory]

_FORMATS = ("png", "pdf", "svg")


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
        One, or several with the names that the legend shows. With a seed axis: the mean, in a band
        from the 5% to the 95% quantile.
    run : Trajectory, optional
        The same, in grey.
    test : bool
        The loss on the test set.
    log : bool
        Logarithmic axis for the loss. A prediction that leaves the run by more than a factor of ten
        leaves the picture.
    ax : Axes, optional
        Where to draw; by default on a new figure, ``.figure`` of what is returned.

    Returns
    -------
    Axes

    Raises
    ------
    TypeError
        If an argument is not a Trajectory, or mapping of them.
    ValueError
        If a trajectory lacks what is to be drawn, or there is no prediction.

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
        draw(ax, name, _named(predictions), run)
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


def relative_error(
    predictions: Predictions,
    run: Trajectory,
    *,
    test: bool = False,
    allow: str | Iterable[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Relative error of the loss over time, in percent, on a logarithmic axis.

    Arguments as for :func:`loss_curves`, and ``allow`` as for :func:`ntkdp.compare`; the times are
    those that it finds shared. Where the error is infinite or zero the curve has a gap, and the
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
        for style, (label, prediction) in enumerate(_named(predictions).items()):
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


def kernel_spectrum(kernel: Any, *, label: str = "kernel", ax: Axes | None = None) -> Axes:
    """Eigenvalues against rank, largest first, both axes logarithmic.

    Parameters
    ----------
    kernel : array or LayerwiseKernel
        Symmetric ``(n, n)`` (each eigenvalue once, though it stands for K with ``(x) I_K``) or
        ``(n, n, K, K)``; a LayerwiseKernel of either gives one curve a term and their total; or
        eigenvalues ``(N,)``.
    label : str
        Name in the legend.
    ax : Axes, optional
        As for :func:`loss_curves`.

    Returns
    -------
    Axes
        What cannot be told from zero (below N roundings of the largest) is not drawn; the legend
        gives the rank that remains where it is less than N.

    Raises
    ------
    ValueError
        Another shape, NaN or infinities, a kernel that is not symmetric.

    Notes
    -----
    ``numpy.linalg.eigvalsh`` in float64 of the nK x nK matrix: time grows as (nK)^3.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ax = ntkdp.plotting.kernel_spectrum(jnp.diag(jnp.array([1.0, 4.0, 2.0])))
    >>> ax.lines[0].get_ydata().tolist()
    [4.0, 2.0, 1.0]
    """
    if isinstance(kernel, LayerwiseKernel):
        terms = dict(zip(kernel.names, kernel.values, strict=True))
        spectra = {"total": kernel.total, **{f"group {k}": v for k, v in terms.items()}}
    else:
        spectra = {label: kernel}
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        ax.set_xscale("log")
        ax.set_yscale("log")
        for style, (name, matrix) in enumerate(spectra.items()):
            eigenvalues, resolution = _eigenvalues(matrix)
            drawn = eigenvalues[eigenvalues > resolution]
            if len(drawn) < len(eigenvalues):
                name = f"{name} (rank {len(drawn)} of {len(eigenvalues)})"
            figure_style.prediction_line(ax, np.arange(1, len(drawn) + 1), drawn, style, name)
        ax.set_xlabel("rank")
        ax.set_ylabel("eigenvalue")
        figure_style.readable_log_ticks(ax)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.legend(loc="best")
    return ax


def comparison_grid(
    panels: Mapping[tuple[str, str], tuple[Trajectory, Mapping[str, Trajectory]]],
    *,
    title: str | None = None,
    allow: str | Iterable[str] = (),
) -> Figure:
    """Predicted and observed training losses, a panel for each setting, with their errors.

    Parameters
    ----------
    panels : mapping of (row, column) to (run, predictions)
        Row and column are parts of the panel's title, e.g. ``("flat", "R = 0.1")``; rows and
        columns come in the order of their first appearance. Predictions have the names that the
        legend shows, with one style in all panels.
    title : str, optional
        Above all panels.
    allow : str or sequence of str
        What a prediction and its run may differ in, as for :func:`ntkdp.compare`.

    Returns
    -------
    Figure
        Beside the lines, each panel lists the largest relative error of each prediction, as
        :func:`ntkdp.compare` defines it.

    Raises
    ------
    TypeError, ValueError
        No panel; a panel that is not such a pair; a run and a prediction that share no time.

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


def save(figure: Figure | Axes, path: str | os.PathLike[str], *, dpi: float | int = 200) -> None:
    """Write a figure as PNG, PDF or SVG by the suffix of the path, whole or not at all.

    Parameters
    ----------
    figure : Figure or Axes
        A figure, or any Axes of it.
    path : path
        Ends in .png, .pdf or .svg; what is there is replaced.
    dpi : float
        Dots per inch of a PNG.

    Raises
    ------
    TypeError
        If it is not a figure.
    ValueError
        If the suffix is another.
    FileNotFoundError
        If the folder does not exist.
    FileExistsError, PermissionError
        If there is something else than a file, or a file that is read-only.

    Examples
    --------
    >>> import pathlib, tempfile, ntkdp
    >>> ax = ntkdp.plotting.kernel_spectrum([4.0, 2.0, 1.0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ntkdp.plotting.save(ax, pathlib.Path(folder, "spectrum.png"))
    """
    if not isinstance(figure, Figure | Axes):
        raise TypeError(f"figure must be a Figure or an Axes, got {type(figure).__name__}")
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in _FORMATS:
        raise ValueError(
            f"path must end in one of {', '.join('.' + f for f in _FORMATS)}, got {str(path)!r}"
        )
    dpi = positive(dpi=dpi)
    with replacing(path) as temporary:
        figure_style.draw_into(temporary, figure, suffix, dpi)


def _named(predictions: Any) -> dict[str, Trajectory]:
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


def _check_panels(panels: Any) -> None:
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
        _named(panel[1])


def _share_curves(
    name: str, label: str, predictions: Predictions, run: Trajectory | None, ax: Axes | None
) -> Axes:
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        draw(ax, name, _named(predictions), run)
        ax.set_ylabel(label)
        ax.set_ylim(-0.03, 1.03)
        ax.legend(loc="best")
    return ax


def _percent(error: float) -> str:
    return f"{100 * error:.2g}%" if np.isfinite(error) else "infinite"


def _eigenvalues(kernel: Any) -> tuple[np.ndarray, float]:
    """Eigenvalues, largest first, and the value below which they are rounding."""
    given = np.asarray(kernel)
    rounding = np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps
    values: np.ndarray = given.astype(np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"kernel must be finite, got NaN or infinities in shape {values.shape}")
    shape = values.shape
    if values.size == 0 or not (
        values.ndim == 1
        or (values.ndim in (2, 4) and shape[0] == shape[1] and shape[-2] == shape[-1])
    ):
        raise ValueError(
            "kernel must have shape (n, n) or (n, n, K, K), or be eigenvalues (N,), not empty, "
            f"got {shape}"
        )
    if values.ndim == 4:
        size = shape[0] * shape[2]
        values = values.transpose(0, 2, 1, 3).reshape(size, size)
    if values.ndim == 2:
        asymmetry = np.max(np.abs(values - values.T))
        if asymmetry > np.sqrt(rounding) * np.max(np.abs(values)):
            raise ValueError(f"kernel must be symmetric, got entries that differ by {asymmetry:g}")
        values = np.linalg.eigvalsh(values)
    eigenvalues = np.sort(values)[::-1]
    return eigenvalues, float(len(eigenvalues) * rounding * np.max(np.abs(eigenvalues)))
