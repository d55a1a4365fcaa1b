"""One cell of a grid, chosen by its predicted end."""

from dataclasses import dataclass
from typing import final

import numpy as np

from ntkdp.advisor._grid import Grid
from ntkdp.comparison import (
    HIGHER_IS_BETTER,
    Number,
    candidates,
    check_cells,
    known,
    levels,
    pareto_front,
    prefix_of,
    value_of,
)


@final
@dataclass(frozen=True, eq=False)
class Advice:
    """A cell of a :class:`Grid`: see :func:`advise`.

    ``index`` is the index of the cell and ``predicted`` holds its metrics by name. ``curve`` holds
    the cells of :func:`pareto_front` with their accuracies and calibration errors, or is None.
    """

    learning_rate: float
    clip_norm: float
    index: int
    predicted: dict[str, Number | None]
    curve: tuple[np.ndarray, np.ndarray] | None


def advise(grid: Grid, *, objective: str = "test_accuracy", slack: float = 0.02) -> Advice:
    r"""The cell of a predicted grid to train at.

    It is the cell with the best predicted objective among those that do not diverge. For a
    calibration error, only cells whose predicted accuracy is within ``slack`` of the best are
    considered: a network that has hardly been trained is calibrated, and useless.

    Parameters
    ----------
    grid : Grid
        From :func:`predict`.
    objective : str
        A metric of the grid: ``loss``, ``accuracy``, ``ece``, ``mce`` or one of their ``test_``
        twins; for a regression, one of the two losses.
    slack : float
        A difference of accuracies, as shares of the samples.

    Returns
    -------
    Advice

    Raises
    ------
    TypeError, ValueError
        If the objective is unknown or not in the grid, or if every cell diverges.

    Notes
    -----
    *Derived.* Among cells that are equal to 1 part in :math:`10^5`, the smaller learning rate wins,
    then the smaller clipping norm. Cells with the same product :math:`\eta R` have the same noise,
    and with the rule of Abadi et al. a sample's step,
    :math:`\eta \min(1, R/s) = \min(\eta, \eta R/s)`, is never longer for the smaller
    :math:`\eta`; at the same :math:`\eta` the smaller R has less noise.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> loss = np.array([0.5, 0.25, 0.25, 4.0])
    >>> metrics = ntkdp.advisor.CellMetrics(loss, *[None] * 7, diverged=loss > 1)
    >>> grid = ntkdp.advisor.Grid(np.array([0.1, 1.0]), np.array([0.5, 5.0]), metrics, 1.0, 0.0)
    >>> advice = ntkdp.advisor.advise(grid, objective="loss")
    >>> advice.learning_rate, advice.clip_norm, advice.index, advice.predicted["loss"]
    (0.1, 5.0, 1, 0.25)
    """
    if not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid, as predict gives, got {type(grid).__name__}")
    size = check_cells(grid=grid.metrics)
    rates, norms = grid.cells()
    if rates.size != size:
        raise ValueError(
            f"grid must have one cell for each of {rates.size} pairs of learning rate and clipping "
            f"norm, got {size}"
        )
    allowed = np.flatnonzero(candidates(grid.metrics, objective, slack, "grid"))
    if not allowed.size:
        raise ValueError(
            f"grid must have a cell that converges, but none of {size} has a finite {objective} "
            "and a loss at the end no higher than at the start; try smaller learning rates"
        )
    sign = -1 if HIGHER_IS_BETTER[objective] else 1
    ranks = levels(sign * value_of(grid.metrics, objective)[allowed])
    best = int(allowed[np.lexsort((norms[allowed], rates[allowed], ranks))[0]])
    curve = None
    if prefix_of(objective) + "ece" in known(grid.metrics):
        curve = pareto_front(grid.metrics, test=prefix_of(objective) == "test_")
    return Advice(float(rates[best]), float(norms[best]), best, grid.metrics.cell(best), curve)
