"""What a plan of a private run says: cells, frontiers, and what it recommends."""

from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from ntkdp.comparison import HIGHER_IS_BETTER, CellMetrics, value_of

#: Objectives in words.
_WORDS = {
    "loss": "training loss",
    "accuracy": "training accuracy",
    "ece": "training ECE",
    "mce": "training MCE",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "test_ece": "test ECE",
    "test_mce": "test MCE",
}


class PlannedCells(NamedTuple):
    r"""Cells that a plan predicted, arrays ``(C,)``: the grid first, then what refined it.

    Each has a ``learning_rate``, a ``clip_norm``, a number of ``steps``, a ``sample_rate`` and an
    ``epsilon``, with the ``noise_multiplier`` that spends it and the ``compute`` in gradients of
    samples, :math:`q n` a step. ``metrics`` are those at the end, means over seeds, and ``spread``
    is the deviation of the objective from run to run, zero where the search made a single one.
    ``weight_noise`` is v(T), relative to the weights' own variance, and ``kernels`` says which
    predicted the cell, "frozen" or "between times". ``steps_made`` is how many steps predicted the
    cell, and ``change`` by how much its loss changed when these were halved; zero if they are the
    run's own.

    Made by :func:`plan_budget`.
    """

    learning_rate: np.ndarray
    clip_norm: np.ndarray
    steps: np.ndarray
    sample_rate: np.ndarray
    epsilon: np.ndarray
    noise_multiplier: np.ndarray
    compute: np.ndarray
    metrics: CellMetrics
    spread: np.ndarray
    weight_noise: np.ndarray
    kernels: np.ndarray
    steps_made: np.ndarray
    change: np.ndarray


@final
@dataclass(frozen=True, eq=False)
class Recommendation:
    r"""The run to make at one budget, with what it is predicted to end with.

    ``index`` is that of the cell among those of the plan. ``value`` is the objective, the mean of
    runs that had no part in the search, and ``uncertainty`` the deviation of one run from what it
    would be on endless test data: the spread of runs and the standard error of the test samples,
    added as squares. It says nothing of the error of the kernel, see :func:`plan_budget`.
    ``predicted`` holds all metrics by name. ``with_twice_the_data`` is the objective at twice the
    samples, and None if it was not asked for. ``kernels`` says which predicted it, "frozen" or
    "between times".

    Made by :func:`plan_budget`.
    """

    objective: str
    epsilon: float
    index: int
    learning_rate: float
    clip_norm: float
    steps: int
    sample_rate: float
    noise_multiplier: float
    compute: float
    value: float
    uncertainty: float
    predicted: dict[str, float | bool | None]
    weight_noise: float
    kernels: str
    with_twice_the_data: float | None = None

    def __str__(self) -> str:
        """The recommendation in one sentence."""
        sentence = (
            f"At epsilon {self.epsilon:g}: q = {self.sample_rate:.3g}, {self.steps} steps, "
            f"learning rate {self.learning_rate:.3g}, R = {self.clip_norm:.3g}: "
            f"{_WORDS[self.objective]} "
            f"{_amount(self.objective, self.value)} +- {_amount(self.objective, self.uncertainty)}"
        )
        if self.with_twice_the_data is not None:
            more = _amount(self.objective, self.with_twice_the_data)
            sentence += f"; twice the data would give about {more}"
        return f"{sentence}."


@final
@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """A plan of a private run: see :func:`plan_budget`.

    ``recommended`` has an entry for each budget at which some cell converges, epsilons increasing.
    ``n_grid`` cells are those of the grid. ``share_left`` is the part of the kernel that the
    ``rank`` features leave to its diagonal, and ``rows`` how many of the ``n_samples`` training
    samples predict. ``seconds`` has the times of the kernel, of the accountant and of the search.
    """

    objective: str
    delta: float
    n_samples: int
    rows: int
    rank: int
    share_left: float
    cells: PlannedCells
    n_grid: int
    initial: dict[str, float | bool | None]
    recommended: tuple[Recommendation, ...]
    seconds: dict[str, float]

    def __str__(self) -> str:
        """The recommendations, a sentence for each budget, the largest first."""
        return "\n".join(str(one) for one in reversed(self.recommended))

    def frontier_of_compute(self, epsilon: float) -> np.ndarray:
        """Indices of the cells of a budget that no cheaper one equals, compute increasing.

        Raises
        ------
        ValueError
            If no cell has this budget.
        """
        budgets = np.unique(self.cells.epsilon)
        if epsilon not in budgets:
            raise ValueError(f"epsilon must be a budget of the plan, {budgets}, got {epsilon!r}")
        sign = -1 if HIGHER_IS_BETTER[self.objective] else 1
        badness = sign * value_of(self.cells.metrics, self.objective)
        usable = (self.cells.epsilon == epsilon) & ~self.cells.metrics.diverged
        numbers = np.flatnonzero(usable & np.isfinite(badness))
        ordered = numbers[np.lexsort((badness[numbers], self.cells.compute[numbers]))]
        least = np.minimum.accumulate(np.concatenate([[np.inf], badness[ordered]]))
        return np.asarray(ordered[badness[ordered] < least[:-1]])


def _amount(objective: str, value: float) -> str:
    return f"{value:.4g}" if objective.endswith("loss") else f"{value:.1%}"
