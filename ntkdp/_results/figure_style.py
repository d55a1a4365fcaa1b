"""The style of all pictures: fonts, palette, lines and ticks.

Predictions differ in colour (Okabe and Ito's palette), in dashes and in markers, so that any one of
the three tells them apart, in grey and without colour vision.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ntkdp._results.own_files import OwnFiles

LOOK: Any = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 10.0,
    "legend.fontsize": 9.0,
    "legend.title_fontsize": 9.0,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "pdf.fonttype": 42,
    "svg.hashsalt": "ntkdp",
}
#: Without the date, the same figure gives the same file.
_METADATA: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
#: Colour, dashes and marker; told apart by any one of the three.
STYLES = (
    ("#0072B2", (0, (1, 0)), "o"),
    ("#D55E00", (0, (5, 1.5)), "s"),
    ("#009E73", (0, (1.2, 1.2)), "^"),
    ("#CC79A7", (0, (5, 1.5, 1.2, 1.5)), "D"),
    ("#E69F00", (0, (8, 2)), "v"),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1)), "P"),
)
RUN_STYLE: dict[str, Any] = {"color": "0.72", "linewidth": 5.0, "solid_capstyle": "round"}
_RUN_BAND: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.65", "linewidth": 0.8}
_SIZE = (4.8, 3.4)


def axes_or_new(ax: Any) -> Axes:
    """The given Axes, or those of a new figure that pyplot does not know."""
    if ax is None:
        return Figure(figsize=_SIZE, layout="constrained").subplots()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be a matplotlib Axes, got {type(ax).__name__}")
    return ax


def save_png(figure: Figure | Axes, files: OwnFiles, name: str) -> None:
    """Write a figure, or that of any Axes, as one of the program's files."""
    with files.replacing(name) as temporary:
        draw_into(temporary, figure, "png", dpi=150)


def save_pictures(figure: Figure | Axes, files: OwnFiles, name: str) -> None:
    """Write a figure as PNG under this name, and as SVG, which stays sharp in print, next to it."""
    save_png(figure, files, name)
    with files.replacing(str(Path(name).with_suffix(".svg"))) as temporary:
        draw_into(temporary, figure, "svg", dpi=150)


def draw_into(path: Path, figure: Figure | Axes, form: str, dpi: float) -> None:
    """Write a figure, or that of any Axes, to a path in a format of this name."""
    whole = figure.get_figure(root=True) if isinstance(figure, Axes) else figure
    assert whole is not None
    with mpl.rc_context(LOOK):
        whole.savefig(path, format=form, dpi=dpi, metadata=_METADATA.get(form))


def drawable(ax: Axes, y: np.ndarray) -> np.ndarray:
    """NaN for what is not finite or, on a logarithmic axis, not positive."""
    return np.where(np.isfinite(y) & ((y > 0) | (ax.get_yscale() != "log")), y, np.nan)


def prediction_line(ax: Axes, x: np.ndarray, y: np.ndarray, style: int, label: str) -> Line2D:
    """One curve in the style of its place among the predictions."""
    colour, dashes, marker = STYLES[style % len(STYLES)]
    shown = drawable(ax, y)
    (line,) = ax.plot(
        x, shown, color=colour, linestyle=dashes, label=label,
        marker=marker, markerfacecolor="white",
        # Markers a fixed way apart on paper, staggered so that coinciding curves all show theirs;
        # matplotlib cannot place them on a curve without a point.
        markevery=(0.03 + 0.04 * style, 0.24) if np.any(np.isfinite(shown)) else None,
    )  # fmt: skip
    return line


def run_band(ax: Axes, x: Any, low: np.ndarray, high: np.ndarray, label: str) -> None:
    """The spread of runs in grey, edged so that it shows beneath that of a prediction."""
    ax.fill_between(x, low, high, label=label, **_RUN_BAND)


def prediction_band(
    ax: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, style: int, label: str
) -> None:
    """The spread of an ensemble, between lines of its colour and dashes: grey tints look alike."""
    colour, dashes, _ = STYLES[style % len(STYLES)]
    ax.fill_between(
        x, low, high, facecolor=(colour, 0.1), edgecolor=(colour, 0.9), linestyle=dashes,
        linewidth=0.8, label=label,
    )  # fmt: skip


def limit_log_loss(*axes: Axes, has_run: bool) -> None:
    """Limit the y axis to a factor of ten around the run, whatever a failed prediction does.

    Several Axes, which share their y axis, get the union of their limits.
    """
    low, high = np.inf, 0.0
    for ax in axes:
        drawn = [np.asarray(line.get_ydata(), np.float64) for line in ax.lines]
        bands = [path for shaded in ax.collections for path in shaded.get_paths()]
        drawn += [np.asarray(path.vertices)[:, 1] for path in bands]
        usable = [y[np.isfinite(y) & (y > 0)] for y in drawn]
        if has_run and usable[0].size:
            around = np.min(usable[0]) / 10, np.max(usable[0]) * 10
            usable = [np.clip(y, *around) for y in usable]
        together = np.concatenate(usable)
        low = min(low, np.min(together, initial=np.inf))
        high = max(high, np.max(together, initial=0.0))
    if high > 0:
        margin = (high / low) ** 0.05 if high > low else 1.1
        axes[0].set_ylim(low / margin, high * margin)
    readable_log_ticks(axes[0])


def readable_log_ticks(ax: Axes) -> None:
    """Set enough ticks, with plain numbers, if powers of ten alone would be too few."""
    low, high = ax.get_ylim()
    if high / low < 3:
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.yaxis.set_minor_locator(NullLocator())
    elif high / low < 300:
        ax.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5))
        )
        ax.yaxis.set_minor_formatter(NullFormatter())
    if low > 5e-4 and high < 5e4:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
