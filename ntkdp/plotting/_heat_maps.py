"""Pictures of a sweep: heat maps of its cells, and accuracy against calibration."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike
from ntkdp._results import figure_style
from ntkdp.comparison import (
    HIGHER_IS_BETTER,
    CellMetrics,
    check_cells,
    known,
    pareto_front,
    value_of,
)

_LABELS = {"loss": "loss", "accuracy": "accuracy (%)", "ece": "ECE (%)", "mce": "MCE (%)"}
#: From worse to better, in lightness too: for print, and without colour vision.
_COLOURS = "viridis"
_DIVERGED: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.7", "hatch": "////"}
_DIVERGED_LABEL = "div.: diverged, the last training loss is above the first or not finite"
#: Width and height of a cell in inches.
_CELL = (0.5, 0.29)
#: Width and height around the panels in inches.
_AROUND = (1.75, 0.62)
#: An ECE below this is drawn here, on the logarithmic axis.
_LEAST_ECE = 1e-4


def heat_maps(
    predicted: CellMetrics,
    observed: CellMetrics | None,
    learning_rates: ArrayLike,
    clip_norms: ArrayLike,
    *,
    names: Sequence[str] = ("test_accuracy", "test_ece", "test_mce", "test_loss"),
    title: str | None = None,
    chosen: int | None = None,
) -> Figure:
    """The end of training over learning rates and clipping norms, predicted next to observed.

    Parameters
    ----------
    predicted : CellMetrics
        Metrics of the L R cells, all norms of the first learning rate first, as in
        :class:`ntkdp.advisor.Grid`.
    observed : CellMetrics or None
        Metrics of the same cells, or None to show the prediction alone.
    learning_rates, clip_norms : array
        ``(L,)`` and ``(R,)``, positive and different, in any order.
    names : sequence of str
        Metrics, each of which gets a row of panels; one that a side does not have is left out.
    title : str, optional
        Above all panels.
    chosen : int, optional
        Index of a cell that gets a star, such as ``Advice.index``.

    Returns
    -------
    Figure
        The largest learning rate is on top. Each pair of panels has one scale of colours, over the
        cells that converge, the better the brighter; it is logarithmic for losses. Diverged cells
        are hatched, marked "div." and give their value where it is finite.

    Raises
    ------
    TypeError, ValueError
        If a side is not CellMetrics or does not have L R cells, rates or norms are not positive or
        repeat, a name is unknown, both sides have none of the names, or there is no chosen cell.

    Notes
    -----
    The layout follows Bu et al. (2023), figure 3.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> loss = np.array([0.5, 0.25, 0.125, 4.0])
    >>> metrics = ntkdp.advisor.CellMetrics(loss, *[None] * 7, diverged=loss > 1)
    >>> figure = ntkdp.plotting.heat_maps(metrics, None, [0.1, 1.0], [0.5, 5.0], names=["loss"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.500', '0.250', '0.125', 'div.\\n4.00']
    """
    rates, by_rate = _axis(learning_rates=learning_rates)
    norms, by_norm = _axis(clip_norms=clip_norms)
    sides = {"predicted": predicted} | ({} if observed is None else {"observed": observed})
    for side, metrics in sides.items():
        size = check_cells(**{side: metrics})
        if size != rates.size * norms.size:
            raise ValueError(
                f"{side} must have a cell for each of {rates.size} learning rates with each of "
                f"{norms.size} clipping norms, {rates.size * norms.size}, got {size}"
            )
    shown = _shown(names, sides)
    _check_chosen(chosen, rates.size * norms.size)

    def as_grid(cells: np.ndarray) -> np.ndarray:
        """Cells by increasing learning rate and norm."""
        return np.asarray(cells.reshape(rates.size, norms.size)[np.ix_(by_rate, by_norm)])

    diverged = {side: as_grid(metrics.diverged) for side, metrics in sides.items()}
    with mpl.rc_context(figure_style.LOOK | {"hatch.linewidth": 0.6}):
        figure = Figure(
            figsize=(
                len(sides) * (norms.size * _CELL[0] + 0.2) + _AROUND[0],
                len(shown) * (rates.size * _CELL[1] + _AROUND[1]) + 0.7,
            ),
            layout=ConstrainedLayoutEngine(h_pad=0.07),
        )
        grid = figure.subplots(len(shown), len(sides), squeeze=False, sharex=True, sharey=True)
        for row, name in zip(grid, shown, strict=True):
            values = {side: as_grid(value_of(metrics, name)) for side, metrics in sides.items()}
            if not name.endswith("loss"):
                values = {side: 100 * part for side, part in values.items()}
            lost = {side: diverged[side] | ~np.isfinite(values[side]) for side in sides}
            scale = _scale(name, np.concatenate([values[side][~lost[side]] for side in sides]))
            colours = mpl.colormaps[_COLOURS if HIGHER_IS_BETTER[name] else f"{_COLOURS}_r"]
            for ax, side in zip(row, sides, strict=True):
                mesh = _draw_cells(ax, name, values[side], lost[side], scale, colours)
                ax.set_title(f"{_label(name)}, {side}")
                if chosen is not None:
                    place = np.argwhere(as_grid(np.arange(rates.size * norms.size)) == chosen)[0]
                    _star(ax, *map(int, place))
            bar = figure.colorbar(mesh, ax=list(row), pad=0.015, aspect=18)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=2.5)
            if isinstance(scale, LogNorm):
                figure_style.readable_log_ticks(bar.ax)
        _name_axes(grid, rates[by_rate], norms[by_norm])
        handles = [Patch(**_DIVERGED)] if any(np.any(lost) for lost in diverged.values()) else []
        figure.legend(
            handles, [_DIVERGED_LABEL] * len(handles), title="the brighter, the better",
            loc="outside lower center",
        )  # fmt: skip
        if title is not None:
            figure.suptitle(title, fontsize=11)
    return figure


def trade_off(
    predicted: CellMetrics,
    observed: CellMetrics | None = None,
    *,
    chosen: int | None = None,
    test: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against expected calibration error of all cells, with the best trade-offs.

    Parameters
    ----------
    predicted : CellMetrics
        Metrics of C cells of a classification.
    observed : CellMetrics, optional
        Metrics of the same cells.
    chosen : int, optional
        Index of a cell, which gets a star on each side, with dots between the two.
    test : bool
        Whether to show the test set.
    ax : Axes, optional
        As for :func:`ntkdp.plotting.loss_curves`.

    Returns
    -------
    Axes
        The cells of :func:`ntkdp.advisor.pareto_front` are filled, with lines at the least ECE for
        this accuracy or a better one. Diverged cells are crosses. The axis of the ECE is
        logarithmic and starts at 0.01%, where smaller values are drawn.

    Raises
    ------
    TypeError, ValueError
        If metrics have no accuracy or no ECE, sides differ in their number of cells, or the index
        is out of range.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> accuracy, ece = np.array([0.5, 0.75, 0.625]), np.array([0.01, 0.05, 0.07])
    >>> metrics = ntkdp.advisor.CellMetrics(accuracy, accuracy, ece, *[None] * 5,
    ...                                     diverged=np.zeros(3, bool))
    >>> ax = ntkdp.plotting.trade_off(metrics, chosen=1, test=False)
    >>> {line.get_label(): line.get_xdata().tolist() for line in ax.lines}["chosen cell"]
    [75.0]
    """
    sides = {"predicted": predicted} | ({} if observed is None else {"observed": observed})
    sizes = [check_cells(**{side: metrics}) for side, metrics in sides.items()]
    if len(set(sizes)) > 1:
        raise ValueError(f"observed must have the cells of predicted, {sizes[0]}, got {sizes[1]}")
    _check_chosen(chosen, sizes[0])
    prefix, where = ("test_", "test ") if test else ("", "training ")
    fronts = {side: pareto_front(metrics, test=test)[0] for side, metrics in sides.items()}
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        ax.set_yscale("log", nonpositive="mask")
        moved = []
        # The run lies beneath in thick grey, as in the other pictures.
        for side in reversed(sides):
            accuracy, ece = (
                100 * value_of(sides[side], prefix + name) for name in ("accuracy", "ece")
            )
            ece = np.maximum(ece, 100 * _LEAST_ECE)
            _draw_side(ax, side, accuracy, ece, sides[side].diverged, fronts[side])
            if chosen is not None:
                moved.append((accuracy[chosen], ece[chosen]))
        if chosen is not None:
            # One cell in two places: dots lead from one to the other.
            ax.plot(
                *np.transpose(moved), color="black", linestyle=":", linewidth=1.2, marker="*",
                markersize=14.0, markerfacecolor=figure_style.STYLES[4][0], markeredgewidth=0.8,
                zorder=4, label="chosen cell",
            )  # fmt: skip
        ax.set_xlabel(f"{where}accuracy (%)")
        ax.set_ylabel(f"{where}ECE (%)")
        figure_style.readable_log_ticks(ax)
        ax.legend(loc="best")
    return ax


def _check_chosen(chosen: int | None, n_cells: int) -> None:
    if chosen is not None and not 0 <= chosen < n_cells:
        raise ValueError(f"chosen must be in 0 .. {n_cells - 1} or None, got {chosen}")


def _axis(**named: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Different positive numbers, and the order in which they increase."""
    ((name, values),) = named.items()
    array = np.asarray(validate.positive(**named), np.float64)
    if array.ndim != 1 or not array.size or np.unique(array).size < array.size:
        raise ValueError(f"{name} must be an array of different numbers, got {values!r}")
    return array, np.argsort(array)


def _shown(names: Sequence[str], sides: dict[str, CellMetrics]) -> list[str]:
    """The metrics that every side has."""
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of metrics, got {names!r}; put it in a list")
    for name in names:
        validate.choice(HIGHER_IS_BETTER, name=name)
    shown = [name for name in names if all(name in known(metrics) for metrics in sides.values())]
    if not shown:
        had = " and ".join(f"{side} has {', '.join(known(part))}" for side, part in sides.items())
        raise ValueError(f"names must hold a metric that was measured, got {names!r}; {had}")
    return shown


def _label(name: str) -> str:
    where = "test" if name.startswith("test_") else "training"
    return f"{where} {_LABELS[name.removeprefix('test_')]}"


def _scale(name: str, values: np.ndarray) -> Normalize:
    """One scale of colours for a pair of panels, whose ends differ."""
    if name.endswith("loss") and np.any(values > 0):
        low, high = np.min(values[values > 0]), np.max(values)
        return LogNorm(low, high) if high > low else LogNorm(low / 1.1, low * 1.1)
    low, high = (np.min(values), np.max(values)) if values.size else (0.0, 1.0)
    return Normalize(low, high) if high > low else Normalize(low - 1, low + 1)


def _draw_cells(
    ax: Axes, name: str, values: np.ndarray, lost: np.ndarray, scale: Normalize, colours: Colormap
) -> QuadMesh:
    written = _three_digits if name.endswith("loss") else "{:.1f}".format
    shown = np.clip(values, scale.vmin, scale.vmax)
    mesh = ax.pcolormesh(
        np.ma.masked_where(lost, shown), cmap=colours, norm=scale, edgecolors="white", linewidth=0.8
    )
    for (row, column), value in np.ndenumerate(values):
        number = written(value) if np.isfinite(value) else ""
        colour, box = "black", None
        if lost[row, column]:
            ax.add_patch(Rectangle((column, row), 1, 1, linewidth=0, **_DIVERGED))
            number = f"div.\n{number}".rstrip()
            box = {"facecolor": _DIVERGED["facecolor"], "edgecolor": "none", "pad": 0.6}
        else:
            colour = _readable_on(colours(scale(shown[row, column])))
        ax.text(
            column + 0.5, row + 0.5, number, ha="center", va="center", color=colour, bbox=box,
            fontsize=7.0 if lost[row, column] else 8.0, linespacing=1.1,
        )  # fmt: skip
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def _star(ax: Axes, row: int, column: int) -> None:
    """Mark a cell in its corner, where it hides no number."""
    ax.plot(
        column + 0.86, row + 0.74, "*", color="#D55E00", markersize=11, markeredgecolor="white",
        markeredgewidth=0.8, clip_on=False,
    )  # fmt: skip


def _name_axes(grid: np.ndarray, rates: np.ndarray, norms: np.ndarray) -> None:
    for ax in grid.flat:
        ax.set_xticks(np.arange(norms.size) + 0.5, [_plain(norm) for norm in norms])
        ax.set_yticks(np.arange(rates.size) + 0.5, [_plain(rate) for rate in rates])
    for ax in grid[-1]:
        ax.set_xlabel("clipping norm $R$")
    for ax in grid[:, 0]:
        ax.set_ylabel("learning rate")


def _draw_side(
    ax: Axes,
    side: str,
    accuracy: np.ndarray,
    ece: np.ndarray,
    diverged: np.ndarray,
    best: np.ndarray,
) -> None:
    run = side == "observed"
    colour, _, marker = ("0.55", "solid", "s") if run else figure_style.STYLES[0]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markeredgewidth": 1.2}
    ax.plot(
        accuracy[~diverged], ece[~diverged], linestyle="none", markerfacecolor="white",
        label=side, **style,
    )  # fmt: skip
    ax.plot(
        accuracy[best], ece[best], linewidth=3.5 if run else 1.6, drawstyle="steps-pre",
        label=f"{side}, best trade-offs", **style,
    )  # fmt: skip
    crossed = diverged & np.isfinite(accuracy) & np.isfinite(ece)
    if np.any(crossed):
        ax.plot(
            accuracy[crossed], ece[crossed], color=colour, linestyle="none", marker="x",
            label=f"{side}, diverged",
        )  # fmt: skip


def _three_digits(value: float) -> str:
    if 1e-3 <= abs(value) < 1e3 or value == 0:
        return f"{value:#.3g}".removesuffix(".")
    if 1e3 <= abs(value) < 1e5:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _plain(value: float) -> str:
    """A number on an axis: 0.0001 and 4096, not 1e-04."""
    if 1e-5 <= value < 1e6:
        return np.format_float_positional(value, precision=4, fractional=False, trim="-")
    return f"{value:.3g}"


def _readable_on(background: tuple[float, ...]) -> str:
    """Black or white, whichever has the greater contrast (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"
