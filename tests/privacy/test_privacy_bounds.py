"""Epsilon falls with noise and delta, grows with sampling and steps, and is below no attack."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ntkdp import privacy
from ntkdp.privacy._arguments import ACCOUNTANTS

Case = tuple[float, float, int, float]

#: What rounding may undo of a rise or a fall, relative.
ROUNDING = 1e-9


def attacked(sigma: float, q: float, steps: int, delta: float) -> float:
    """Epsilon of two attacks, in closed form: at most that of the mechanism, whoever counts it.

    One says that the sample is there if any step's output is large; one if their sum is. The chance
    p of a hit and that of a false alarm f obey p <= e^epsilon f + delta.
    """
    z = np.linspace(0, 60, 3001)[:, None]
    # From tails, which keep their digits where delta is tiny.
    hit_of_step = (1 - q) * stats.norm.sf(z) + q * stats.norm.sf(z - 1 / sigma)
    with np.errstate(divide="ignore"):
        alone = steps * np.log1p(-hit_of_step)
    largest = -np.expm1(alone), stats.norm.logsf(z) + math.log(steps)
    draws = stats.binom(steps, q)
    low, high = int(draws.ppf(1e-16)), int(draws.isf(1e-20))
    counts = np.unique(np.linspace(low, high, 2001).astype(int))
    # Of a run of counts the least gains are taken, so that this stays below the truth.
    chances = -np.diff(draws.sf(counts - 1), append=0.0)
    sums = math.sqrt(steps) * np.linspace(-1, 40, 821)[:, None] + counts[0] / sigma
    middle = stats.norm.sf((sums - counts / sigma) / math.sqrt(steps)) @ chances
    summed = middle[:, None], stats.norm.logsf(sums / math.sqrt(steps))
    best = 0.0
    for hit, log_false_alarm in (largest, summed):
        gain = hit - delta * (1 + 1e-9)
        won = gain > 0
        best = max(best, float(np.max(np.log(gain[won]) - log_false_alarm[won], initial=0.0)))
    return best


def epsilons(axes: Sequence[Sequence[Any]], accountant: Any) -> np.ndarray:
    found = [
        privacy.epsilon(sigma, q, steps, delta, accountant)
        for sigma, q, steps, delta in itertools.product(*axes)
    ]
    return np.reshape(found, [len(axis) for axis in axes])


def check(axes: Sequence[Sequence[Any]], accountant: Any) -> None:
    """Axes from the least private to the most: sigma and delta rise, q and steps fall."""
    table = epsilons(axes, accountant)
    for axis in range(4):
        worse, better = (np.delete(table, end, axis) for end in (-1, 0))
        assert np.all(better <= worse * (1 + ROUNDING))
    for found, case in zip(table.flat, itertools.product(*axes), strict=True):
        assert found >= attacked(*case) * (1 - ROUNDING), case


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_a_grid_of_cases(accountant: Any) -> None:
    axes = ((0.05, 0.5, 100.0), (1.0, 1e-2, 1e-7), (10**7, 1), (1e-10, 1e-3))
    check(axes, accountant)


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_the_whole_grid_of_cases(accountant: Any) -> None:
    check(
        (
            (0.05, 0.1, 0.2, 0.4, 0.41, 0.7, 1.0, 4.0, 100.0),
            (1.0, 0.999, 0.3, 1e-2, 1e-4, 1e-7),
            (10**7, 10**5, 300, 1),
            (1e-12, 1e-8, 1e-5, 1e-1),
        ),
        accountant,
    )


@pytest.mark.slow
def test_little_noise_rarely_drawn_does_not_go_up_and_down() -> None:
    """Here grids that follow epsilon went up and down by four per cent, and were half too high."""
    sigmas = (0.413, 0.4137, 0.4141210286521444)
    found = [privacy.epsilon(sigma, 1e-7, 10**7, 1e-8) for sigma in sigmas]
    assert found == sorted(found, reverse=True)
    for sigma, epsilon in zip(sigmas, found, strict=True):
        attack = attacked(sigma, 1e-7, 10**7, 1e-8)
        assert attack <= epsilon <= 1.2 * attack


def of_one_step(sigma: float, q: float, epsilon: float) -> float:
    """Delta of one step where a sample is there or is not: the larger, in closed form."""
    z = sigma * math.log1p(math.expm1(epsilon) / q) + 0.5 / sigma
    present = q * stats.norm.sf(z - 1 / sigma) + (1 - q - math.exp(epsilon)) * stats.norm.sf(z)
    if q <= -math.expm1(-epsilon):
        return float(present)
    z = sigma * math.log1p(math.expm1(-epsilon) / q) + 0.5 / sigma
    mixed = (1 - q) * stats.norm.cdf(z) + q * stats.norm.cdf(z - 1 / sigma)
    return float(max(present, stats.norm.cdf(z) - math.exp(epsilon) * mixed))


@pytest.mark.parametrize(
    ("sigma", "q"), [pytest.param(1.0, 1e-6, marks=pytest.mark.slow), (0.6, 0.1)]
)
def test_one_step_has_the_smallest_deltas_that_it_should(sigma: float, q: float) -> None:
    """Far below the delta for which grids are made, too: what is rarer must not drown the rest."""
    for delta in (1e-8, 1e-14):
        found = privacy.epsilon(sigma, q, 1, delta)
        assert 0.99 * delta <= of_one_step(sigma, q, found) <= delta
        truth = of_one_step(sigma, q, found)
        assert truth <= privacy.delta(sigma, q, 1, found) <= 1.02 * truth


cases = st.tuples(
    st.floats(math.log(0.05), math.log(100)).map(math.exp),
    st.floats(-7, 0).map(lambda power: 10**power),
    st.floats(0, 7).map(lambda power: int(10**power)),
    st.floats(-12, -1).map(lambda power: 10**power),
)


def neighbours(case: Case, more: float) -> list[Case]:
    """A little more private, one argument at a time."""
    sigma, q, steps, delta = case
    fewer = max(1, min(steps - 1, int(steps / more)))
    return [
        (sigma * more, q, steps, delta),
        (sigma, q / more, steps, delta),
        (sigma, q, fewer, delta),
        (sigma, q, steps, delta * more),
    ]


def check_neighbours(case: Case, more: float, accountant: Any) -> None:
    epsilon = privacy.epsilon(*case, accountant)
    for better in neighbours(case, more):
        assert privacy.epsilon(*better, accountant) <= epsilon * (1 + ROUNDING), better


@settings(max_examples=4)
@given(cases, st.floats(-6, -0.3).map(lambda power: 1 + 10**power))
def test_neighbours(case: Case, more: float) -> None:
    for accountant in ACCOUNTANTS:
        check_neighbours(case, more, accountant)


@pytest.mark.slow
@settings(max_examples=60)
@given(cases, st.floats(-6, -0.3).map(lambda power: 1 + 10**power))
def test_many_neighbours(case: Case, more: float) -> None:
    for accountant in ACCOUNTANTS:
        check_neighbours(case, more, accountant)


def test_delta_and_pieces_follow_too() -> None:
    sigma, q, steps = 0.8, 1e-2, 1000
    for more in (1 + 1e-3, 1.1):
        deltas = [
            privacy.delta(sigma / factor, min(1.0, q * of_q), int(steps * of_steps), 0.3)
            for factor, of_q, of_steps in ((1, 1, 1), (more, 1, 1), (1, more, 1), (1, 1, more))
        ]
        assert max(deltas[1:]) >= min(deltas[1:]) >= deltas[0] * (1 - ROUNDING)
        pieces = [
            privacy.composed_epsilon([(2.0 / factor, 0.2, 30), (10.0, 1.0, int(5 * more))], 1e-6)
            for factor in (1, more)
        ]
        assert pieces[1] >= pieces[0] * (1 - ROUNDING)


@pytest.mark.slow
def test_the_noise_multiplier_of_a_rare_draw_is_found_and_keeps_its_budget() -> None:
    found = privacy.noise_multiplier(0.9, 1e-7, 10**7, 1e-8)
    assert privacy.epsilon(found, 1e-7, 10**7, 1e-8) <= 0.9
    assert privacy.epsilon(found * (1 - 1e-3), 1e-7, 10**7, 1e-8) > 0.9
    assert attacked(found * (1 - 0.05), 1e-7, 10**7, 1e-8) > 0.9
