"""The numbers behind :mod:`ntkdp.privacy`: bounds by each method, and the search for the noise.

The accountants and SciPy are imported when they are used: every run imports this module.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np

#: Noise multiplier, sampling rate and number of steps.
Mechanism: TypeAlias = tuple[float, float, int]

#: Below this a discretised delta holds rounding.
_SMALLEST_DELTA = 1e-10
#: Above this the distribution would not fit in memory, and there is no privacy left to count.
_LARGEST_PLD_EPSILON = 1e6
#: The grid is refined until epsilon moves by less than this.
_RELATIVE_CHANGE = 1e-3
_REFINEMENTS = 9
#: Steps that are composed first, and the mass of the tails that is cut off.
_FIRST, _TAIL = 10, 1e-15
#: Part of the mass that rounding may take or give a step, as the powers of Fourier transforms have
#: it, and the part of delta that may be missing of the whole mass before a grid is no bound.
_ROUNDING, _LOST = 4 * float(np.finfo(np.float64).eps), 1e-3
#: The same for a first search, and how often its outcome is corrected.
_ROUGH_CHANGE, _CORRECTIONS = 0.05, 6
#: A Gaussian mechanism of this noise has a Renyi divergence of order a of 1e-14 a.
_ROUNDING_SIGMA = (2e-14) ** -0.5
#: How far above the smallest noise multiplier the one found may lie, relative.
_SEARCH_TOLERANCE = 1e-4
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-4, 1e9


def epsilon_of(
    sigma: float,
    q: float,
    steps: int,
    delta: float,
    accountant: str,
    change: float = _RELATIVE_CHANGE,
) -> float:
    """Bound of epsilon, to a relative change between two grids."""
    return composed_epsilon_of([(sigma, q, steps)], delta, accountant, change)


def composed_epsilon_of(
    mechanisms: Iterable[Mechanism],
    delta: float,
    accountant: str,
    change: float = _RELATIVE_CHANGE,
) -> float:
    """The same of several mechanisms one after another, in any order."""
    mechanisms = _merged(mechanisms)
    if any(sigma == 0 for sigma, _, _ in mechanisms):
        return math.inf
    sampled = [(q, steps) for _, q, steps in mechanisms if q < 1]
    if accountant == "pld" and not sampled:
        mu = math.hypot(*(math.sqrt(steps) / sigma for sigma, _, steps in mechanisms))
        return gaussian_epsilon(mu, delta)
    if accountant == "pld" and len(sampled) == len(mechanisms):
        never = sum(steps * math.log1p(-q) for q, steps in sampled)
        if -math.expm1(never) <= delta:
            return 0.0  # The sample is that unlikely ever to be drawn.
    bound = float(_rdp(mechanisms).get_epsilon(delta))
    exact = delta - _ROUNDING * sum(steps for _, steps in sampled)
    if accountant == "rdp" or bound == 0 or bound > _LARGEST_PLD_EPSILON or exact <= 0:
        return bound

    def figure(interval: float) -> float:
        losses = _pld(mechanisms, interval)
        return losses.get_epsilon_for_delta(exact) if _is_whole(losses, delta) else math.inf

    return min(bound, _refined(figure, bound, change))


def _merged(mechanisms: Iterable[Mechanism]) -> list[Mechanism]:
    """The same in all, each noise and sampling rate once, in an order of their own."""
    steps_of: dict[tuple[float, float], int] = {}
    for sigma, q, steps in mechanisms:
        steps_of[sigma, q] = steps_of.get((sigma, q), 0) + steps
    return [(*kind, steps) for kind, steps in sorted(steps_of.items())]


def delta_of(sigma: float, q: float, steps: int, epsilon: float, accountant: str) -> float:
    """Bound of delta at a given epsilon."""
    if sigma == 0:
        return 1.0
    if accountant == "rdp":
        return float(_rdp([(sigma, q, steps)]).get_delta(epsilon))
    if q == 1:
        return math.exp(gaussian_log_delta(math.sqrt(steps) / sigma, epsilon))
    bound = epsilon_of(sigma, q, steps, 1e-5, "rdp")
    if bound == 0:
        return float(_rdp([(sigma, q, steps)]).get_delta(epsilon))
    if bound > _LARGEST_PLD_EPSILON:
        return 1.0

    def figure(interval: float) -> float:
        losses = _pld([(sigma, q, steps)], interval)
        delta = float(losses.get_delta_for_epsilon(epsilon)) + _ROUNDING * steps
        return min(delta, 1.0) if _is_whole(losses, max(delta, _SMALLEST_DELTA)) else 1.0

    return _refined(figure, bound, 10 * _RELATIVE_CHANGE, _SMALLEST_DELTA)


def noise_for(budget: float, q: float, steps: int, delta: float, accountant: str) -> float | None:
    """Noise multiplier that keeps a budget; None if none does."""

    def figure(sigma: float, method: str = accountant, change: float = _RELATIVE_CHANGE) -> float:
        return epsilon_of(sigma, q, steps, delta, method, change)

    # RDP is fast, and needs more noise than PLD: a starting point.
    found = _least_sigma(lambda sigma: figure(sigma, "rdp"), budget, 1.0)
    if accountant == "pld":
        rough = partial(figure, change=_ROUGH_CHANGE)
        found = _least_sigma_of_slow(figure, rough, budget, found or 1.0)
    return found


def _refined(
    figure: Callable[[float], float], epsilon_bound: float, change: float, floor: float = 0.0
) -> float:
    """A figure on finer and finer grids, until it moves by no more than a relative change.

    Every grid gives an upper bound, so the least of them is one. The first grid has the scale of
    epsilon, and is capped where exponentials of its spacing would overflow.
    """
    interval = min(epsilon_bound / 300, 0.2)
    least = math.inf
    for _ in range(_REFINEMENTS):
        with np.errstate(over="ignore"):
            previous, least = least, min(least, float(figure(interval)))
        if least <= floor or previous - least <= change * least:
            break
        interval /= 3
    return least


def _pld(mechanisms: Iterable[Mechanism], interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, identity

    total = identity(interval)
    for sigma, q, steps in mechanisms:
        if q == 1:  # As a single step of less noise.
            sigma, steps = sigma / math.sqrt(steps), 1
        one = from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=interval
        )
        total = total.compose(_composed(one, steps))
    return total


def _composed(one: Any, steps: int) -> Any:
    """A distribution of privacy losses, added up over steps.

    A few steps first: of a distribution of few losses dp-accounting raises their number to the
    power of the steps, to learn that it is large.
    """
    rounds, rest = divmod(steps, _FIRST)
    if rounds < _FIRST:
        return one.self_compose(steps, _TAIL)
    total = one.self_compose(_FIRST, _TAIL / rounds).self_compose(rounds, _TAIL)
    return total.compose(one.self_compose(rest, _TAIL)) if rest else total


def _is_whole(losses: Any, delta: float) -> bool:
    """Whether rounding has left the mass that a bound of this delta needs."""
    # At a loss far below all others delta is the whole mass.
    return float(losses.get_delta_for_epsilon(-1e9)) >= 1 - _LOST * delta


def _rdp(mechanisms: Iterable[Mechanism]) -> Any:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    with _without_notes_on_orders():
        for sigma, q, steps in mechanisms:
            accountant.compose(_event(sigma, q), steps)
            # Sampling's sums may round to divergences below zero, which would pass for perfect
            # privacy: the rounding is counted as a weak mechanism of its own.
            if q < 1:
                accountant.compose(_event(_ROUNDING_SIGMA, 1.0), steps)
    return accountant


def _event(sigma: float, q: float) -> Any:
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(sigma)
    return event if q == 1 else dp_accounting.PoissonSampledDpEvent(q, event)


@contextmanager
def _without_notes_on_orders() -> Iterator[None]:
    """Some Renyi orders are left out where a series fails: no news to a user, the others do."""

    def is_news(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


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


def _least_sigma(figure: Callable[[float], float], budget: float, start: float) -> float | None:
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


def _least_sigma_of_slow(
    figure: Callable[[float], float],
    rough: Callable[[float], float],
    budget: float,
    start: float,
) -> float | None:
    """The same with few calls of a slow figure: search with a rough one, and scale its budget."""
    scaled = budget
    for _ in range(_CORRECTIONS):
        found = _least_sigma(rough, scaled, start)
        if found is None or found <= SMALLEST_SIGMA:
            return found
        start, reached = found, figure(found)
        if (1 - 10 * _SEARCH_TOLERANCE) * budget <= reached <= budget:
            return found
        if not 0 < reached < math.inf:
            break
        scaled *= (1 - 3 * _SEARCH_TOLERANCE) * budget / reached
    return _least_sigma(figure, budget, start)
