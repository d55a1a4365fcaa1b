r"""What one step of many is worth in Gaussian differential privacy, and the noise that is worth it.

All steps together are worth :math:`\sqrt K` times as much. With full batches :math:`\mu_1 = s`,
exactly, where s is how far a sample moves the sum, in units of the noise. With sampling the central
limit theorem has :math:`\mu_1 = q \chi`: if a sample is there or not,
:math:`\chi^2 = e^{s^2} - 1`, and if it is replaced
:math:`\chi^2 = 2 (e^{s^2} \Phi(3s/2) + 3 \Phi(-s/2) - 2)`, which lies between that and twice as
much (Bu, Dong, Long, Su 1911.11607).
"""

import math

import numpy as np

from ntkdp.privacy._mechanism import Mechanism

#: Beyond this a normal density is nothing.
_FAR = 40.0
#: Beyond this an exponential is infinite.
_LARGEST = 700.0


def mu_of_step(mechanism: Mechanism) -> float:
    """Mu of a step; infinite without noise."""
    sigma, q = mechanism.sigma, mechanism.q
    if sigma == 0:
        return math.inf
    if q == 1:
        return 1 / sigma
    return q * math.sqrt(_chi_squared(1 / sigma, mechanism.replaced))


def sigma_of_step(mu: float, mechanism: Mechanism) -> float:
    """The sigma of a mechanism at which a step is worth mu."""
    from scipy.optimize import brentq

    if mechanism.q == 1:
        return 1 / mu
    log_square = 2 * math.log(mu / mechanism.q)
    most, least = (
        math.sqrt(float(np.logaddexp(0.0, log_square - log))) for log in (0.0, math.log(2))
    )
    if not mechanism.replaced:
        return 1 / most
    if log_square > _LARGEST - 1:
        return 1 / least

    def excess(shift: float) -> float:
        return math.log(_chi_squared(shift, replaced=True)) - log_square

    # Rounding may put the root on either end.
    return 1 / float(brentq(excess, 0.999 * least, 1.001 * most, xtol=1e-14 * least))


def _chi_squared(shift: float, replaced: bool) -> float:
    from scipy.integrate import quad
    from scipy.special import ndtr

    square = shift * shift
    growth = math.expm1(square) if square < _LARGEST else math.inf
    if not replaced:
        return growth

    # The tails of both data sets, less what cancels in their first order.
    def tails(x: float) -> float:
        return 3 * math.exp(-x * x / 2) * math.expm1(-4 * x * x) / math.sqrt(2 * math.pi)

    rest, _ = quad(tails, 0.0, min(shift / 2, _FAR), epsabs=0.0)
    return 2 * (growth * float(ndtr(1.5 * shift)) + float(rest))
