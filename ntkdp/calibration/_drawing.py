"""The drawing of a reliability diagram."""

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from ntkdp._backend.types import Array
from ntkdp._results import figure_style

if TYPE_CHECKING:
    from ntkdp.calibration._bins import Bins

#: Colour of the bars.
_ACCURACY = "0.80"
#: Least width of a bar: a bin of equal confidences has none, and must be seen.
_THINNEST = 0.015
#: Colour of the gap where the network is over-confident.
_OVER = figure_style.STYLES[1][0]
#: Colour of the gap where it is under-confident.
_UNDER = figure_style.STYLES[0][0]


def draw(bins: "Bins", error: Array, ax: Axes | None) -> Axes:
    """Bars of accuracy, the gaps to the mean confidence, the diagonal, the error and n."""
    edges, counts, confidence, accuracy = (np.asarray(v, np.float64) for v in bins)
    filled = counts > 0
    width = np.maximum(np.diff(edges), _THINNEST)
    left, width = (0.5 * (edges[:-1] + edges[1:] - width))[filled], width[filled]
    confidence, accuracy = confidence[filled], accuracy[filled]
    with mpl.rc_context(figure_style.LOOK):
        ax = figure_style.axes_or_new(ax)
        ax.bar(
            left, accuracy, width, align="edge", color=_ACCURACY, edgecolor="white",
            linewidth=0.8, label="accuracy",
        )  # fmt: skip
        for label, sign, colour, hatch in (
            ("over-confident", 1, _OVER, "////"),
            ("under-confident", -1, _UNDER, "\\\\\\\\"),
        ):
            there = sign * (confidence - accuracy) > 0
            if not np.any(there):
                continue
            ax.bar(
                left[there], (confidence - accuracy)[there], width[there], accuracy[there],
                align="edge", facecolor="none", edgecolor=colour, hatch=hatch, linewidth=1.0,
                label=label,
            )  # fmt: skip
        ax.plot([0, 1], [0, 1], color="0.25", linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_aspect("equal")
        ax.set_xlabel("confidence")
        ax.set_ylabel("accuracy")
        ax.set_title(f"ECE = {100 * float(error):.2g}%, n = {int(counts.sum()):,}")
        ax.legend(loc="upper left", handlelength=1.6)
    return ax
