"""The pictures of a run folder, and the same curves as charts for its page."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkdp import plotting
from ntkdp._backend.types import Array
from ntkdp._results.figure_style import LOOK
from ntkdp._results.interactive import charts
from ntkdp.comparison.curves import LEVELS
from ntkdp.experiment._predictions import LABELS
from ntkdp.experiment._run import Results
from ntkdp.ntk import FeatureKernel, LayerwiseKernel
from ntkdp.trajectory import Trajectory, band

#: Scope and rule of a case, its run, and its predictions by label.
Panels = dict[tuple[str, str], tuple[Trajectory, dict[str, Trajectory]]]
#: Rows of the largest matrix whose eigenvalues are drawn.
_LARGEST_SPECTRUM = 1024
_TIME = "time t = learning rate × step"


class Picture(NamedTuple):
    """A figure with its caption, and its curves as a chart for the page, if it has curves."""

    name: str
    figure: Figure | Axes
    caption: str
    chart: list[charts.Panel] | None = None


def pictures(results: Results) -> list[Picture]:
    """Every picture, in the order of the page."""
    panels = {}
    for case in results.cases:
        scope, _, rule = case.title.partition(" ")
        predicted = {LABELS[name]: p.trajectory for name, p in case.predictions.items()}
        panels[scope, rule] = (case.run, predicted)
    # A prediction of many outputs leaves out the test points.
    tested = {
        title: (
            run,
            {label: path for label, path in paths.items() if path.test_loss is not None},
        )
        for title, (run, paths) in panels.items()
    }
    drawn = [
        Picture(
            "loss.png",
            plotting.comparison_grid(panels),
            "Training loss, predicted and observed.",
            _chart(results, panels, "loss", "training loss", log=True),
        ),
        Picture(
            "relative_error.png",
            _each(panels, plotting.relative_error),
            "Relative error of the predicted training loss.",
            _chart_of_errors(results),
        ),
        Picture(
            "clip_fraction.png",
            _each(panels, plotting.clip_fraction),
            "Share of samples (layerwise: of samples and layers) that are clipped.",
            _chart(results, panels, "clip_fraction", "share clipped", is_share=True),
        ),
    ]
    if all(case.run.test_loss is not None for case in results.cases):
        drawn.append(
            Picture(
                "test_loss.png",
                _each(tested, partial(plotting.loss_curves, test=True)),
                "Test loss, predicted and observed.",
                _chart(results, tested, "test_loss", "test loss", log=True),
            )
        )
    if all(case.run.test_accuracy is not None for case in results.cases):
        drawn.append(
            Picture(
                "test_accuracy.png",
                _each(tested, partial(plotting.accuracy, test=True)),
                "Test accuracy, predicted and observed.",
                _chart(results, tested, "test_accuracy", "test accuracy", is_share=True),
            )
        )
    if all(case.run_margins is not None for case in results.cases):
        drawn.append(
            Picture(
                "margins.png",
                _margins_of_classes(results),
                "Mean margin of each class at the end: its own output less the mean of the others, "
                "over its training samples and all runs. A loss may be right where these are not.",
            )
        )
    for kind, kernel in results.kernels.items():
        drawn.append(
            Picture(
                f"spectrum_{kind}.png",
                plotting.kernel_spectrum(_drawable(kernel.train), label=f"{kind} kernel"),
                f"Eigenvalues of the {kind} kernel on the training set"
                + (" and of its layers." if isinstance(kernel.train, LayerwiseKernel) else "."),
            )
        )
    return drawn


def _chart(
    results: Results, panels: Panels, name: str, label: str, **axis: bool
) -> list[charts.Panel]:
    """One panel for every case: the runs, and on them the predictions."""
    styles = {LABELS[kind]: style for style, kind in enumerate(results.config.predictions)}
    drawn = []
    for (scope, rule), (run, predicted) in panels.items():
        curves = [_curve("observed", run, name, None)]
        curves += [_curve(title, path, name, styles[title]) for title, path in predicted.items()]
        drawn.append(charts.Panel(f"{scope}, {rule}", _TIME, label, curves, **axis))
    return drawn


def _curve(label: str, path: Trajectory, name: str, style: int | None) -> charts.Curve:
    """The mean of runs in their band, or the only one."""
    values, times = np.asarray(getattr(path, name), np.float64), np.asarray(path.times)
    if values.ndim == 1 or len(values) == 1:
        return charts.Curve(label, times, values.reshape(-1), style)
    found = band(values, LEVELS)
    low, high = found.quantiles
    return charts.Curve(f"{label}, {len(values)} runs", times, found.mean, style, low, high)


def _chart_of_errors(results: Results) -> list[charts.Panel]:
    styles: dict[str, int] = {kind: n for n, kind in enumerate(results.config.predictions)}
    return [
        charts.Panel(
            case.title.replace(" ", ", ", 1),
            _TIME,
            "relative error (%)",
            [
                charts.Curve(
                    LABELS[name],
                    prediction.comparison.times,
                    100 * prediction.comparison.relative_error,
                    styles[name],
                )
                for name, prediction in case.predictions.items()
            ],
            log=True,
        )
        for case in results.cases
    ]


def _each(panels: Panels, draw: Callable[..., Axes]) -> Figure:
    """One panel for every case, side by side."""
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
        for number, ((scope, rule), (run, predicted)) in enumerate(panels.items()):
            ax = figure.add_subplot(rows, columns, number + 1)
            draw(predicted, run, ax=ax)
            ax.set_title(f"{scope}, {rule}")
    return figure


def _margins_of_classes(results: Results) -> Figure:
    """One panel for every case: bars of the runs, and a marker for each prediction."""
    columns = min(len(results.cases), 2)
    rows = -(-len(results.cases) // columns)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
        for number, case in enumerate(results.cases):
            ax = figure.add_subplot(rows, columns, number + 1)
            assert case.run_margins is not None
            place = np.arange(case.run_margins.shape[1])
            ax.bar(place, case.run_margins[-1], color="0.85", label="observed")
            shown = [(n, p) for n, p in case.predictions.items() if p.margins is not None]
            for (name, prediction), marker in zip(shown, "osD^v", strict=False):
                assert prediction.margins is not None
                ax.plot(place, prediction.margins[-1], marker, ms=5, label=LABELS[name], alpha=0.8)
            ax.set(xlabel="class", ylabel="mean margin", title=case.title)
            ax.set_xticks(place)
            ax.margins(y=0.35)
            ax.legend(ncols=2, fontsize="small")
    return figure


def _drawable(kernel: Array | LayerwiseKernel | FeatureKernel) -> Array | LayerwiseKernel:
    """The kernel on the first samples, so few that its eigenvalues take only seconds."""
    if isinstance(kernel, FeatureKernel):
        return FeatureKernel(kernel.rows[:_LARGEST_SPECTRUM]).written_out()
    values = kernel.values if isinstance(kernel, LayerwiseKernel) else kernel[None]
    n_outputs = values.shape[-1] if values.ndim == 5 else 1
    n_kept = max(1, _LARGEST_SPECTRUM // n_outputs)
    values = values[:, :n_kept, :n_kept]
    if isinstance(kernel, LayerwiseKernel):
        return LayerwiseKernel(kernel.names, values)
    return values[0]
