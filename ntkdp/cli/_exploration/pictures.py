"""The pictures of the page, each of which takes the numbers of another place."""

from typing import Any

import numpy as np
from bokeh.models import (
    BoxAnnotation,
    ColorBar,
    ColumnDataSource,
    HoverTool,
    Label,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from ntkdp.cli._exploration.explorer import AXIS, STILL, USELESS, Answer, Band
from ntkdp.cli._exploration.setting import Position

_TRAINING, _TEST, _GREY = "#0072b2", "#d55e00", "#767676"
_TROUBLE, _FAILURE = "#f0b400", "#c02a1d"
_HEIGHT = 270
#: Ends of the axis of v(T), and of the map around its outermost values.
_LEAST_NOISE, _MOST_NOISE = 1e-6, 1e2
_BETWEEN = np.sqrt(np.multiply(AXIS[:-1], AXIS[1:]))
_EDGES = np.array([AXIS[0] ** 2 / _BETWEEN[0], *_BETWEEN, AXIS[-1] ** 2 / _BETWEEN[-1]])


class Pictures:
    """The pictures by name, and what puts numbers into them."""

    def __init__(self, shown: str, has_accuracy: bool) -> None:
        self._has_accuracy = has_accuracy
        self._map_title = f"Map: {shown}"
        self._steps = {name: _source("step mean low high") for name in _NAMES}
        self._bins = _source("left right accuracy confidence share")
        self._spectrum = _source("number kernel first last")
        self._stable = _source("number value")
        self._noise = _source("step variance")
        self._cells = _source("left right bottom top value rate norm")
        self._here = _source("rate norm")
        self._still = _source("rate norm")
        self._colours = LinearColorMapper("Viridis256", low=0, high=1, nan_color="#dddddd")
        self.figures: dict[str, Any] = {
            "loss": self._over_steps("Loss", "loss", "test_loss", "log"),
            "accuracy": self._over_steps("Accuracy", "accuracy", "test_accuracy", "linear"),
            "reliability": self._reliability(),
            "spectrum": self._eigenvalues(),
            "noise": self._weight_noise(),
            "map": self._map(shown),
        }
        self.figures["accuracy"].y_range = Range1d(0, 1)
        self.figures["accuracy"].yaxis.formatter = NumeralTickFormatter(format="0%")

    def show(self, answer: Answer) -> None:
        """Put in the numbers of a place, but for the map."""
        for name, source in self._steps.items():
            if name in answer.bands:
                source.data = {"step": answer.steps, **_columns(answer.bands[name])}
        if answer.reliability is not None:
            bins = answer.reliability.bins
            self._bins.data = {
                "left": bins.edges[:-1],
                "right": bins.edges[1:],
                "accuracy": np.where(bins.counts > 0, bins.accuracy, 0.0),
                "confidence": bins.confidence,
                "share": bins.counts / bins.counts.sum(),
            }
        spectrum = answer.spectrum
        self._spectrum.data = {
            "number": np.arange(1, len(spectrum.kernel) + 1),
            "kernel": _positive(spectrum.kernel),
            "first": _positive(spectrum.first),
            "last": _positive(spectrum.last),
        }
        self._stable.data = {
            "number": [1, len(spectrum.kernel)], "value": [spectrum.stable, spectrum.stable],
        }  # fmt: skip
        self._noise.data = {"step": answer.steps, "variance": _positive(answer.weight_noise)}
        self._mark(answer)

    def expect_map(self) -> None:
        """Say that the cells that are shown are those of another place."""
        self.figures["map"].title.text = f"{self._map_title}, being computed …"

    def show_map(self, values: np.ndarray) -> None:
        """Put in the values of the cells, a row for each clipping norm."""
        self.figures["map"].title.text = self._map_title
        rates, norms = np.meshgrid(AXIS, AXIS)
        left, bottom = np.meshgrid(_EDGES[:-1], _EDGES[:-1])
        right, top = np.meshgrid(_EDGES[1:], _EDGES[1:])
        self._cells.data = {
            "left": left.ravel(),
            "right": right.ravel(),
            "bottom": bottom.ravel(),
            "top": top.ravel(),
            "value": values.ravel(),
            "rate": rates.ravel(),
            "norm": norms.ravel(),
        }
        known = values[np.isfinite(values)]
        if known.size:
            # Of losses that diverge the colours would show nothing else.
            worst = 1.0 if self._has_accuracy else float(np.quantile(known, 0.8))
            self._colours.low = 0.0 if self._has_accuracy else float(known.min())
            self._colours.high = max(worst, self._colours.low + 1e-9)

    def _mark(self, answer: Answer) -> None:
        """The current cell, and the line along which v(T) is where a frozen kernel goes wrong."""
        place: Position = answer.place
        self._here.data = {"rate": [place.learning_rate], "norm": [place.clip_norm]}
        reached = answer.weight_noise[-1]
        line: dict[str, Any] = {"rate": [], "norm": []}
        if reached > 0:
            # v(T) is in proportion to the square of learning rate times clipping norm.
            product = place.learning_rate * place.clip_norm * np.sqrt(STILL / reached)
            rates = np.geomspace(_EDGES[0], _EDGES[-1], 50)
            inside = (product / rates > _EDGES[0]) & (product / rates < _EDGES[-1])
            line = {"rate": rates[inside], "norm": product / rates[inside]}
        self._still.data = line

    def _over_steps(self, title: str, training: str, test: str, scale: str) -> Any:
        shown = _figure(title, "step", y_axis_type=scale)
        for name, colour, dash, label in (
            (training, _TRAINING, "solid", "training"),
            (test, _TEST, "dashed", "test"),
        ):
            source = self._steps[name]
            shown.varea("step", "low", "high", source=source, color=colour, alpha=0.2)
            line = shown.line(
                "step", "mean", source=source, color=colour, line_dash=dash, width=2,
                legend_label=label,
            )  # fmt: skip
            tips = [
                ("step", "@step"), (label, "@mean{0.000}"), ("90%", "@low{0.000} to @high{0.000}"),
            ]  # fmt: skip
            shown.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))
        _legend(shown, "top_right" if scale == "log" else "bottom_right")
        return shown

    def _reliability(self) -> Any:
        shown = _figure("Reliability on the test samples", "confidence", "share that is right")
        shown.x_range, shown.y_range = Range1d(0, 1), Range1d(0, 1)
        shown.line([0, 1], [0, 1], color=_GREY, line_dash="dashed")
        bars = shown.quad(
            left="left", right="right", bottom=0, top="accuracy", source=self._bins,
            color=_TRAINING, fill_alpha=0.55, line_color="white",
        )  # fmt: skip
        shown.scatter("confidence", "accuracy", source=self._bins, color=_TEST, size=7)
        tips = [
            ("confidence", "@confidence{0.00}"), ("right", "@accuracy{0.0%}"),
            ("of the samples", "@share{0.0%}"),
        ]  # fmt: skip
        shown.add_tools(HoverTool(renderers=[bars], tooltips=tips))
        return shown

    def _eigenvalues(self) -> Any:
        shown = _figure("Spectrum of the kernel", "number", "eigenvalue", y_axis_type="log")
        for name, colour, marker, label in (
            ("kernel", _GREY, "circle", "kernel"),
            ("first", _TRAINING, "triangle", "clipped, first step"),
            ("last", _TEST, "square", "clipped, last step"),
        ):
            shown.scatter(
                "number", name, source=self._spectrum, line_color=colour, fill_color=None,
                marker=marker, size=6, legend_label=label,
            )  # fmt: skip
        shown.line(
            "number", "value", source=self._stable, color=_FAILURE, line_dash="dashed",
            legend_label="steps overshoot above",
        )  # fmt: skip
        _legend(shown, "top_right")
        return shown

    def _weight_noise(self) -> Any:
        shown = _figure("v(T): noise on the weights", "step", y_axis_type="log")
        shown.y_range = Range1d(_LEAST_NOISE, _MOST_NOISE)
        for bottom, top, colour, text in (
            (STILL, USELESS, _TROUBLE, "ever less right"),
            (USELESS, _MOST_NOISE, _FAILURE, "no prediction"),
        ):
            shown.add_layout(
                BoxAnnotation(bottom=bottom, top=top, fill_color=colour, fill_alpha=0.18)
            )
            shown.add_layout(
                Label(x=6, y=bottom * 1.2, x_units="screen", text=text, text_font_size="12px")
            )
        line = shown.line("step", "variance", source=self._noise, color=_TRAINING, width=2)
        tips = [("step", "@step"), ("v", "@variance{0.0000}")]
        shown.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))
        return shown

    def _map(self, name: str) -> Any:
        shown = _figure(
            self._map_title, "learning rate", "clipping norm",
            x_axis_type="log", y_axis_type="log",
        )  # fmt: skip
        shown.x_range = shown.y_range = Range1d(_EDGES[0], _EDGES[-1])
        cells = shown.quad(
            left="left", right="right", bottom="bottom", top="top", source=self._cells,
            fill_color={"field": "value", "transform": self._colours}, line_color="white",
            line_width=0.5,
        )  # fmt: skip
        shown.line("rate", "norm", source=self._still, color="white", line_dash="dashed", width=2)
        shown.scatter(
            "rate", "norm", source=self._here, marker="star", size=20, fill_color="white",
            line_color="black", line_width=1.5,
        )  # fmt: skip
        form = "0.0%" if self._has_accuracy else "0.000"
        tips = [
            ("learning rate", "@rate"), ("clipping norm", "@norm"), (name, f"@value{{{form}}}"),
        ]  # fmt: skip
        shown.add_tools(HoverTool(renderers=[cells], tooltips=tips))
        bar: dict[str, Any] = {"color_mapper": self._colours, "width": 10}
        if self._has_accuracy:
            bar["formatter"] = NumeralTickFormatter(format="0%")
        shown.add_layout(ColorBar(**bar), "right")
        return shown


_NAMES = ("loss", "test_loss", "accuracy", "test_accuracy")


def _source(names: str) -> ColumnDataSource:
    return ColumnDataSource({name: [] for name in names.split()})


def _columns(band: Band) -> dict[str, np.ndarray]:
    return dict(zip(("mean", "low", "high"), map(_finite, band), strict=True))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _positive(values: np.ndarray) -> np.ndarray:
    """NaN in place of what a logarithmic axis cannot show."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _figure(title: str, x: str, y: str = "", **options: Any) -> Any:
    """An empty picture as wide as its column, which leaves wheel and finger to the page."""
    shown = figure(
        title=title, x_axis_label=x, y_axis_label=y or None, height=_HEIGHT,
        sizing_mode="stretch_width", tools="", toolbar_location=None, **options,
    )  # fmt: skip
    shown.title.text_font_size = "15px"
    shown.grid.grid_line_alpha = 0.5
    shown.outline_line_color = None
    return shown


def _legend(shown: Any, place: str) -> None:
    shown.legend.location = place
    shown.legend.background_fill_alpha = 0.6
    shown.legend.border_line_color = None
    shown.legend.padding = 4
