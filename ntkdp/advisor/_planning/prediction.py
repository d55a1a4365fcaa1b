r"""Predicted ends of cells, with fewer and longer steps where that changes nothing.

k steps at the learning rate :math:`\eta` are one step at :math:`k \eta`, whose noise and sampling
have the variance of their means,

.. math:: \frac{\sigma^2 S^2}{k (q n)^2}, \qquad \frac{1 - q}{k q},

as long as the outputs move little meanwhile. That is tried, not assumed: a cell is predicted on a
grid of steps and on one twice as fine, along the same Brownian path, until the two agree or the
steps are the run's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array, Float, Key
from ntkdp.advisor._planning.cells import Accounts, Cell
from ntkdp.advisor._planning.ends import Problem, Steps, ends, is_plain
from ntkdp.comparison import CellMetrics, measure, value_of
from ntkdp.losses import Loss, Reduction

#: Merged steps of the first grid, and runs of up to so many steps, which are predicted as they are.
_FIRST, _SHORT = 32, 96
#: Relative change of a loss, and change of an accuracy, that halved steps may bring.
_SAME_LOSS, _SAME_ACCURACY = 0.02, 0.01
#: Numbers of all runs that are followed at once, and the most cells.
_AT_ONCE, _MOST_CELLS = 8_000_000, 64
#: Cells that programs are compiled for.
_SIZES = (8, 24, _MOST_CELLS)

#: Told the fraction of the work that is done.
Told = Callable[[float], None]


@dataclass(frozen=True)
class Setting:
    """What cells are predicted with.

    ``n_samples`` are those that train, of which the problem may have a part. ``most_steps`` is the
    finest grid of merged steps.
    """

    problem: Problem
    test_targets: Array | None
    reduction: Reduction
    initial_loss: float
    n_samples: int
    accounts: Accounts
    objective: str
    most_steps: int

    @property
    def rows(self) -> int:
        """Training samples that the problem has."""
        return len(self.problem.targets)


class Ends(NamedTuple):
    """Ends of C cells, arrays ``(C,)``, means over seeds.

    ``spread`` is the deviation of the objective over seeds, and ``sampling_error`` the standard
    error that it has because the samples it is measured on are few. ``steps_made`` is how many
    steps predicted a cell, and ``change`` by how much the loss, relative to it, changed when they
    were last halved: zero if they are the run's own.
    """

    metrics: CellMetrics
    spread: np.ndarray
    sampling_error: np.ndarray
    steps_made: np.ndarray
    change: np.ndarray


def predict(
    setting: Setting,
    cells: Sequence[Cell],
    keys: Key[Array, " S"],
    *,
    n_samples: int | None = None,
    rows: int | None = None,
    told: Told = lambda done: None,
) -> Ends:
    """Ends of cells, with noise as if there were ``n_samples``, on the first ``rows`` of them."""
    n_samples = setting.n_samples if n_samples is None else n_samples
    rows = setting.rows if rows is None else rows
    sigmas = setting.accounts.of_cells(cells)
    steps = np.array([cell.steps for cell in cells])
    found: list[Ends | None] = [None] * len(cells)

    def run(numbers: np.ndarray, counts: np.ndarray, level: int | None) -> list[Ends]:
        chosen = [cells[number] for number in numbers]
        made = steps_of(setting, chosen, sigmas[numbers], counts, n_samples, rows)
        return _run(setting, made, keys, level)

    exact = np.flatnonzero(
        (steps <= _SHORT) | (not is_plain(setting.problem.optimizer, setting.problem.noise))
    )
    left = np.setdiff1d(np.arange(len(cells)), exact)
    before: dict[int, Ends] = {}
    level = 0
    while left.size or exact.size:
        for number, end in zip(exact, run(exact, steps[exact], None), strict=True):
            found[number] = end
        count = _FIRST << level
        now = dict(zip(left.tolist(), run(left, np.full(left.size, count), level), strict=True))
        # What is left of a change halves with every level: so many steps would make it small.
        needed = np.full(len(cells), 2.0 * count)
        for number in now.keys() & before.keys():
            end, excess = _compared(before[number], now[number])
            if excess <= 1 or count >= setting.most_steps:
                found[number] = end
            elif steps[number] <= setting.most_steps:
                needed[number] = max(2.0 * count, count * excess)
        before, level = now, level + 1
        left = np.array([i for i in left if found[i] is None], int)
        exact, left = left[steps[left] <= needed[left]], left[steps[left] > needed[left]]
        told(1 - (left.size + exact.size) / len(cells))
    return joined([end for end in found if end is not None])


def joined(ends: Sequence[Ends]) -> Ends:
    """Several ends as one."""
    whole: Ends = jax.tree.map(lambda *parts: np.concatenate(parts), *ends)
    return whole


def steps_of(
    setting: Setting,
    cells: Sequence[Cell],
    sigmas: Float[np.ndarray, " C"],
    counts: np.ndarray,
    n_samples: int,
    rows: int,
) -> Steps:
    """Steps of cells, each of as many of the run's own as make ``counts`` in all."""
    rates, norms, own_steps, shares = (
        np.array([cell[column] for cell in cells], np.float64) for column in range(4)
    )
    merged = own_steps / np.maximum(counts, 1)
    divisor = n_samples if setting.reduction == "mean" else 1
    scale = 1.0 if setting.reduction == "mean" else float(n_samples)
    dtype = setting.problem.start.dtype

    def numbers(values: np.ndarray) -> Array:
        return jnp.asarray(values, dtype)

    return Steps(
        rate=numbers(rates * merged),
        clip_norm=numbers(norms),
        deviation=numbers(sigmas * norms / (shares * divisor * np.sqrt(merged))),
        # The variance of a mean over the samples that there are, with the rows in their place.
        variance=numbers((1 - shares) / shares / merged * rows / n_samples),
        rows=jnp.full(len(cells), rows),
        scale=jnp.full(len(cells), scale, dtype),
        total=jnp.asarray(counts),
    )


def _compared(before: Ends, now: Ends) -> tuple[Ends, float]:
    """The later end with the change that halved steps brought, and its size over the tolerance."""

    def changed(name: str) -> float:
        values = (value_of(end.metrics, name)[0] for end in (before, now))
        earlier, later = (float(value) for value in values)
        size = abs(later - earlier)
        return size / abs(later) if name.endswith("loss") else size

    known = [
        name
        for name in ("loss", "test_loss", "accuracy", "test_accuracy")
        if getattr(now.metrics, name) is not None
    ]
    changes = {name: changed(name) for name in known}
    excess = max(
        change / (_SAME_LOSS if name.endswith("loss") else _SAME_ACCURACY)
        for name, change in changes.items()
    )
    if before.metrics.diverged[0] != now.metrics.diverged[0] or not np.isfinite(excess):
        excess = np.inf
    relative = max(change for name, change in changes.items() if name.endswith("loss"))
    return now._replace(change=np.array([relative])), excess


def _run(setting: Setting, steps: Steps, keys: Key[Array, " S"], level: int | None) -> list[Ends]:
    """Ends of cells, each by itself, at a level of merged steps or with steps of their own."""
    n_cells, n_seeds = len(steps.total), len(keys)
    counts = np.asarray(steps.total)
    size = setting.problem.start.size * n_seeds
    at_once = int(np.clip(_AT_ONCE // size, 1, _MOST_CELLS))
    found: list[Ends | None] = [None] * n_cells
    order = np.argsort(counts, kind="stable")
    for start in range(0, n_cells, at_once):
        part = order[start : start + at_once]
        # Parts are filled up to few sizes, so that few programs make their steps.
        filled = np.append(part, np.full(_size_of(len(part), at_once) - len(part), part[0]))
        chosen: Steps = jax.tree.map(lambda values, at=filled: values[at], steps)
        outputs = ends(
            setting.problem,
            chosen,
            keys,
            jnp.asarray(0 if level is None else level),
            level is not None,
        )
        for number, end in zip(part, _measured(setting, outputs, counts[filled]), strict=False):
            found[number] = end
    return [end for end in found if end is not None]


def _size_of(n_cells: int, at_once: int) -> int:
    """Cells of a program, so that few programs serve all numbers of cells."""
    return min(at_once, next(size for size in _SIZES if size >= min(n_cells, at_once)))


def _measured(setting: Setting, outputs: Float[Array, "C S N K"], counts: np.ndarray) -> list[Ends]:
    """Metrics of cells from the outputs of their runs."""
    problem, n = setting.problem, setting.rows
    n_cells, n_seeds = outputs.shape[:2]
    each = outputs.reshape(n_cells * n_seeds, 1, *outputs.shape[2:])
    test = None
    if setting.test_targets is not None:
        test = (each[:, :, n:], setting.test_targets)
    runs = measure(
        problem.loss,
        setting.reduction,
        setting.initial_loss,
        (each[:, :, :n], problem.targets),
        test,
    )
    by_cell = jax.tree.map(lambda values: values.reshape(n_cells, n_seeds), runs)
    means: CellMetrics = jax.tree.map(lambda values: np.mean(values, axis=1), by_cell)
    means = means._replace(diverged=np.any(by_cell.diverged, axis=1))
    objective = value_of(by_cell, setting.objective)
    spread = np.std(objective, axis=1, ddof=1) if n_seeds > 1 else np.zeros(n_cells)
    error = np.asarray(_sampling_error(setting, outputs), np.float64)
    whole = Ends(means, spread, error, counts, np.zeros(n_cells))
    return [
        jax.tree.map(lambda values, at=slice(i, i + 1): values[at], whole) for i in range(n_cells)
    ]


def _sampling_error(setting: Setting, outputs: Float[Array, "C S N K"]) -> Array:
    """Standard error of a mean over samples ``(C,)``; zero for what is no such mean."""
    name = setting.objective
    if name.endswith(("ece", "mce")):
        return jnp.zeros(len(outputs))
    n = setting.rows
    on_test = name.startswith("test_")
    targets = setting.test_targets if on_test else setting.problem.targets
    assert targets is not None
    chosen = outputs[:, :, n:] if on_test else outputs[:, :, :n]
    return _standard_error(setting.problem.loss, chosen, targets, name.endswith("accuracy"))


@eqx.filter_jit
def _standard_error(
    loss: Loss, outputs: Float[Array, "C S m K"], targets: Array, of_accuracy: bool
) -> Float[Array, " C"]:
    def of_run(f: Array) -> Array:
        values = loss.correct(f, targets) if of_accuracy else loss(f, targets)
        assert values is not None
        return values

    by_sample = jnp.mean(jax.vmap(jax.vmap(of_run))(outputs), axis=1)
    return jnp.std(by_sample, axis=1) / jnp.sqrt(len(targets))
