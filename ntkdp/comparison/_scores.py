"""Runs against an ensemble of predicted runs: bands, coverage, CRPS and standardised errors."""

from typing import NamedTuple

import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike
from ntkdp.trajectory import band

#: Probabilities that agree to this are the same, as in ``scipy.stats.binomtest``.
_SAME_PROBABILITY = 1 + 1e-7


class Coverage(NamedTuple):
    """How often runs are inside a band, and how often they would be if it were right.

    ``level`` is the expected share, exact for the number of predicted runs; ``share`` ``(T,)`` is
    the share of the ``n_runs`` observed runs; ``p_value`` ``(T,)`` is two-sided, NaN where the
    predicted runs coincide.

    Made by :func:`ntkdp.comparison.band_coverage`.
    """

    level: float
    share: np.ndarray
    n_runs: int
    p_value: np.ndarray


def band_coverage(predicted: ArrayLike, observed: ArrayLike, level: float = 0.9) -> Coverage:
    r"""Share of observed runs inside the band of a predicted ensemble, and whether it is right.

    The band at each time is between the j-th smallest and the j-th largest of the S predicted
    values. If observed and predicted runs have one law, a continuous one, all orders of them are
    equally likely, so that a run is inside with probability

    .. math:: \frac{S + 1 - 2j}{S + 1}, \qquad
        \text{the number inside, of } n \text{ runs, is}\quad \mathrm{BetaBinomial}(n, S+1-2j, 2j),

    whatever that law is. It is wider than a binomial because the band itself is random.

    Parameters
    ----------
    predicted : array
        ``(S, T)``, S at least 2.
    observed : array
        ``(n, T)``, or ``(T,)`` for one run.
    level : float
        In (0, 1); j is chosen so that the exact share is near it. Fewer than 2 / (1 - level) - 1
        predicted runs cannot reach it.

    Returns
    -------
    Coverage
        The exact level, shares and p-values. Each p-value is about one time alone, since the times
        of a run depend on each other. A value on the edge is inside; one that is not finite is
        outside.

    Raises
    ------
    ValueError
        If shapes do not fit, or the level is outside (0, 1).

    Notes
    -----
    The law is the classical one of tolerance intervals (Wilks 1941); the p-value adds the
    probabilities of all counts that are no likelier than the one observed, as
    ``scipy.stats.binomtest`` does.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdp.comparison import band_coverage
    >>> predicted = np.arange(1.0, 20.0)[:, None]  # 1 to 19
    >>> covered = band_coverage(predicted, np.array([[0.0], [5.0], [10.0], [30.0]]))
    >>> covered.level, covered.share.tolist(), covered.n_runs
    (0.9, [0.5], 4)
    """
    from scipy.stats import betabinom

    predicted, observed = _matched(predicted, observed)
    n_predicted = _ensemble_size(predicted)
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    j = int(np.clip(round(0.5 * (1 - level) * (n_predicted + 1)), 1, n_predicted // 2))
    kept = n_predicted + 1 - 2 * j
    ordered = np.sort(predicted, axis=0)  # NaN last: above all others
    low, high = ordered[j - 1], np.nan_to_num(ordered[-j], nan=np.inf, posinf=np.inf)
    inside = np.isfinite(observed) & (low <= observed) & (observed <= high)
    n_runs = len(observed)
    counts = np.sum(inside, axis=0)
    likelihood = betabinom.pmf(np.arange(n_runs + 1), n_runs, kept, 2 * j)
    no_likelier = likelihood <= _SAME_PROBABILITY * likelihood[counts][:, None]
    p_value = np.minimum(no_likelier @ likelihood, 1.0)
    return Coverage(
        level=kept / (n_predicted + 1),
        share=counts / n_runs,
        n_runs=n_runs,
        p_value=np.where(ordered[0] < high, p_value, np.nan),
    )


def crps(predicted: ArrayLike, observed: ArrayLike) -> np.ndarray:
    r"""Continuous ranked probability score of a predicted ensemble, averaged over observed runs.

    For S predicted values x and an observed one y, the unbiased ("fair") form

    .. math:: \frac{1}{S} \sum_i |x_i - y| - \frac{1}{2 S (S - 1)} \sum_{i, j} |x_i - x_j|,

    whose mean over ensembles is :math:`\int (F(x) - 1\{x \ge y\})^2 dx`, where F is the law that
    they are drawn from, whatever S is. For a single prediction it is the absolute error.

    Parameters
    ----------
    predicted : array
        ``(S, T)``, or ``(T,)`` for a prediction without spread.
    observed : array
        ``(n, T)``, or ``(T,)`` for one run.

    Returns
    -------
    array
        ``(T,)``, in the unit of the values; smaller is better. Infinite where a value is not
        finite. The score of a good ensemble of few runs can be below zero by chance.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Gneiting and Raftery, JASA 2007 (the score); Ferro, QJRMS 2014 (the fair form).

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdp.comparison import crps
    >>> crps(np.array([[0.0], [1.0]]), np.array([0.5])).tolist()
    [0.0]
    >>> crps(np.array([0.0]), np.array([[0.5], [1.5]])).tolist()
    [1.0]
    """
    predicted, observed = _matched(predicted, observed)
    n_predicted = len(predicted)
    finite = np.all(np.isfinite(predicted), axis=0) & np.all(np.isfinite(observed), axis=0)
    ordered = np.sort(np.where(finite, predicted, 0.0), axis=0)
    observed = np.where(finite, observed, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # runs about to diverge
        # One run at a time: all pairs of runs at once could fill the memory.
        distance = np.mean([np.mean(np.abs(ordered - run), axis=0) for run in observed], axis=0)
        if n_predicted > 1:
            # The number of pairs between which each gap lies.
            pairs = np.arange(1, n_predicted) * np.arange(n_predicted - 1, 0, -1)
            gaps = np.diff(ordered, axis=0)
            distance = distance - pairs @ gaps / (n_predicted * (n_predicted - 1))
    return np.where(finite & np.isfinite(distance), distance, np.inf)


def standardised_error(predicted: ArrayLike, observed: ArrayLike) -> np.ndarray:
    r"""Difference of the means, divided by its standard error.

    .. math:: z = \frac{\bar x_{pred} - \bar x_{obs}}{\sqrt{se_{pred}^2 + se_{obs}^2}},

    close to N(0, 1) at each time if the two means are the same and the runs are many.

    Parameters
    ----------
    predicted : array
        ``(S, T)``, S at least 2, or ``(T,)`` for a prediction of the mean, taken as exact.
    observed : array
        ``(n, T)``, n at least 2.

    Returns
    -------
    array
        ``(T,)``; zero where the means agree, infinite where they differ without any spread or where
        a value is not finite.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a side has a single run, which has no standard error.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdp.comparison import standardised_error
    >>> standardised_error(np.array([[0.0], [8.0]]), np.array([[-3.0], [3.0]])).tolist()
    [0.8]
    """
    is_given = np.ndim(predicted) == 1
    predicted, observed = _matched(predicted, observed)
    for name, values in (("predicted", predicted), ("observed", observed)):
        if len(values) < 2 and not (is_given and name == "predicted"):
            raise ValueError(f"{name} must hold at least 2 runs, got shape {values.shape}")
    prediction, run = band(predicted), band(observed)
    own_error = np.zeros_like(run.mean) if is_given else prediction.standard_error
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = prediction.mean - run.mean
        ratio = difference / np.hypot(own_error, run.standard_error)
    return np.where(difference == 0, 0.0, np.where(np.isnan(ratio), np.inf, ratio))


def _matched(predicted: ArrayLike, observed: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as ``(runs, T)``, in float64."""
    pair = [
        np.asarray(values, np.float64)
        for values in (validate.real(predicted=predicted), validate.real(observed=observed))
    ]
    sides = [values[None] if values.ndim == 1 else values for values in pair]
    for name, given, values in zip(("predicted", "observed"), pair, sides, strict=True):
        if values.ndim != 2 or len(values) == 0:
            raise ValueError(f"{name} must have shape (S, T) or (T,), S >= 1, got {given.shape}")
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(
            "predicted and observed must have the same times, "
            f"got shapes {pair[0].shape} and {pair[1].shape}"
        )
    return sides[0], sides[1]


def _ensemble_size(predicted: np.ndarray) -> int:
    if len(predicted) < 2:
        raise ValueError(f"predicted must hold at least 2 runs, got shape {predicted.shape}")
    return len(predicted)
