"""How far the predicted cells of a sweep are from the observed ones, and what a choice costs."""

from typing import NamedTuple

import numpy as np
import scipy.stats

from ntkdp._backend import validate
from ntkdp._backend.types import ScalarLike
from ntkdp.comparison._cells import HIGHER_IS_BETTER, CellMetrics

#: Values are equal if they differ by less than this share of their size: training in float32 leaves
#: no more digits.
ROUNDING = 1e-5


class MetricAgreement(NamedTuple):
    """Agreement in one metric: see :func:`agreement`."""

    spearman: float
    median_difference: float
    largest_difference: float


class Agreement(NamedTuple):
    """Agreement of predicted and observed cells: see :func:`agreement`.

    ``metrics`` holds the agreement in each metric by name, ``divergence_called_right`` the share of
    the cells on whose divergence the two agree, ``n_cells`` the number of cells, and
    ``n_converged`` the number of those that converge on both sides.
    """

    metrics: dict[str, MetricAgreement]
    divergence_called_right: float
    n_cells: int
    n_converged: int


def agreement(predicted: CellMetrics, observed: CellMetrics) -> Agreement:
    r"""How well the predicted cells of a sweep agree with the observed ones, metric by metric.

    Parameters
    ----------
    predicted, observed : CellMetrics
        The same C cells in the same order.

    Returns
    -------
    Agreement
        For every metric that both have, three numbers. Spearman's rank correlation over all cells,
        from best to worst: ranks are averaged over ties (equal to 1 part in :math:`10^5`), and the
        diverged cells come last, tied with each other; NaN if either side ranks no cell before
        another. Median and largest absolute difference, in the metric's units, over the cells that
        converge on both sides; NaN if there is none.

    Raises
    ------
    TypeError, ValueError
        If an argument is not CellMetrics or has no cells, or the numbers of cells differ.

    Notes
    -----
    A cell whose value is not finite counts as diverged in that metric. Rank correlation:
    ``scipy.stats.spearmanr``.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> def cells(losses, diverged):
    ...     loss = np.array(losses)
    ...     return ntkdp.advisor.CellMetrics(loss, *[None] * 7, diverged=np.array(diverged))
    >>> agreed = ntkdp.comparison.agreement(
    ...     cells([1.0, 2.0, 3.0, 9.0], [False, False, False, True]),
    ...     cells([1.5, 1.0, 4.0, 7.0], [False, False, False, True]))
    >>> loss = agreed.metrics["loss"]
    >>> round(loss.spearman, 3), loss.median_difference, loss.largest_difference
    (0.8, 1.0, 1.0)
    >>> agreed.divergence_called_right, agreed.n_cells, agreed.n_converged
    (1.0, 4, 3)
    """
    size = check_cells(predicted=predicted)
    if check_cells(observed=observed) != size:
        raise ValueError(
            f"observed must have the cells of predicted, {size}, got {len(observed.diverged)}"
        )
    converged = ~(predicted.diverged | observed.diverged)
    shared = [name for name in known(predicted) if name in known(observed)]
    return Agreement(
        metrics={name: _metric_agreement(name, predicted, observed) for name in shared},
        divergence_called_right=float(np.mean(predicted.diverged == observed.diverged)),
        n_cells=size,
        n_converged=int(np.sum(converged)),
    )


def regret(
    observed: CellMetrics, chosen: int, objective: str = "test_accuracy", *, slack: float = 0.02
) -> float:
    """What a chosen cell loses against the observed best, in the units of the objective.

    Parameters
    ----------
    observed : CellMetrics
        C cells.
    chosen : int
        Index of the cell, as in ``Advice.index``.
    objective : str
        The name of a metric that ``observed`` has.
    slack : float
        The best calibration error is taken among the cells whose accuracy is within this of the
        best, as in :func:`ntkdp.advisor.advise`.

    Returns
    -------
    float
        At least 0; infinite if the chosen cell's value is not finite; NaN if no cell converged, so
        that there is no best. It is 0 if the chosen cell is better than the best but not allowed to
        be it, because it diverged or is calibrated and inaccurate: read the regret of a calibration
        error together with the regret of the accuracy.

    Raises
    ------
    TypeError, ValueError
        If the objective is unknown or was not measured, or the index is out of range.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> loss = np.array([0.5, 0.25, 4.0])
    >>> observed = ntkdp.advisor.CellMetrics(loss, *[None] * 7, diverged=loss > 1)
    >>> [ntkdp.advisor.regret(observed, cell, "loss") for cell in range(3)]
    [0.25, 0.0, 3.75]
    """
    size = check_cells(observed=observed)
    if isinstance(chosen, bool) or not isinstance(chosen, int | np.integer):
        raise TypeError(f"chosen must be the index of a cell, got {chosen!r}")
    if not 0 <= chosen < size:
        raise ValueError(f"chosen must be in 0 .. {size - 1}, got {chosen}")
    allowed = candidates(observed, objective, slack, "observed")
    badness = _badness(objective, value_of(observed, objective))
    if not np.any(allowed):
        return float("nan")
    if not np.isfinite(badness[chosen]):
        return float("inf")
    return float(max(0.0, badness[chosen] - np.min(badness[allowed])))


def candidates(metrics: CellMetrics, objective: str, slack: ScalarLike, name: str) -> np.ndarray:
    """Which cells ``(C,)`` may be chosen: they converge, and are accurate if calibration counts."""
    validate.choice(HIGHER_IS_BETTER, objective=objective)
    slack = float(validate.scalar(slack=validate.non_negative(slack=slack)))
    if objective not in known(metrics):
        raise ValueError(
            f"objective must be a metric that {name} has, {', '.join(known(metrics))}; "
            f"got {objective!r}"
        )
    allowed: np.ndarray = ~metrics.diverged & np.isfinite(value_of(metrics, objective))
    if np.any(allowed) and objective.endswith(("ece", "mce")):
        accuracy = value_of(metrics, prefix_of(objective) + "accuracy")
        allowed &= accuracy >= np.max(accuracy[allowed]) - slack
    return allowed


def known(metrics: CellMetrics) -> list[str]:
    """Names of the metrics that were measured."""
    return [name for name in HIGHER_IS_BETTER if getattr(metrics, name) is not None]


def value_of(metrics: CellMetrics, name: str) -> np.ndarray:
    """The values of a metric in float64, ``(C,)``."""
    return np.asarray(getattr(metrics, name), np.float64)


def prefix_of(name: str) -> str:
    """``"test_"`` for a metric of the test set, else nothing."""
    return "test_" if name.startswith("test_") else ""


def levels(values: np.ndarray) -> np.ndarray:
    """Ranks of finite values, from 0; values that differ by rounding alone share one."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    rises = np.diff(ascending) > ROUNDING * np.abs(ascending[1:])
    ranks = np.empty(values.shape, int)
    ranks[order] = np.concatenate([[0], np.cumsum(rises)])[: len(values)]
    return ranks


def check_cells(**named: object) -> int:
    """The number of cells of CellMetrics, checked to be at least one."""
    ((name, metrics),) = named.items()
    if not isinstance(metrics, CellMetrics):
        raise TypeError(f"{name} must be CellMetrics, got {type(metrics).__name__}")
    sizes = {part: np.shape(array) for part, array in metrics.items() if array is not None}
    shape = np.shape(metrics.diverged)
    if len(shape) != 1 or shape == (0,) or set(sizes.values()) != {shape}:
        raise ValueError(f"{name} must have arrays of one shape (C,), C >= 1, got {sizes}")
    return int(shape[0])


def _badness(name: str, values: np.ndarray) -> np.ndarray:
    """Values with the sign that makes the smallest the best."""
    return -values if HIGHER_IS_BETTER[name] else values


def _metric_agreement(name: str, predicted: CellMetrics, observed: CellMetrics) -> MetricAgreement:
    sides = (predicted, observed)
    values = [value_of(side, name) for side in sides]
    kept = [~side.diverged & np.isfinite(value) for side, value in zip(sides, values, strict=True)]
    ranks = [_ranks(_badness(name, value), keep) for value, keep in zip(values, kept, strict=True)]
    both = kept[0] & kept[1]
    difference = np.abs(values[0][both] - values[1][both])
    spearman = np.nan
    if all(np.ptp(side) > 0 for side in ranks):
        spearman = float(scipy.stats.spearmanr(*ranks).statistic)
    if not difference.size:
        return MetricAgreement(spearman, np.nan, np.nan)
    return MetricAgreement(spearman, float(np.median(difference)), float(np.max(difference)))


def _ranks(badness: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Ranks from the best cell on, not yet averaged over ties; diverged cells come last."""
    ranks = np.full(badness.shape, badness.size)
    ranks[kept] = levels(badness[kept])
    return ranks


def pareto_front(metrics: CellMetrics, *, test: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Cells that no other beats in both accuracy and expected calibration error.

    Parameters
    ----------
    metrics : CellMetrics
        Metrics of a classification.
    test : bool
        Whether to use the metrics of the test set.

    Returns
    -------
    indices, values : array
        ``(F,)`` and ``(F, 2)``: cells that do not diverge, with accuracy and ECE, both increasing
        along the front. Among cells with the same two values, the first is taken. F may be 0.

    Raises
    ------
    TypeError, ValueError
        If the metrics have no accuracy or no ECE.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> accuracy, ece = np.array([0.5, 0.9, 0.8, 0.95]), np.array([0.01, 0.05, 0.07, 0.2])
    >>> metrics = ntkdp.advisor.CellMetrics(accuracy, accuracy, ece, *[None] * 5,
    ...                                     diverged=np.zeros(4, bool))
    >>> ntkdp.advisor.pareto_front(metrics, test=False)[0].tolist()
    [0, 1, 3]
    """
    check_cells(metrics=metrics)
    names = [f"{'test_' if test else ''}{name}" for name in ("accuracy", "ece")]
    missing = [name for name in names if name not in known(metrics)]
    if missing:
        raise ValueError(f"metrics must have {' and '.join(names)}, got no {missing[0]}")
    accuracy, ece = (value_of(metrics, name) for name in names)
    usable = np.flatnonzero(~metrics.diverged & np.isfinite(accuracy) & np.isfinite(ece))
    # From the most accurate down, a cell is on the front if it is better calibrated than all above.
    ordered = usable[np.lexsort((usable, ece[usable], -accuracy[usable]))]
    least = np.minimum.accumulate(np.concatenate([[np.inf], ece[ordered]]))
    indices = ordered[ece[ordered] < least[:-1]][::-1]
    return indices, np.stack([accuracy[indices], ece[indices]], axis=1)
