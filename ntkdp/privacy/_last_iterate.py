"""What the last iterate gives away alone, if nobody sees the steps before it."""

import math
from collections.abc import Callable

import numpy as np

from ntkdp._backend import validate
from ntkdp.privacy import _bounds
from ntkdp.privacy._arguments import checked_mechanism, number, probability
from ntkdp.privacy._report import GaussianDP

#: Log of a chance that counts as none: smaller than any delta.
_NOTHING = -740.0
#: Outputs beyond this have the loss of the least count.
_FARTHEST = -1e8


def last_iterate(
    noise_multiplier: float, steps: int, delta: float, *, contraction: float
) -> GaussianDP:
    r"""Mu of the last weights alone, if steps on full batches bring weights closer together.

    If a step without its noise maps any two weights to some that are at most a times as far apart,
    on both data sets, the last of K iterates is :math:`\mu`-GDP with

    .. math:: \mu = \frac1\sigma \sqrt{\frac{(1 - a^K)(1 + a)}{(1 + a^K)(1 - a)}},

    which tends to :math:`\sqrt{(1 + a)/(1 - a)}/\sigma`, while all iterates together cost
    :math:`\sqrt K / \sigma`. No smaller number holds for every such training: a quadratic loss
    with a sample that is always clipped attains it.

    Parameters
    ----------
    noise_multiplier : float
        :math:`\sigma \ge 0`. Zero gives infinity.
    steps : int
        K, at least 1.
    delta : float
        In (0, 1), for epsilon.
    contraction : float
        a in [0, 1]. Gradient descent with learning rate :math:`\eta` on a loss whose second
        derivatives lie between m and M has :math:`a = \max(|1 - \eta m|, |1 - \eta M|)`, as long as
        nothing that moves is clipped. With a = 1 it is the figure of all iterates.

    Returns
    -------
    GaussianDP
        ``mu`` and ``epsilon``: a guarantee for the last iterate, if the contraction is one.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Notes
    -----
    Bok, Su, Altschuler 2403.00278, for noisy gradient descent on strongly convex losses (claim
    C45). Only full batches: with sampling the two data sets' steps are no single contraction.

    .. warning::
       Clipping can undo a contraction. A sample whose gradient is clipped all the time adds a
       constant and does no harm, but one that is clipped at some weights and not at others can. For
       networks no contraction is known, and the figure of all iterates stands.

    Examples
    --------
    >>> import ntkdp
    >>> print(ntkdp.privacy.last_iterate(10.0, 10_000, 1e-5, contraction=0.99))
    mu = 1.411, epsilon = 6.553 (exact for full batches)
    >>> print(ntkdp.privacy.gaussian_dp(10.0, 1.0, 10_000, 1e-5))
    mu = 10, epsilon = 91.82 (exact for full batches)
    """
    mechanism = checked_mechanism(noise_multiplier, 1.0, steps)
    delta = probability(delta=delta)
    a = number(contraction=validate.share(contraction=contraction))
    if mechanism.sigma == 0:
        return GaussianDP(math.inf, math.inf, True)
    log = math.log(a) if a > 0 else -math.inf
    # (1 - a^K)/(1 + a^K) over (1 - a)/(1 + a), to relative precision near a = 1.
    ratio = float(mechanism.steps)
    if log < 0:
        ratio = math.tanh(-mechanism.steps * log / 2) / math.tanh(-log / 2)
    mu = math.sqrt(ratio) / mechanism.sigma
    return GaussianDP(mu, _bounds.gaussian_epsilon(mu, delta), True)


def last_iterate_estimate(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> float:
    r"""Epsilon of the last weights alone, as if losses were linear: an ESTIMATE, NO GUARANTEE.

    If each sample's gradient were the same at all weights, the last of K iterates would tell the
    number of batches that the sample was in, under the noise of all steps:

    .. math:: \mathrm{Bin}(K, q) + N(0, \sigma^2 K) \quad\text{against}\quad N(0, \sigma^2 K).

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, delta
        As for :func:`epsilon`.

    Returns
    -------
    float
        The larger epsilon of both directions. Real losses are not linear and may give away more
        than this or less: it says what attacks on the last iterate tend to find, and may not be
        reported as a privacy guarantee.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Notes
    -----
    The heuristic of Steinke et al. 2410.06186, who also have examples that give away more. With
    full batches it is the figure of all iterates, :math:`\mu = \sqrt K / \sigma`.

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.last_iterate_estimate(0.6, 0.01, 1000, 1e-6), 3)
    2.705
    >>> round(ntkdp.privacy.epsilon(0.6, 0.01, 1000, 1e-6), 2)
    8.71
    """
    mechanism = checked_mechanism(noise_multiplier, sample_rate, steps)
    delta = probability(delta=delta)
    sigma, q, steps = mechanism.sigma, mechanism.q, mechanism.steps
    if sigma == 0:
        return math.inf
    if q == 1:
        return _bounds.gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    mixture = _Mixture(q, steps, sigma * math.sqrt(steps))
    return max(_least_epsilon(curve, delta) for curve in (mixture.log_removed, mixture.log_added))


class _Mixture:
    """Bin(K, q)/s + N(0, 1) against N(0, 1), in logarithms, so that nothing underflows."""

    def __init__(self, q: float, steps: int, scale: float) -> None:
        from scipy.stats import binom

        k = np.arange(steps + 1)
        logs = binom.logpmf(k, steps, q)
        kept = logs > _NOTHING
        self.shifts, self.logs = k[kept] / scale, logs[kept]

    def loss(self, z: float) -> float:
        """Log of the ratio of densities, which increases with z."""
        from scipy.special import logsumexp

        return float(logsumexp(self.logs + self.shifts * (z - self.shifts / 2)))

    def place(self, epsilon: float) -> float:
        """Where the loss is epsilon; infinite if it is nowhere."""
        from scipy.optimize import brentq

        low, high = -1.0, 1.0
        while self.loss(high) < epsilon:
            high *= 2
        while self.loss(low) > epsilon:
            low *= 2
            if low < _FARTHEST:
                return -math.inf
        return float(brentq(lambda z: self.loss(z) - epsilon, low, high, xtol=1e-12, rtol=1e-14))

    def log_removed(self, epsilon: float) -> float:
        """Log of delta with the mixture in front: outputs beyond the place of epsilon."""
        from scipy.special import log_ndtr, logsumexp

        z = self.place(epsilon)
        hit = float(logsumexp(self.logs + log_ndtr(self.shifts - z)))
        return _log_difference(hit, epsilon + float(log_ndtr(-z)))

    def log_added(self, epsilon: float) -> float:
        """Log of delta with the other in front: outputs below the place of minus epsilon."""
        from scipy.special import log_ndtr, logsumexp

        z = self.place(-epsilon)
        if z == -math.inf:
            return -math.inf
        miss = float(logsumexp(self.logs + log_ndtr(z - self.shifts)))
        return _log_difference(float(log_ndtr(z)), epsilon + miss)


def _log_difference(larger: float, smaller: float) -> float:
    """Log of the difference of two exponentials."""
    if larger <= smaller:
        return -math.inf
    return larger + math.log(-math.expm1(smaller - larger))


def _least_epsilon(log_curve: Callable[[float], float], delta: float) -> float:
    """Where a decreasing curve of log delta falls to delta."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        # Bounded for the root search, which cannot use infinity.
        return max(log_curve(epsilon) - math.log(delta), -100.0)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-10))
