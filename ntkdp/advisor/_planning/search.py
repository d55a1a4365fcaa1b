"""The search of a plan: a grid, finer cells around the best of it, and a choice of the best few."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from ntkdp._backend.types import Array, Key
from ntkdp.advisor._planning.cells import Axes, Cell
from ntkdp.advisor._planning.prediction import Ends, Setting, Told, joined, predict
from ntkdp.comparison import HIGHER_IS_BETTER, CellMetrics, candidates, value_of

#: Cells of each budget that the last round decides between, with runs of their own.
_FINALISTS = 3
#: Ratio of neighbouring values on an axis that has a single one.
_ALONE = 4.0
#: Accuracy that a cell may give up for a better calibration error.
_SLACK = 0.02


Tree = TypeVar("Tree")


class Found(NamedTuple):
    """All cells that a search predicted, of which the grid comes first.

    ``finalists`` are the best few of each budget, and ``last`` are their ends in runs of their own,
    one after another: by chance the best of many cells looks better than it is.
    """

    cells: list[Cell]
    ends: Ends
    n_grid: int
    finalists: dict[float, list[int]]
    last: Ends


def search(
    setting: Setting,
    axes: Axes,
    most_compute: float,
    refinements: int,
    keys: Key[Array, " S"],
    last_keys: Key[Array, " L"],
    told: Told,
) -> Found:
    """Predict the grid, then so many rounds around the best of each budget, then the best few."""
    parts = refinements + 2
    cells = axes.cells(setting.n_samples, most_compute)
    n_grid = len(cells)
    ends = predict(setting, cells, keys, told=lambda done: told(done / parts))
    for number in range(refinements):
        seen = set(cells)
        finer: list[Cell] = []
        for epsilon in axes.epsilons:
            ranked = ranking(setting, cells, ends.metrics, epsilon)
            for cell in _around(cells[ranked[0]], axes, 2.0 ** -(number + 1)) if ranked else []:
                if cell not in seen and _is_allowed(cell, axes, most_compute, setting.n_samples):
                    seen.add(cell)
                    finer.append(cell)
        if finer:
            ends = joined([ends, predict(setting, finer, keys)])
            cells += finer
        told((number + 2) / parts)
    finalists = {
        epsilon: ranking(setting, cells, ends.metrics, epsilon)[:_FINALISTS]
        for epsilon in axes.epsilons
    }
    finalists = {epsilon: few for epsilon, few in finalists.items() if few}
    if not finalists:
        raise ValueError(
            f"learning_rates must have a cell that converges, but none of {len(cells)} has a "
            f"finite {setting.objective} and a loss at the end no higher than at the start; try "
            "smaller ones, smaller clip_norms or larger epsilons"
        )
    numbers = np.concatenate(list(finalists.values()))
    last = predict(setting, [cells[number] for number in numbers], last_keys)
    told(1.0)
    return Found(cells, ends, n_grid, finalists, last)


def ranking(
    setting: Setting, cells: Sequence[Cell], metrics: CellMetrics, epsilon: float
) -> list[int]:
    """Cells of a budget that converge, from the best on; of equal ones the cheapest comes first."""
    numbers = np.array([i for i, cell in enumerate(cells) if cell.epsilon == epsilon], int)
    if not numbers.size:
        return []
    of_budget = take(metrics, numbers)
    allowed = candidates(of_budget, setting.objective, _SLACK, "cells")
    sign = -1 if HIGHER_IS_BETTER[setting.objective] else 1
    badness = sign * value_of(of_budget, setting.objective)
    computes = np.array([cells[number].compute(setting.n_samples) for number in numbers])
    order = np.lexsort((computes, badness))
    return [int(numbers[place]) for place in order if allowed[place]]


def take(parts: Tree, places: Sequence[int] | np.ndarray) -> Tree:
    """The cells at these places, of arrays ``(C,)`` in a pytree."""
    taken: Tree = jax.tree.map(lambda values: values[np.asarray(places, int)], parts)
    return taken


def _around(cell: Cell, axes: Axes, part: float) -> list[Cell]:
    """Cells around one, at a part of the distance to its neighbours on the axes, by logarithms."""
    rate, norm, steps, share = (
        _ratio(values, here) ** part for values, here in zip(axes[:4], cell[:4], strict=True)
    )
    near = [
        cell._replace(learning_rate=cell.learning_rate * faster, clip_norm=cell.clip_norm * larger)
        for faster in (1 / rate, 1.0, rate)
        for larger in (1 / norm, 1.0, norm)
    ]
    for sign in (-1, 1):
        number = max(1, round(cell.steps * steps**sign))
        near.append(cell._replace(steps=number))
        # The same horizon: learning rate times steps.
        near.append(
            cell._replace(steps=number, learning_rate=cell.learning_rate * cell.steps / number)
        )
        near.append(cell._replace(sample_rate=cell.sample_rate * share**sign))
    return near


def _ratio(values: Sequence[float], here: float) -> float:
    """Ratio of the neighbours of a value on an axis, at least one of which it has."""
    if len(values) == 1:
        return _ALONE
    logs = np.log(values)
    place = int(np.clip(np.searchsorted(logs, np.log(here)), 1, len(logs) - 1))
    return float(np.exp(logs[place] - logs[place - 1]))


def _is_allowed(cell: Cell, axes: Axes, most_compute: float, n_samples: int) -> bool:
    """Whether a cell is within the axes of steps and sampling rates, and may be afforded."""
    return (
        axes.steps[0] <= cell.steps <= axes.steps[-1]
        and axes.sample_rates[0] <= cell.sample_rate <= axes.sample_rates[-1]
        and cell.compute(n_samples) <= most_compute
    )
