"""Noise that changes over the steps, accounted: against dp-accounting, formulas and trials."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from ntkdp import privacy
from ntkdp.batches import Batches, Cyclic, FixedSize, Full, Poisson, Shuffled
from ntkdp.noise import Correlated

STEPS, DELTA = 12, 1e-5
RELATIVE = np.repeat([1.0, 1.5, 2.0], 4)


def accounted(sigmas: np.ndarray, q: float) -> float:
    """Google's figure."""
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
    for sigma, count in zip(*np.unique(sigmas, return_counts=True), strict=True):
        event = dp_event.GaussianDpEvent(float(sigma))
        accountant.compose(dp_event.PoissonSampledDpEvent(q, event), int(count))
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize("q", [0.1, 1.0])
def test_epsilon_of_a_schedule_is_that_of_dp_accounting(q: float) -> None:
    sigmas = RELATIVE * (4.0 if q == 1 else 1.0)
    found = privacy.epsilon(sigmas, q, STEPS, DELTA)
    assert found == pytest.approx(accounted(sigmas, q), rel=0.01)
    by_function = privacy.epsilon(lambda k: sigmas[0] * (1 + (k // 4) / 2), q, STEPS, DELTA)
    assert by_function == pytest.approx(found, rel=1e-9)
    pieces = [(float(sigma), q, 4) for sigma in np.unique(sigmas)]
    assert found == pytest.approx(privacy.composed_epsilon(pieces, DELTA), rel=1e-9)


def test_full_batches_add_the_squares() -> None:
    sigmas = np.geomspace(5.0, 20.0, STEPS)
    mu = math.sqrt((1 / sigmas**2).sum())
    assert privacy.epsilon(sigmas, 1.0, STEPS, DELTA) == pytest.approx(
        privacy.epsilon(1 / mu, 1.0, 1, DELTA), rel=1e-9
    )
    scale = privacy.Budget(mu=0.5).noise_multiplier(STEPS, relative=sigmas)
    assert scale == pytest.approx(mu / 0.5)


@pytest.mark.parametrize("batches", [Cyclic(5), Shuffled(5), Cyclic(20), Full()])
def test_a_sample_takes_part_where_it_costs_most(batches: Batches) -> None:
    """All ways in which a sample may take part are tried."""
    relative = np.random.default_rng(0).uniform(0.5, 2.0, STEPS)
    n_batches = getattr(batches, "n_batches", 1)
    epochs = [range(k, min(k + n_batches, STEPS)) for k in range(0, STEPS, n_batches)]
    if isinstance(batches, Shuffled):
        ways = [list(way) for way in itertools.product(*epochs)]
    else:
        ways = [list(range(first, STEPS, n_batches)) for first in range(min(n_batches, STEPS))]
    worst = max(math.sqrt((1 / relative[way] ** 2).sum()) for way in ways)
    scale = privacy.Budget(mu=0.5).noise_multiplier(STEPS, batches=batches, relative=relative)
    assert scale == pytest.approx(worst / 0.5, rel=1e-12)
    constant = privacy.Budget(mu=0.5).noise_multiplier(
        STEPS, batches=batches, relative=np.ones(STEPS)
    )
    assert constant == pytest.approx(
        privacy.Budget(mu=0.5).noise_multiplier(STEPS, batches=batches), rel=1e-12
    )


@pytest.mark.parametrize(
    "batches", [Poisson(0.1), pytest.param(FixedSize(10), marks=pytest.mark.slow)]
)
def test_a_scale_keeps_the_budget(batches: Batches) -> None:
    budget = privacy.Budget(2.0, DELTA)
    scale = budget.noise_multiplier(STEPS, batches=batches, n_samples=100, relative=RELATIVE)
    sampling: Literal["poisson", "fixed_size"] = "poisson"
    if isinstance(batches, FixedSize):
        sampling = "fixed_size"
    spent = privacy.epsilon(scale * RELATIVE, 0.1, STEPS, DELTA, sampling=sampling)
    assert 1.998 <= spent <= 2.0
    constant = budget.noise_multiplier(STEPS, batches=batches, n_samples=100)
    even = budget.noise_multiplier(
        STEPS, batches=batches, n_samples=100, relative=2 * np.ones(STEPS)
    )
    assert 2 * even == pytest.approx(constant, rel=1e-3)
    by_limit = privacy.Budget(mu=0.3)
    scale = by_limit.noise_multiplier(STEPS, batches=batches, n_samples=100, relative=RELATIVE)
    worth = [
        privacy.gaussian_dp(scale * r, 0.1, 4, DELTA, sampling=sampling).mu for r in (1, 1.5, 2)
    ]
    assert math.hypot(*worth) == pytest.approx(0.3, rel=2e-4)


@pytest.mark.slow
def test_many_different_numbers_are_rounded_down() -> None:
    sigmas = np.linspace(1.0, 2.0, 100)
    found = privacy.epsilon(sigmas, 0.1, 100, DELTA)
    bounds = [privacy.epsilon(np.full(100, sigma), 0.1, 100, DELTA) for sigma in (2.0, 1.0)]
    assert bounds[0] < found < bounds[1]
    thirds = np.repeat(sigmas[::3], 3)[:100]
    finer = privacy.epsilon(np.minimum(thirds, sigmas), 0.1, 100, DELTA)
    assert found <= finer
    assert found == pytest.approx(finer, rel=0.05)


def test_bad_schedules_are_named() -> None:
    budget = privacy.Budget(1.0, DELTA)
    for relative, message in (
        (np.ones(3), "relative must be a schedule with one number for each of 12 steps"),
        (np.zeros(STEPS), "relative must be positive in all steps"),
        (np.ones((STEPS, 2)), "relative must be one number in each step"),
    ):
        with pytest.raises(ValueError, match=message):
            budget.noise_multiplier(STEPS, relative=relative)
    with pytest.raises(ValueError, match="noise must be independent with relative"):
        budget.noise_multiplier(
            STEPS, batches=Cyclic(3), noise=Correlated([1.0, 0.5]), relative=RELATIVE
        )
    assert privacy.epsilon(np.append(0.0, np.ones(11)), 1.0, STEPS, DELTA) == math.inf
