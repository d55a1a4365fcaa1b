"""Curves as the charts of a page show them: plain numbers, in the style of the pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ntkdp._results import figure_style

#: Digits of a number in a page.
_DIGITS = 6
#: A logarithmic axis from this ratio of its ends on; below, it would have hardly a tick.
_LEAST_LOG_RATIO = 5.0
#: Larger numbers have no place on an axis, nor those below its inverse on a logarithmic one.
_LARGEST = 1e100
_RUN_COLOUR, _RUN_WIDTH = "#8a8a8a", 4.0


class Curve(NamedTuple):
    """A line over time, with a band around it if ``low`` and ``high`` are given.

    ``style`` is the place among the predictions; None stands for the runs.
    """

    label: str
    times: np.ndarray
    values: np.ndarray
    style: int | None
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Panel(NamedTuple):
    """Curves that share their axes.

    A ``log`` axis is logarithmic if its ends are far apart. A share has an axis from zero to one.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log: bool = False
    is_share: bool = False


def as_plain(panel: Panel) -> dict[str, Any]:
    """A panel as numbers and text, for the script of the page.

    A number that is not finite, or not positive where the axis may be logarithmic, is None: a gap.
    The y axis reaches a factor of ten around the runs at most, as in the pictures.
    """
    limits = _limits(panel)
    is_log = panel.log and limits is not None and limits[1] > _LEAST_LOG_RATIO * limits[0]
    return {
        "title": panel.title,
        "x_label": panel.x_label,
        "y_label": panel.y_label,
        "log": is_log,
        "limits": None if limits is None else [_rounded(end) for end in limits],
        "curves": [_plain_curve(curve, panel.log) for curve in panel.curves],
    }


def _limits(panel: Panel) -> tuple[float, float] | None:
    """Ends of the y axis; None if nothing can be drawn."""
    if panel.is_share:
        return 0.0, 1.0
    shown = {curve.style: _drawn(curve, panel.log) for curve in panel.curves}
    if panel.log:
        around = shown.get(None, np.zeros(0))
        if around.size:
            ends = around.min() / 10, around.max() * 10
            shown = {style: np.clip(values, *ends) for style, values in shown.items()}
    together = np.concatenate([*shown.values(), np.zeros(0)])
    if not together.size:
        return None
    low, high = float(together.min()), float(together.max())
    if panel.log:
        margin = (high / low) ** 0.05 if high > low else 1.1
        return low / margin, high * margin
    margin = 0.05 * (high - low) or max(abs(high), 1.0) / 10
    return low - margin, high + margin


def _drawn(curve: Curve, log: bool) -> np.ndarray:
    """All numbers of a curve that can be drawn."""
    parts = [part for part in (curve.values, curve.low, curve.high) if part is not None]
    numbers = np.concatenate([np.ravel(np.asarray(part, np.float64)) for part in parts])
    drawn: np.ndarray = numbers[_has_place(numbers, log)]
    return drawn


def _has_place(numbers: np.ndarray, log: bool) -> np.ndarray:
    has_place: np.ndarray = (np.abs(numbers) < _LARGEST) & ((numbers > 1 / _LARGEST) | (not log))
    return has_place


def _plain_curve(curve: Curve, log: bool) -> dict[str, Any]:
    colour, width = _RUN_COLOUR, _RUN_WIDTH
    dash: tuple[float, ...] = (1.0, 0.0)
    if curve.style is not None:
        colour, dashes, _ = figure_style.STYLES[curve.style % len(figure_style.STYLES)]
        width, dash = float(figure_style.LOOK["lines.linewidth"]), dashes[1]
    return {
        "label": curve.label,
        "colour": colour,
        "width": width,
        "dash": [round(width * part, 1) for part in dash] if 0 not in dash else [],
        "x": [_rounded(t) for t in np.asarray(curve.times, np.float64).tolist()],
        "y": _plain_numbers(curve.values, log),
        "low": None if curve.low is None else _plain_numbers(curve.low, log),
        "high": None if curve.high is None else _plain_numbers(curve.high, log),
    }


def _plain_numbers(values: np.ndarray, log: bool) -> list[float | None]:
    numbers = np.asarray(values, np.float64)
    return [
        _rounded(number) if shown else None
        for number, shown in zip(numbers.tolist(), _has_place(numbers, log).tolist(), strict=True)
    ]


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
