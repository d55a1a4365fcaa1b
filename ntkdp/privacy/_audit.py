"""Lower bounds of epsilon from attacks: what training was seen to give away."""

import math
from typing import Any, NamedTuple

import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike
from ntkdp.privacy import _bounds
from ntkdp.privacy._arguments import probability

#: Thresholds that are tried, at quantiles of the scores.
_THRESHOLDS = 1000
#: Epsilons beyond which no number of guesses could prove anything.
_LARGEST_EPSILON = 200.0
#: How far a bound from one run may lie below the best, relative to it.
_TOLERANCE = 1e-6


class Audit(NamedTuple):
    """Lower bounds that hold with the confidence that was asked for; made by :func:`audit`.

    ``epsilon`` assumes nothing. ``mu`` and ``gaussian_epsilon`` assume a Gaussian mechanism, which
    full batches are. ``threshold`` is the score above which an attacker guesses "present", and
    ``false_positive`` and ``false_negative`` are upper limits of the rates of errors there.
    """

    epsilon: float
    mu: float
    gaussian_epsilon: float
    threshold: float
    false_positive: float
    false_negative: float


def audit(
    present: ArrayLike, absent: ArrayLike, delta: float, *, confidence: float = 0.95
) -> Audit:
    r"""Lower bounds of epsilon by an attack on many runs with a sample and many without it.

    An attacker who takes scores above a threshold for runs with the sample errs at rates FPR and
    FNR, and no :math:`(\varepsilon, \delta)`-private training lets both be small:

    .. math::
        \varepsilon \ge \ln \frac{1 - \delta - \mathrm{FNR}}{\mathrm{FPR}}, \qquad
        \mu \ge -\Phi^{-1}(\mathrm{FPR}) - \Phi^{-1}(\mathrm{FNR}),

    the first also with the rates changed over, the second for Gaussian mechanisms. The threshold is
    the best on the first half of the scores. On the second half, the rates are replaced by Clopper
    and Pearson's upper limits.

    Parameters
    ----------
    present, absent : array
        ``(S,)`` and ``(T,)``: a score of each run with and without the sample, at least 4 each and
        all independent. Large ones speak for the sample; the best is a log likelihood ratio.
    delta : float
        In (0, 1).
    confidence : float
        In (0, 1), how sure each bound is, both rates together.

    Returns
    -------
    Audit
        With bounds of at least 0. One above the promised epsilon proves an implementation wrong;
        one below it proves nothing. A bound cannot exceed about the log of the number of runs.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, or there are too few scores.

    Notes
    -----
    Jagielski, Ullman, Oprea 2006.07709; the bound of mu: Nasr et al. 2302.07956; limits: Clopper
    and Pearson (1934). With sampling the mechanism is not Gaussian, and ``epsilon`` alone is a
    bound.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> scores = np.random.default_rng(0).standard_normal((2, 4000))
    >>> found = ntkdp.privacy.audit(scores[0] + 1, scores[1], 1e-3)
    >>> promised = ntkdp.privacy.epsilon(1.0, 1.0, 1, 1e-3)
    >>> found.gaussian_epsilon < promised, found.mu > 0.7
    (True, True)
    """
    delta = probability(delta=delta)
    confidence = probability(confidence=confidence)
    one, other = _scores(present=present), _scores(absent=absent)
    half = [(scores[: len(scores) // 2], scores[len(scores) // 2 :]) for scores in (one, other)]
    (first, second), (first_absent, second_absent) = half
    tried = np.quantile(
        np.concatenate([first, first_absent]),
        np.linspace(0.1 / _THRESHOLDS, 1 - 0.1 / _THRESHOLDS, _THRESHOLDS),
        method="inverted_cdf",  # one of the scores, which may be infinite
    )
    rates = _error_limits(first, first_absent, tried, confidence)
    for_epsilon, for_mu = (
        float(tried[int(np.argmax(figure))]) for figure in (_epsilons(*rates, delta), _mus(*rates))
    )
    fp, fn = _error_limits(second, second_absent, for_epsilon, confidence)
    epsilon = max(0.0, float(_epsilons(fp, fn, delta)))
    mu = max(0.0, float(_mus(*_error_limits(second, second_absent, for_mu, confidence))))
    gaussian = _bounds.gaussian_epsilon(mu, delta)
    return Audit(epsilon, mu, gaussian, for_epsilon, float(fp), float(fn))


class Advantage(NamedTuple):
    """How well scores tell members from others; made by :func:`advantage`.

    ``advantage`` is TPR - FPR of the best threshold and ``standard_error`` how uncertain it is;
    ``area`` is the chance that a member's score is above that of another, one half for a guess.
    """

    advantage: float
    standard_error: float
    area: float


def advantage(present: ArrayLike, absent: ArrayLike) -> Advantage:
    r"""Membership advantage of an attack by scores: TPR - FPR of the best threshold.

    No attack on :math:`(\varepsilon, \delta)`-private training has more than
    :math:`(e^\varepsilon - 1 + 2 \delta) / (e^\varepsilon + 1)`, nor more than
    ``privacy.delta(..., epsilon=0)``.

    Parameters
    ----------
    present, absent : array
        ``(S,)`` and ``(T,)``: a score of each run with and without the sample, at least 4 each and
        all independent. Large ones speak for the sample, such as minus its loss.

    Returns
    -------
    Advantage
        The threshold is found on one half of the scores and used on the other, both ways in turn,
        so that chance makes nobody a winner: without a difference the advantage is about 0, and may
        be negative.

    Raises
    ------
    ValueError, TypeError
        If there are too few scores or one is NaN.

    Notes
    -----
    Yeom et al. 1709.01604. The bounds follow from the definition of differential privacy, read in
    both directions.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> scores = np.random.default_rng(0).standard_normal((2, 4000))
    >>> found = ntkdp.privacy.advantage(scores[0] + 1, scores[1])
    >>> bound = ntkdp.privacy.delta(1.0, 1.0, 1, epsilon=0.0)
    >>> abs(found.advantage - bound) < 4 * found.standard_error
    True
    """
    from scipy.stats import mannwhitneyu

    one, other = _scores(present=present), _scores(absent=absent)
    parts = [(one[::2], other[::2]), (one[1::2], other[1::2])]
    rates = []
    for chosen, used in (parts, parts[::-1]):
        tried = np.unique(np.concatenate(chosen))
        gains = _share_above(chosen[0], tried) - _share_above(chosen[1], tried)
        threshold = tried[int(np.argmax(gains))]
        rates.append([_share_above(scores, threshold) for scores in used])
    true, false = np.mean(rates, axis=0)
    variance = true * (1 - true) / len(one) + false * (1 - false) / len(other)
    area = mannwhitneyu(one, other).statistic / (len(one) * len(other))
    return Advantage(float(true - false), math.sqrt(variance), float(area))


def _share_above(scores: np.ndarray, thresholds: Any) -> Any:
    return 1 - np.searchsorted(np.sort(scores), thresholds, side="right") / len(scores)


def audit_one_run(
    included: ArrayLike,
    scores: ArrayLike,
    delta: float,
    *,
    guesses: int,
    confidence: float = 0.95,
) -> float:
    r"""A lower bound of epsilon by an attack on a single run with many canaries.

    Each of m canaries is put among the samples by a fair coin of its own. An attacker guesses
    "included" for the largest scores and "left out" for the smallest, r in all, and abstains
    otherwise. Of an :math:`(\varepsilon, \delta)`-private run, the number of correct guesses is
    hardly ever above that of r coins of chance :math:`e^\varepsilon / (1 + e^\varepsilon)`.

    Parameters
    ----------
    included : array
        ``(m,)``, true for canaries that were in the run.
    scores : array
        ``(m,)``, large if the attacker takes a canary for included.
    delta : float
        In (0, 1), for adding or removing one sample.
    guesses : int
        r, at least 1 and at most m; half of them, rounded up, say "included". It must be settled
        before the coins are looked at.
    confidence : float
        In (0, 1).

    Returns
    -------
    float
        The bound, at least 0. It is far below :func:`audit`'s for the same mechanism, and costs one
        run.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, or shapes differ.

    Notes
    -----
    Steinke, Nasr, Jagielski 2305.08846.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> included = np.arange(1000) % 2 == 0
    >>> round(ntkdp.privacy.audit_one_run(included, included * 1.0, 1e-5, guesses=100), 2)
    3.47
    """
    delta = probability(delta=delta)
    confidence = probability(confidence=confidence)
    r = validate.count(guesses=guesses)
    coins = np.asarray(included)
    values = np.asarray(validate.finite(scores=np.asarray(scores, np.float64)))
    if coins.dtype != bool or coins.ndim != 1 or not coins.size:
        raise ValueError(
            f"included must be an array (m,) of booleans, got {coins.dtype} of shape {coins.shape}"
        )
    if values.shape != coins.shape:
        raise ValueError(f"scores must have shape {coins.shape} as included, got {values.shape}")
    if r > coins.size:
        raise ValueError(f"guesses must be at most the {coins.size} canaries, got {r}")
    order = np.argsort(values, kind="stable")
    largest, smallest = order[coins.size - (r + 1) // 2 :], order[: r // 2]
    correct = int(np.sum(coins[largest]) + np.sum(~coins[smallest]))
    return _epsilon_of_guesses(coins.size, r, correct, delta, 1 - confidence)


def _epsilon_of_guesses(m: int, r: int, correct: int, delta: float, chance: float) -> float:
    """The largest epsilon at which so many correct guesses are less likely than a chance."""
    if _chance_of_guesses(m, r, correct, 0.0, delta) >= chance:
        return 0.0
    low, high = 0.0, 1.0
    while _chance_of_guesses(m, r, correct, high, delta) < chance:
        low, high = high, 2 * high
        if high > _LARGEST_EPSILON:
            return low
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        below = _chance_of_guesses(m, r, correct, middle, delta) < chance
        low, high = (middle, high) if below else (low, middle)
    return low


def _chance_of_guesses(m: int, r: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound of the chance of so many correct guesses or more."""
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-epsilon))
    bound = float(binom.sf(correct - 1, r, right))
    i = np.arange(1, correct + 1)
    # Chances of between v - i and v - 1 coins, over i.
    between = binom.sf(correct - i - 1, r, right) - bound
    largest = float(np.max(between / i, initial=0.0))
    return min(1.0, bound + 2 * m * delta * largest)


def _scores(**named: ArrayLike) -> np.ndarray:
    ((name, given),) = named.items()
    scores = np.asarray(validate.real(**{name: np.asarray(given)}), np.float64)
    if scores.ndim != 1 or scores.size < 4:
        raise ValueError(f"{name} must be an array of 4 scores at least, got shape {scores.shape}")
    if np.any(np.isnan(scores)):
        raise ValueError(f"{name} must not be NaN; score a run that failed by infinity")
    return scores


def _upper_limit(errors: Any, trials: int, confidence: float) -> Any:
    """Clopper and Pearson's upper limit of a chance; two of them share the confidence."""
    from scipy.stats import beta

    level = 1 - (1 - confidence) / 2
    limit = beta.ppf(level, errors + 1, np.maximum(trials - errors, 1))
    return np.where(errors == trials, 1.0, limit)


def _error_limits(
    present: np.ndarray, absent: np.ndarray, thresholds: Any, confidence: float
) -> tuple[Any, Any]:
    """Upper limits of the rates of false positives and false negatives by threshold."""
    positives = len(absent) - np.searchsorted(np.sort(absent), thresholds, side="right")
    negatives = np.searchsorted(np.sort(present), thresholds, side="right")
    return (
        _upper_limit(positives, len(absent), confidence),
        _upper_limit(negatives, len(present), confidence),
    )


def _epsilons(fp: Any, fn: Any, delta: float) -> Any:
    with np.errstate(divide="ignore"):
        forward = np.log(np.maximum(1 - fn - delta, 0.0) / fp)
        backward = np.log(np.maximum(1 - fp - delta, 0.0) / fn)
    return np.maximum(forward, backward)


def _mus(fp: Any, fn: Any) -> Any:
    from scipy.special import ndtri

    # A rate of one bounds nothing, whatever the other is.
    return np.where(np.maximum(fp, fn) < 1, -ndtri(fp) - ndtri(np.minimum(fn, 1.0)), -np.inf)
