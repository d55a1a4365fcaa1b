"""Pictures of a plan: frontiers, and maps of the cells around the recommended one."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkdp._results import figure_style
from ntkdp.advisor import BudgetPlan, Recommendation

_SIZE = (4.8, 3.4)
#: Names of the fields of a cell.
_AXES = {
    "learning_rate": "learning rate",
    "clip_norm": "clipping norm R",
    "steps": "steps",
    "sample_rate": "sampling rate q",
}
_DIVERGED: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.7", "hatch": "////"}


def of_epsilon(plan: BudgetPlan) -> Figure:
    """The objective of the recommended run against its budget, with its uncertainty."""
    figure, ax = _axes()
    budgets = [one.epsilon for one in plan.recommended]
    values, errors = (
        _shown(plan, [getattr(one, name) for one in plan.recommended])
        for name in ("value", "uncertainty")
    )
    colour, dashes, marker = figure_style.STYLES[0]
    ax.errorbar(
        budgets, values, errors, color=colour, linestyle=dashes, marker=marker, capsize=3,
        label="recommended run",
    )  # fmt: skip
    more = [one.with_twice_the_data for one in plan.recommended]
    if any(value is not None for value in more):
        other, dotted, square = figure_style.STYLES[1]
        twice = _shown(plan, [np.nan if value is None else value for value in more])
        ax.plot(
            budgets, twice, color=other, linestyle=dotted, marker=square, label="twice the data"
        )
    _name_budgets(ax, budgets)
    ax.set_ylabel(_label(plan))
    ax.legend()
    return figure


def of_compute(plan: BudgetPlan) -> Figure:
    """The best that a run of so much compute may reach, for each budget."""
    figure, ax = _axes()
    for style, one in enumerate(reversed(plan.recommended)):
        frontier = plan.frontier_of_compute(one.epsilon)
        values = _shown(plan, getattr(plan.cells.metrics, plan.objective)[frontier])
        colour, dashes, marker = figure_style.STYLES[style % len(figure_style.STYLES)]
        ax.plot(
            plan.cells.compute[frontier] / plan.n_samples, values, color=colour, linestyle=dashes,
            marker=marker, drawstyle="steps-post", label=f"epsilon {one.epsilon:g}",
        )  # fmt: skip
        epochs, reached = one.compute / plan.n_samples, _shown(plan, [one.value])
        ax.plot([epochs], reached, marker="*", markersize=12, color=colour, markeredgecolor="k")
    ax.set_xscale("log")
    ax.set_xlabel("passes over the data, steps times q")
    ax.set_ylabel(_label(plan))
    ax.legend(title="star: recommended")
    return figure


def maps(plan: BudgetPlan, one: Recommendation) -> Figure:
    """The grid at a budget: over learning rate and R, and over steps and q, the best of the rest.

    The star is at the cell next to the recommended one, of those that have a value.
    """
    with mpl.rc_context(figure_style.LOOK):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        pairs = (("learning_rate", "clip_norm"), ("steps", "sample_rate"))
        panels = figure.subplots(1, 2)
        tables = [_best_over_the_rest(plan, one, pair) for pair in pairs]
        finite = np.concatenate([table[np.isfinite(table)] for table, _, _ in tables])
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        is_loss = plan.objective.endswith("loss")
        colours = mpl.colormaps["viridis_r" if is_loss or "ece" in plan.objective else "viridis"]
        image = None
        for ax, pair, (table, rows, columns) in zip(panels, pairs, tables, strict=True):
            ax.set_facecolor(_DIVERGED["facecolor"])
            image = ax.imshow(
                table, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto"
            )
            _write_values(ax, table, low, high, reverse=colours.name.endswith("_r"))
            for axis, values in ((ax.yaxis, rows), (ax.xaxis, columns)):
                axis.set_ticks(range(len(values)), [f"{value:g}" for value in values])
            ax.set_ylabel(_AXES[pair[0]])
            ax.set_xlabel(_AXES[pair[1]])
            away = [
                np.log(values / getattr(one, name)) ** 2
                for name, values in zip(pair, (rows, columns), strict=True)
            ]
            distances = np.where(np.isfinite(table), away[0][:, None] + away[1], np.inf)
            at = np.unravel_index(int(np.argmin(distances)), table.shape)
            ax.plot(
                [at[1] + 0.34], [at[0] + 0.3], marker="*", markersize=12, color="#D55E00",
                markeredgecolor="white", clip_on=False,
            )  # fmt: skip
            ax.tick_params(length=0)
        assert image is not None
        figure.colorbar(image, ax=list(panels), pad=0.015, label=_label(plan))
        figure.suptitle(f"Predicted at epsilon {one.epsilon:g}, the best over the other two axes")
    return figure


def _best_over_the_rest(
    plan: BudgetPlan, one: Recommendation, pair: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best objective of the grid's cells at each pair of values, and the values."""
    cells = plan.cells
    at = np.flatnonzero(cells.epsilon[: plan.n_grid] == one.epsilon)
    rows, columns = (np.unique(getattr(cells, name)[at]) for name in pair)
    table = np.full((len(rows), len(columns)), np.nan)
    values = _shown(plan, getattr(cells.metrics, plan.objective))
    better = np.fmax if plan.objective.endswith("accuracy") else np.fmin
    for index in at[~cells.metrics.diverged[at]]:
        place = tuple(
            int(np.searchsorted(values_of, getattr(cells, name)[index]))
            for name, values_of in zip(pair, (rows, columns), strict=True)
        )
        table[place] = better(table[place], values[index])
    return table, rows, columns


def _write_values(ax: Axes, table: np.ndarray, low: float, high: float, reverse: bool) -> None:
    for (row, column), value in np.ndenumerate(table):
        if not np.isfinite(value):
            ax.text(column, row, "none", ha="center", va="center", color="0.4", fontsize=8)
            continue
        share = (value - low) / (high - low) if high > low else 0.5
        is_dark = (1 - share if reverse else share) < 0.6
        ax.text(
            column, row, f"{value:.3g}", ha="center", va="center", fontsize=8,
            color="white" if is_dark else "black",
        )  # fmt: skip


def _axes() -> tuple[Figure, Axes]:
    with mpl.rc_context(figure_style.LOOK):
        figure = Figure(figsize=_SIZE, layout="constrained")
        return figure, figure.subplots()


def _name_budgets(ax: Axes, budgets: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(list(budgets), [f"{budget:g}" for budget in budgets])
    ax.minorticks_off()
    ax.set_xlabel("budget epsilon")


def _shown(plan: BudgetPlan, values: Any) -> np.ndarray:
    """Values of the objective as they are drawn: shares in per cent."""
    return np.asarray(values, np.float64) * (1 if plan.objective.endswith("loss") else 100)


def _label(plan: BudgetPlan) -> str:
    name = plan.objective.removeprefix("test_")
    unit = "" if name == "loss" else " (%)"
    return f"test {name.upper() if name == 'ece' else name}{unit}"
