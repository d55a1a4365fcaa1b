"""The numbers behind :mod:`ntkdp.privacy`: bounds by each method, and the search for the noise.

Every figure is the least of several upper bounds, each of which grows with steps, q, 1/sigma and
1/delta. The accountants and SciPy are imported when they are used, because every run imports this
module.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from ntkdp.privacy._loss_sums import LOG_LEFT_OUT, log_deltas
from ntkdp.privacy._mechanism import Mechanism
from ntkdp.privacy._sampled_gaussian import ORDERS, Array, log_moment

#: Above this there is no privacy left to count, and the distribution would not fit in memory.
_LARGEST_PLD_EPSILON = 1e6
#: Spacing of the grid of losses over the size of a step's losses.
_FINENESS = 1 / 32
#: Least spacing over the epsilon of a small delta; with a finer grid memory would not suffice.
_FINEST = 2.0**-17
#: That small delta.
_SMALL_DELTA = 1e-10
#: Slopes of log delta over the inverse of the size of all losses.
_SLOPES = np.geomspace(1e-5, 1e4, 109)
#: How many slopes are tried before the one that fits best.
_SLOPES_TRIED = 10
#: How far a bound of log delta may lie above it and still leave digits to transforms.
_LOG_SPARE = 4.0
#: How far a guess of log delta may lie above it.
_LOG_TOO_HIGH = 15.0
#: A delta below which no better bound is sought.
_NOTHING = 1e-30
#: Part of delta that quadrature may round.
_ROUNDING = 1e-9
#: How far the noise multiplier of a search may lie above the smallest one, relative to it.
_SEARCH_TOLERANCE = 1e-4
#: The least noise multiplier of a search.
SMALLEST_SIGMA = 1e-4
#: The largest noise multiplier of a search.
LARGEST_SIGMA = 1e9
#: Less noise counts as none, which is safe: squares would overflow.
_LEAST_COUNTED = 1e-100
#: More noise counts as this much, which is safe: squares would overflow.
_MOST_COUNTED = 1e12


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float, accountant: str) -> float:
    """Bound of epsilon for mechanisms one after another, in any order."""
    mechanisms = _merged(mechanisms)
    if any(mechanism.sigma == 0 for mechanism in mechanisms):
        return math.inf
    if accountant == "rdp":
        return _renyi_epsilon(mechanisms, delta)
    whole = gaussian_epsilon(_mu_of_full_batches(mechanisms), delta)
    if all(m.q == 1 for m in mechanisms) or _is_hardly_drawn(mechanisms, delta):
        return whole if mechanisms[0].q == 1 else 0.0
    bound = min(_renyi_epsilon(mechanisms, delta), whole)
    if bound == 0 or bound > _LARGEST_PLD_EPSILON:
        return bound
    return min(bound, _grid_epsilon(_steps_of(mechanisms), delta))


def delta_of(mechanism: Mechanism, epsilon: float, accountant: str) -> float:
    """Bound of delta at a given epsilon."""
    (mechanism,) = mechanisms = _merged([mechanism])
    sigma, q, steps = mechanism.sigma, mechanism.q, mechanism.steps
    if sigma == 0:
        return 1.0
    if accountant == "rdp":
        return _renyi_delta(mechanisms, epsilon)
    whole = math.exp(gaussian_log_delta(math.sqrt(steps) / sigma, epsilon))
    if q == 1:
        return whole
    bound = min(_renyi_delta(mechanisms, epsilon), whole, -math.expm1(steps * math.log1p(-q)))
    if _renyi_epsilon(mechanisms, _SMALL_DELTA) > _LARGEST_PLD_EPSILON:
        return bound
    return min(bound, _grid_delta(mechanisms, epsilon))


def noise_for(
    budget: float, of_one: Sequence[Mechanism], delta: float, accountant: str
) -> float | None:
    """Noise multiplier that keeps a budget, or None if none does; of one, these are all steps."""

    def least(method: str, start: float) -> float | None:
        def figure(sigma: float) -> float:
            scaled = [m._replace(sigma=sigma * m.sigma) for m in of_one]
            return epsilon_of(scaled, delta, method)

        return least_sigma(figure, budget, start)

    # RDP is fast and needs more noise than PLD, so it gives a starting point.
    sigma = least("rdp", 1.0)
    return sigma if accountant == "rdp" else least("pld", sigma or 1.0)


def _merged(mechanisms: Iterable[Mechanism]) -> list[Mechanism]:
    """The mechanisms in sorted order, with each noise and sampling rate once."""
    steps_of: dict[tuple[float, float, bool], int] = {}
    for sigma, q, steps, replaced in mechanisms:
        kind = (_counted(sigma), q, replaced)
        steps_of[kind] = steps_of.get(kind, 0) + steps
    return [
        Mechanism(sigma, q, steps, replaced)
        for (sigma, q, replaced), steps in sorted(steps_of.items())
    ]


def _counted(sigma: float) -> float:
    """The noise that a bound counts, which is never more than there is."""
    return 0.0 if sigma < _LEAST_COUNTED else min(sigma, _MOST_COUNTED)


def _steps_of(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """The mechanisms with all steps on full batches as a single step of less noise."""
    return [
        m._replace(sigma=m.sigma / math.sqrt(m.steps), steps=1) if m.q == 1 else m
        for m in mechanisms
    ]


def _mu_of_full_batches(mechanisms: Sequence[Mechanism]) -> float:
    """Mu of Gaussian privacy if every sample were in every batch: sampling only lowers it."""
    return math.hypot(*(math.sqrt(m.steps) / m.sigma for m in mechanisms))


def _is_hardly_drawn(mechanisms: Sequence[Mechanism], delta: float) -> bool:
    """Whether a sample is ever drawn with a probability of at most delta."""
    if any(m.q == 1 for m in mechanisms):
        return False
    return -math.expm1(sum(m.steps * math.log1p(-m.q) for m in mechanisms)) <= delta


def _renyi_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    return float(compute_epsilon(ORDERS, _divergences(mechanisms), delta)[0])


def _renyi_delta(mechanisms: Sequence[Mechanism], epsilon: float) -> float:
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    # compute_delta takes the log of 1 - e^-r, which fails for an r below the rounding of 1.
    divergences = np.maximum(_divergences(mechanisms), np.finfo(np.float64).eps)
    return float(compute_delta(ORDERS, divergences, epsilon)[0])


def _divergences(mechanisms: Sequence[Mechanism]) -> Array:
    moments = np.zeros(len(ORDERS))
    for mechanism in mechanisms:
        moments = moments + mechanism.steps * mechanism.renyi_moments()
    divergences: Array = moments / (ORDERS - 1)
    return divergences


def _grid_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The epsilon at which the curve on the grid falls to delta."""
    moments = _Moments(mechanisms)
    interval = moments.interval()
    log_delta = math.log(delta) + math.log1p(-_ROUNDING)
    slope, _ = moments.down_to(log_delta).near_delta(log_delta)
    curve = log_deltas(mechanisms, interval, slope, log_delta)
    above = np.flatnonzero(curve > log_delta)
    if len(above) == 0:
        return 0.0
    last = int(above[-1])
    if last == len(curve) - 1:
        return math.inf
    # Delta is linear in e^epsilon between two points.
    near, far = np.exp(curve[last : last + 2] - log_delta)
    return interval * last + math.log1p((near - 1) / (near - far) * math.expm1(interval))


def _grid_delta(mechanisms: Sequence[Mechanism], epsilon: float) -> float:
    moments = _Moments(mechanisms)
    interval = moments.interval()
    _, guess = moments.near_epsilon(epsilon)
    while True:
        slope, _ = moments.down_to(guess).near_epsilon(epsilon)
        delta = _delta_at(epsilon, log_deltas(mechanisms, interval, slope, guess), interval)
        # The curve includes a share of the guess, for what is left out of it.
        if delta > math.exp(guess - _LOG_TOO_HIGH) or delta < _NOTHING:
            return delta
        guess = math.log(delta)


def _delta_at(epsilon: float, curve: Array, interval: float) -> float:
    last = int(epsilon / interval)
    if last >= len(curve) - 1:
        return math.exp(curve[-1])
    near, far = np.exp(curve[last : last + 2]).tolist()
    share = math.expm1(epsilon - interval * last) / math.expm1(interval)
    return min(1.0, float(near + (far - near) * share) * (1 + _ROUNDING))


class _Moments:
    """Log moments of the sum of losses, without losses that are too unlikely to count.

    They decide the grid, and the place where the curve is to be precise.
    """

    def __init__(
        self, mechanisms: Sequence[Mechanism], log_delta: float = math.log(_SMALL_DELTA)
    ) -> None:
        self.mechanisms = mechanisms
        self.log_delta = log_delta
        size = math.sqrt(sum(m.steps * m.scale**2 for m in mechanisms))
        self.slopes = _SLOPES / size
        self.growth = self._growth()

    def _growth(self) -> Array:
        from scipy.special import logsumexp

        left_out = self.log_delta + LOG_LEFT_OUT
        left_out -= math.log(sum(m.steps for m in self.mechanisms))
        total = np.zeros(len(self.slopes))
        for mechanism in self.mechanisms:
            losses, present, _ = mechanism.atoms(left_out)
            logs = log_moment(losses, 1 + self.slopes[:, None]) - losses
            total += mechanism.steps * np.logaddexp(0.0, logsumexp(logs, axis=1, b=present))
        return total

    def down_to(self, log_delta: float) -> "_Moments":
        """Moments with all losses that count in a curve at this delta.

        Rarer losses may outweigh the rest once they are multiplied by the exponential of a slope.
        """
        if log_delta >= self.log_delta:
            return self
        return _Moments(self.mechanisms, log_delta)

    def interval(self) -> float:
        """Spacing of the grid: a power of two that grows with steps, q and 1/sigma.

        Grids are nested, so that a mechanism that is less private and has a coarser grid has a
        larger bound.
        """
        smallest = min(mechanism.scale for mechanism in self.mechanisms)
        epsilon = float(np.min((self.growth - math.log(_SMALL_DELTA)) / self.slopes))
        return 2.0 ** math.ceil(math.log2(max(_FINENESS * smallest, _FINEST * epsilon)))

    def near_delta(self, log_delta: float) -> tuple[float, float]:
        """A slope, and the log of delta, for a curve that is precise at this delta."""
        epsilons, falls = self._saddle_points()
        last = max(int(np.argmax(falls <= log_delta)) - 1, 0)
        epsilon = epsilons[last] + (falls[last] - log_delta) / self.slopes[last]
        return self._slope(last, epsilon, log_delta), log_delta

    def near_epsilon(self, epsilon: float) -> tuple[float, float]:
        """A slope, and the log of delta, for a curve that is precise at this epsilon."""
        epsilons, falls = self._saddle_points()
        last = max(int(np.argmax(epsilons >= epsilon)) - 1, 0)
        log_delta = min(falls[last] - self.slopes[last] * (epsilon - epsilons[last]), 0.0)
        return self._slope(last, epsilon, log_delta), log_delta

    def _saddle_points(self) -> tuple[Array, Array]:
        """Estimates of the epsilon and the log of delta at which log delta has each slope."""
        epsilons = np.gradient(self.growth, self.slopes)
        spread = np.sqrt(np.maximum(np.gradient(epsilons, self.slopes), 0)) * self.slopes
        bounds = self.growth - self.slopes * epsilons
        return epsilons, bounds - np.log1p(spread * (1 + self.slopes))

    def _slope(self, last: int, epsilon: float, log_delta: float) -> float:
        """The least slope near the last one that is large enough: its grid is the shortest.

        Past the last there may only be outputs that are too unlikely to count.
        """
        near = slice(max(last - _SLOPES_TRIED, 0), last + 1)
        bounds = self.growth[near] - self.slopes[near] * epsilon
        enough = bounds <= max(log_delta + _LOG_SPARE, float(bounds.min()))
        return float(self.slopes[near][int(np.argmax(enough))])


def gaussian_log_delta(mu: float, epsilon: float) -> float:
    """Log of the hockey-stick divergence between N(0, 1) and N(mu, 1)."""
    from scipy.special import log_ndtr

    hit = float(log_ndtr(mu / 2 - epsilon / mu))
    miss = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return hit + math.log(-math.expm1(miss - hit)) if miss < hit else -math.inf


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP, rounded up."""
    from scipy.optimize import brentq

    if math.isinf(mu):
        return math.inf
    log_delta = math.log(delta)

    def excess(epsilon: float) -> float:
        # Bounded for the root search, which cannot use infinity.
        return max(gaussian_log_delta(mu, epsilon) - log_delta, -100.0)

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    # From delta <= Phi(mu/2 - epsilon/mu) and the tail bound exp(-x^2/2).
    largest = mu * (mu / 2 + math.sqrt(-2 * log_delta))
    if largest > _LARGEST_PLD_EPSILON:
        return largest  # The difference of two tails is lost to rounding.
    return float(brentq(excess, 0.0, largest, xtol=1e-12 * largest)) + 2e-12 * largest


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Mu of the Gaussian mechanism that is (epsilon, delta)-private, rounded down."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    log_delta = math.log(delta)

    def excess(mu: float) -> float:
        # Bounded for the root search, which cannot use infinity.
        return max(gaussian_log_delta(mu, epsilon) - log_delta, -100.0)

    # From delta <= Phi(mu/2 - epsilon/mu).
    z = float(ndtri(delta))
    root = math.hypot(z, math.sqrt(2) * math.sqrt(epsilon))
    low = z + root if z > 0 else 2 * (epsilon / (root - z))
    high = 2 * low
    while excess(high) <= 0:
        low, high = high, 2 * high
    return float(brentq(excess, low, high, xtol=1e-12 * low)) * (1 - 2e-12)


def least_sigma(figure: Callable[[float], float], budget: float, start: float) -> float | None:
    """Least noise multiplier, to the tolerance of the search, whose epsilon keeps the budget."""
    from scipy.optimize import brentq

    @cache
    def excess(log_sigma: float) -> float:
        # Bounded, since epsilon may be 0 or infinite where the search begins.
        return float(np.clip(np.log(max(figure(math.exp(log_sigma)), 1e-300) / budget), -10, 10))

    smallest, largest = math.log(SMALLEST_SIGMA), math.log(LARGEST_SIGMA)
    low = high = math.log(start)
    step = 0.1
    if excess(high) > 0:
        while excess(high) > 0:
            if high >= largest:
                return None
            low, high, step = high, min(high + step, largest), 2 * step
    else:
        while excess(low) <= 0:
            if low <= smallest:
                return SMALLEST_SIGMA
            low, high, step = max(low - step, smallest), low, 2 * step
    found = float(brentq(excess, low, high, xtol=_SEARCH_TOLERANCE / 2))
    nudge = _SEARCH_TOLERANCE / 2
    while excess(found) > 0:
        found, nudge = found + nudge, 2 * nudge
    return math.exp(found)
