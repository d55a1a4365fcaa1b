r"""One step of DP-SGD, as accounting sees it: a Gaussian that takes part with probability q.

Outputs are in units of the noise. The data set without the sample gives :math:`Q = N(0, 1)`, the
one with it :math:`P = (1-q) Q + q N(1/\sigma, 1)`. The loss at z is :math:`L = \log P/Q`, and
:math:`u = P/Q - 1 = q (e^{z/\sigma - 1/2\sigma^2} - 1)`. Integrals use Gauss's rule on cells that
are short compared with all curvature: that of the normal density, of the turn of L, and of the
caller's function. SciPy is imported where it is used, because every run imports this module.
"""

import math
from functools import cache
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray

#: Distance of the cells' edges near a normal density's centre.
_EDGE = 1 / 8
#: Distance of the edges for moments, for which nothing far from the centre counts.
_WIDE_EDGE = 1 / 2
#: How far from the centre the cells for moments go.
_FAR = 12.0
#: Edges of the turn of L, in units of z/sigma: beyond them L is straight to double precision.
_TURN = np.arange(-80, 81) / 2
#: Points of Gauss's rule in a cell.
_POINTS = 5
#: Points of Gauss's rule in a short cell.
_FEW_POINTS = 3
#: Length below which a cell is short.
_SHORT = 0.02
#: Losses below this, over the order, have their moment as a series.
_SERIES = 0.02
#: Terms of that series.
_TERMS = 8

#: Renyi orders that are not whole.
_FRACTIONS = np.array([n / 10 for n in range(11, 110) if n % 10])
#: Renyi orders that are whole.
_WHOLE = np.array([*range(2, 64), 80, 96, 128, 192, 256, 384, 512, 768, 1024])
#: All Renyi orders.
ORDERS = np.sort(np.concatenate([_FRACTIONS, _WHOLE]))


def loss(z: Array, sigma: float, q: float) -> Array:
    """Log of P/Q, to relative precision."""
    y = z / sigma - 0.5 / sigma**2
    if q == 1:
        return y
    near = np.log1p(q * np.expm1(np.minimum(y, 30.0)))
    far = math.log(q) + y + np.log1p((1 - q) / q * np.exp(-np.maximum(y, 30.0)))
    return np.where(y < 30, near, far)


def scale(sigma: float, q: float) -> float:
    """A size of one step's losses that falls with sigma and grows with q.

    The root of twice a bound of the mean loss: by the chi-squared divergence, or by convexity.
    """
    with np.errstate(over="ignore"):
        root = math.sqrt(float(np.expm1(np.float64(sigma) ** -2)))
    return min(q * root, math.sqrt(q) / sigma)


def atoms(
    sigma: float, q: float, log_left_out: float, interval: float = math.inf
) -> tuple[Array, Array, Array]:
    """Losses, and their masses under P and under Q, as atoms of Gauss's rule.

    Outputs beyond the quantiles of a log probability are left out. No cell has a multiple of the
    interval inside, nor the loss 0, so that functions that bend there are integrated to rounding.
    """
    from scipy.special import ndtri_exp

    reach = -float(ndtri_exp(log_left_out))
    low, high = -reach, 1 / sigma + reach
    around = _around(reach, _EDGE)
    ends = np.array([low, 0.5 / sigma, high])
    edges = [around, 1 / sigma + around, _turn(sigma, q), ends]
    if math.isfinite(interval):
        edges.append(_places(sigma, q, interval, low, high))
    ordered = np.unique(np.clip(np.concatenate(edges), low, high))
    short = np.diff(ordered) < _SHORT * min(1.0, sigma)
    parts = [
        _gauss(ordered[:-1][chosen], ordered[1:][chosen], points)
        for chosen, points in ((short, _FEW_POINTS), (~short, _POINTS))
    ]
    z, widths = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    losses = loss(z, sigma, q)
    log_density = -z * z / 2 - 0.5 * math.log(2 * math.pi)
    return losses, widths * np.exp(log_density + losses), widths * np.exp(log_density)


def renyi_moments(sigma: float, q: float) -> Array:
    r""":math:`\log E_Q (P/Q)^\alpha` of all orders: Renyi divergences times :math:`\alpha - 1`.

    They are sums and integrals of positive terms, so they keep their digits where the divergence is
    tiny, and they fall as sigma grows or q falls. The other direction has smaller divergences
    (Mironov, Talwar, Zhang 1908.10530).
    """
    logs: Array
    if q == 1:
        logs = ORDERS * (ORDERS - 1) / (2 * sigma**2)
    else:
        whole = [_log_moment_of_whole(sigma, q, order) for order in _WHOLE.tolist()]
        moments = np.concatenate([_log_moments_of_fractions(sigma, q), whole])
        logs = np.logaddexp(0.0, moments[np.argsort(np.concatenate([_FRACTIONS, _WHOLE]))])
    return logs


def log_moment(losses: Array, order: Array) -> Array:
    r"""Log of :math:`(1 + u)^a - 1 - a u`, for orders a above 1, at loss log(1 + u).

    Its mean under Q is :math:`E_Q (P/Q)^a - 1`, since u has none; no digits cancel.
    """
    with np.errstate(all="ignore"):
        capped = np.minimum(losses, 1 / order)
        u = np.expm1(capped)
        series = np.ones_like(order * u)
        for k in range(_TERMS, 2, -1):
            series = 1 + (order - k + 1) / k * u * series
        small = np.log(order * (order - 1) / 2 * u * u * series)
        middle = np.log(np.expm1(order * capped) - order * u)
        rest = order * np.exp((1 - order) * losses) - (order - 1) * np.exp(-order * losses)
        large = order * losses + np.log1p(-rest)
        moderate = np.where(np.abs(u) * order < _SERIES, small, middle)
        logs: Array = np.where(order * losses > 1, large, moderate)
        return logs


def _log_moment_of_whole(sigma: float, q: float, order: int) -> float:
    """Log of a whole moment minus one, by the binomial theorem without the terms that make one."""
    from scipy.special import logsumexp

    k = np.arange(2, order + 1)
    growth = (k * k - k) / (2 * sigma**2)
    # Log of e^growth - 1.
    gains = growth + np.log(-np.expm1(-growth))
    shares = _log_binomials(order) + k * math.log(q) + (order - k) * math.log1p(-q)
    return float(logsumexp(shares + gains))


@cache
def _log_binomials(order: int) -> Array:
    from scipy.special import gammaln

    k = np.arange(2, order + 1)
    logs: Array = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    return logs


def _log_moments_of_fractions(sigma: float, q: float) -> Array:
    """Logs of the other moments, by integrals: most weight lies about 0 or about order/sigma."""
    from scipy.special import logsumexp

    order = _FRACTIONS[:, None]
    around = _around(_FAR, _WIDE_EDGE)
    fixed = np.concatenate([around, _turn(sigma, q)])
    edges = np.hstack([np.broadcast_to(fixed, (len(order), len(fixed))), order / sigma + around])
    edges.sort(axis=1)
    z, widths = _gauss(edges[:, :-1], edges[:, 1:], _POINTS)
    z, widths = z.reshape(len(order), -1), widths.reshape(len(order), -1)
    logs = log_moment(loss(z, sigma, q), order) - z * z / 2
    moments: Array = logsumexp(logs, axis=1, b=widths) - 0.5 * math.log(2 * math.pi)
    return moments


def _around(reach: float, edge: float) -> Array:
    """Edges around the centre of a normal density."""
    steps = math.ceil(reach / edge)
    return edge * np.arange(-steps, steps + 1)


def _turn(sigma: float, q: float) -> Array:
    """Edges around the place where L turns from nearly 0 to a straight line."""
    if q == 1:
        return np.empty(0)
    return sigma * (math.log((1 - q) / q) + _TURN) + 0.5 / sigma


def _places(sigma: float, q: float, interval: float, low: float, high: float) -> Array:
    """Outputs whose loss is a multiple of the interval."""
    first, last = (loss(np.array([low, high]), sigma, q) / interval).tolist()
    losses = interval * np.arange(math.ceil(first), math.floor(last) + 1)
    if q == 1:
        return sigma * losses + 0.5 / sigma
    with np.errstate(all="ignore"):
        y = np.where(
            losses < 1,
            np.log1p(np.expm1(np.minimum(losses, 1.0)) / q),
            losses - math.log(q) + np.log1p(-(1 - q) * np.exp(-losses)),
        )
    places = sigma * y + 0.5 / sigma
    return places[np.isfinite(places)]


def _gauss(low: Array, high: Array, points: int) -> tuple[Array, Array]:
    """Points and weights in cells, flat if the cells are."""
    x, weights = np.polynomial.legendre.leggauss(points)
    half = (high - low)[..., None] / 2
    z = (high + low)[..., None] / 2 + half * x
    return (z.ravel(), (half * weights).ravel()) if low.ndim == 1 else (z, half * weights)
