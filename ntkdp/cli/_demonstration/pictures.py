"""The pictures of the demonstration."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkdp import comparison, plotting
from ntkdp._results import figure_style
from ntkdp.cli._demonstration.parts import Failure, Map, Private
from ntkdp.experiment import Results
from ntkdp.trajectory import Trajectory

#: Quantiles of the band, which holds 90% of the runs.
_BAND = (0.05, 0.95)
_SIZE = (8.6, 3.4)


def private(part: Private) -> Figure:
    """Every observed run on the band that was drawn before, and where each of them ends."""
    with mpl.rc_context(figure_style.LOOK):
        figure = Figure(figsize=(9.4, 3.4), layout="constrained")
        left, right, ends = figure.subplots(1, 3, width_ratios=(4, 4, 1.3))
        _draw_both(left, right, {"predicted": part.predicted}, part.observed)
        _draw_ends(ends, part)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def failure(part: Failure) -> Figure:
    """The same for runs in which noise moves the kernel."""
    predictions = {"frozen kernel": part.frozen, "kernels between times": part.between_times}
    with mpl.rc_context(figure_style.LOOK):
        figure = Figure(figsize=(9.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_both(left, right, predictions, part.observed, accuracy="accuracy")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def without_noise(results: Results) -> Figure:
    """Runs without noise under each clipping norm and scope, and the three predictions of each."""
    panels: dict[tuple[str, str], tuple[Trajectory, dict[str, Trajectory]]] = {}
    for case in results.cases:
        label = f"R = {case.clipping.clip_norm:g}"
        paths = {LABELS[name]: part.trajectory for name, part in case.predictions.items()}
        panels[case.clipping.scope, label] = (case.run, paths)
    return plotting.comparison_grid(panels)


def map_of_cells(part: Map) -> Figure:
    """Test accuracy of every cell, predicted and observed, the advised one starred."""
    return plotting.heat_maps(
        part.predicted.metrics,
        part.observed,
        part.predicted.learning_rates,
        part.predicted.clip_norms,
        names=["test_accuracy"],
        chosen=part.advice.index,
    )


#: What predictions are called in the pictures and tables.
LABELS = {"exact": "exact flow", "frozen": "frozen kernel", "infinite": "infinite width"}


def _draw_both(
    left: Axes,
    right: Axes,
    predictions: Mapping[str, Trajectory],
    observed: Trajectory,
    accuracy: str = "test_accuracy",
) -> None:
    """Loss on the left, accuracy on the right."""
    left.set_yscale("log")
    _draw(left, predictions, observed, "loss")
    _draw(right, predictions, observed, accuracy)
    left.set_ylabel("training loss")
    right.set_ylabel(accuracy.replace("_", " ") if "test" in accuracy else "training accuracy")
    figure_style.limit_log_loss(left, has_run=True)


def _draw(ax: Axes, predictions: Mapping[str, Trajectory], observed: Trajectory, name: str) -> None:
    """Bands below, every run on them, and the means on top."""
    times, runs = np.asarray(observed.times), np.asarray(getattr(observed, name))
    spreads = {
        label: comparison.band(getattr(path, name), _BAND) for label, path in predictions.items()
    }
    for style, (label, spread) in enumerate(spreads.items()):
        colour, dashes, _ = figure_style.STYLES[style]
        ax.fill_between(
            times, *spread.quantiles, facecolor=(colour, 0.25), edgecolor=(colour, 0.9),
            linestyle=dashes, linewidth=0.8, label=f"{label}, 90% of runs",
        )  # fmt: skip
    lines = ax.plot(times, runs.T, color="0.35", linewidth=0.5)
    lines[0].set_label(f"{len(runs)} observed runs")
    for style, (label, spread) in enumerate(spreads.items()):
        mean = np.asarray(spread.mean)
        figure_style.prediction_line(ax, times, mean, style, f"{label}, mean")
    ax.set_xlabel("time = learning rate × step")


def _draw_ends(ax: Axes, part: Private) -> None:
    """The final loss of every run, and the band that was predicted for it."""
    low, high = (float(level[-1]) for level in part.predicted_band)
    final = np.sort(np.asarray(part.observed.loss)[:, -1])
    inside = (final >= low) & (final <= high)
    colour = figure_style.STYLES[0][0]
    ax.axhspan(low, high, facecolor=(colour, 0.25), edgecolor=(colour, 0.9), linewidth=0.8)
    places = np.arange(final.size) / max(final.size - 1, 1)
    ax.plot(places[inside], final[inside], "o", color="0.35", markersize=4)
    ax.plot(places[~inside], final[~inside], "x", color="#D55E00", markersize=5)
    ax.set_xlim(-0.15, 1.15)
    ax.set_xticks([])
    ax.set_xlabel(f"{inside.sum()} of {final.size} inside")
    ax.set_title("final loss")
