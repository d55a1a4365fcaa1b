"""Budgets in place of noise multipliers: against the accountants, and in runs."""

import math
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from helpers import balle_and_wang, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ntkdp import clipping, dp_sgd, gradient_flow, losses, privacy, stochastic_flow
from ntkdp.privacy._arguments import ACCOUNTANTS


def test_a_budget_of_epsilon_and_delta_is_kept_by_the_accountants() -> None:
    """Epsilon of the noise found, by dp_accounting itself."""
    q, steps, delta = 0.02, 150, 1e-5
    accounted: Any
    for accountant, budget, accounted in (
        (ACCOUNTANTS[0], 2.0, PLDAccountant(value_discretization_interval=1e-3)),
        (ACCOUNTANTS[1], 0.7, RdpAccountant()),
    ):
        spent = privacy.Budget(budget, delta, accountant=accountant)
        sigma = spent.noise_multiplier(steps, q)
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        epsilon = accounted.compose(event, steps).get_epsilon(delta)
        assert 0.998 * budget <= epsilon <= 1.002 * budget


def mu_of(epsilon: float, delta: float) -> float:
    mu = privacy.Budget(epsilon, delta).mu
    assert mu is not None
    return mu


@settings(max_examples=50)
@given(st.floats(1e-3, 50.0), st.floats(-14.0, -0.01))
def test_mu_of_a_budget_of_epsilon_and_delta(epsilon: float, exponent: float) -> None:
    delta = 10**exponent
    mu = mu_of(epsilon, delta)
    # The difference of two nearly equal tails loses digits.
    lost = stats.norm.cdf(mu / 2 - epsilon / mu) * 1e-14
    assert balle_and_wang(mu, epsilon) == pytest.approx(delta, rel=1e-7, abs=lost)


def test_with_full_batches_both_kinds_of_budget_agree() -> None:
    spent, mu = privacy.Budget(1.5, 1e-6), mu_of(1.5, 1e-6)
    same = privacy.Budget(mu=mu)
    for steps in (1, 40):
        sigma = same.noise_multiplier(steps)
        assert sigma == pytest.approx(math.sqrt(steps) / mu, rel=1e-14)
        assert sigma * (1 - 1e-9) <= spent.noise_multiplier(steps) <= sigma * (1 + 1e-3)


@given(st.floats(1e-4, 1e3), st.floats(1e-6, 0.999), st.integers(1, 10**7))
def test_mu_with_sampling_is_that_of_the_central_limit(mu: float, q: float, steps: int) -> None:
    sigma = privacy.Budget(mu=mu).noise_multiplier(steps, q)
    reached = q * math.sqrt(steps) * math.sqrt(math.expm1(sigma**-2))
    # Rounding of sigma counts twofold in its square, and that in the exponent.
    assert reached == pytest.approx(mu, rel=1e-14 * (10 + sigma**-2))


def test_extreme_budgets() -> None:
    assert privacy.Budget(mu=1e200).noise_multiplier(1, 0.5) == pytest.approx(
        1 / math.sqrt(2 * math.log(2e200)), rel=1e-14
    )
    # At epsilon = 0, delta is 2 Phi(mu/2) - 1.
    assert mu_of(1e-9, 1e-5) == pytest.approx(2 * stats.norm.ppf((1 + 1e-5) / 2), rel=1e-4)
    assert mu_of(3.0, 1 - 1e-12) > mu_of(3.0, 0.999)
    with pytest.raises(ValueError, match=r"mu = 1e-12 cannot be kept over 9 steps.*fewer steps"):
        privacy.Budget(mu=1e-12).noise_multiplier(9)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({}, ValueError, "give epsilon and delta, or mu alone, got epsilon=None"),
        ({"epsilon": 1.0}, ValueError, "give epsilon and delta, or mu alone"),
        ({"delta": 1e-5}, ValueError, "give epsilon and delta, or mu alone"),
        ({"epsilon": 1.0, "delta": 1e-5, "mu": 1.0}, ValueError, "or mu alone, got .* mu=1.0"),
        ({"epsilon": 1.0, "mu": 1.0}, ValueError, "give epsilon and delta, or mu alone"),
        ({"epsilon": 0.0, "delta": 1e-5}, ValueError, "epsilon must be positive and finite, got 0"),
        ({"epsilon": math.inf, "delta": 1e-5}, ValueError, "epsilon must be positive and finite"),
        ({"epsilon": 1.0, "delta": 1.0}, ValueError, r"delta must be in \(0, 1\), got 1.0"),
        ({"epsilon": 1.0, "delta": 0.0}, ValueError, "delta must be positive"),
        ({"mu": -2.0}, ValueError, "mu must be positive and finite, got -2.0"),
        ({"mu": math.nan}, ValueError, "mu must be positive and finite, got nan"),
    ],
)
def test_bad_budgets(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        privacy.Budget(**wrong)


def test_bad_mechanisms_of_a_budget() -> None:
    for spent in (privacy.Budget(1.0, 1e-5), privacy.Budget(mu=1.0)):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            spent.noise_multiplier(0)
        with pytest.raises(ValueError, match=r"sample_rate must be in \(0, 1\], got 1.5"):
            spent.noise_multiplier(10, 1.5)
    nearly_tight, loose = (
        privacy.Budget(1.0, 1e-12, accountant=accountant).noise_multiplier(10, 0.1)
        for accountant in ACCOUNTANTS
    )
    assert 0 < nearly_tight < loose


W, X, Y = np.zeros((3, 1)), np.linspace(-1, 1, 12).reshape(4, 3), np.ones((4, 1))
RULE = clipping.Abadi(0.5)


@pytest.mark.parametrize(
    ("budget", "sample_rate", "sigma"),
    [
        (privacy.Budget(mu=0.5), 1.0, math.sqrt(5) / 0.5),
        (privacy.Budget(mu=0.5), 0.5, 1 / math.sqrt(math.log1p(1 / 5))),
        (privacy.Budget(2.0, 1e-5), 1.0, None),
    ],
)
def test_runs_and_drawn_runs_spend_a_budget(
    budget: privacy.Budget, sample_rate: float, sigma: float | None
) -> None:
    """Runs with a budget have exactly the noise of the number that it comes to."""
    number = privacy.noise_multiplier(2.0, sample_rate, 5, 1e-5) if sigma is None else sigma
    options: dict[str, Any] = {
        "learning_rate": 0.3,
        "steps": 5,
        "sample_rate": sample_rate,
        "outputs": True,
        "key": jax.random.key(7),
    }
    flow = gradient_flow.KernelFlow(jnp.asarray(X @ X.T), Y, losses.SquaredError(), RULE)

    def run(noise: Any) -> Any:
        squared = losses.SquaredError()
        return dp_sgd.run(linear, W, X, Y, squared, RULE, noise_multiplier=noise, **options)

    def draw(noise: Any) -> Any:
        return stochastic_flow.ensemble(flow, X @ W, noise_multiplier=noise, **options)

    for make in (run, draw):
        spent = make(budget).outputs
        np.testing.assert_allclose(spent, make(number).outputs, rtol=1e-12)
        assert np.ptp(spent - make(0.9 * number).outputs) > 1e-3


def test_a_budget_needs_the_number_of_steps() -> None:
    budget, squared = privacy.Budget(mu=1.0), losses.SquaredError()
    message = r"number of steps is not known, got Budget\(.*; use its .noise_multiplier\(steps"
    flow = gradient_flow.KernelFlow(jnp.asarray(X @ X.T), Y, squared, RULE)
    with pytest.raises(TypeError, match=message):
        stochastic_flow.moment_flow(
            flow, X @ W, [0.0, 1.0], learning_rate=0.1, noise_multiplier=budget
        )
    with pytest.raises(ValueError, match="noise_multiplier must be 0 with NoClipping"):
        dp_sgd.run(
            linear,
            W,
            X,
            Y,
            squared,
            clipping.NoClipping(),
            learning_rate=0.1,
            steps=3,
            noise_multiplier=budget,
            key=jax.random.key(0),
        )
