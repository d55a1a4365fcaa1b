"""The privacy of the last iterate against closed laws, integrals of the definition and runs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, SQUARED, balle_and_wang, known, linear
from scipy import optimize, stats

from ntkdp import dp_sgd, privacy
from ntkdp.clipping import Abadi


@pytest.mark.parametrize(
    ("a", "steps", "expected"), [(0.9, 10**6, 4.359), (0.99, 10**6, 14.107), (0.9, 1, 1.0)]
)
def test_known_mus(a: float, steps: int, expected: float) -> None:
    found = privacy.last_iterate(2.0, steps, 1e-5, contraction=a)
    assert found.mu == pytest.approx(expected / 2, rel=5e-5)
    assert balle_and_wang(found.mu, found.epsilon) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("a", [0.0, 0.3, 0.99, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 400])
def test_the_worst_case_is_a_walk_with_a_constant_gap(a: float, steps: int) -> None:
    gap = variance = 0.0
    for _ in range(steps):
        gap, variance = a * gap + 1.0, a**2 * variance + 1.5**2
    found = privacy.last_iterate(1.5, steps, 1e-5, contraction=a)
    assert found.mu == pytest.approx(gap / math.sqrt(variance), rel=1e-7)
    assert found.mu <= privacy.gaussian_dp(1.5, 1.0, steps, 1e-5).mu * (1 + 1e-12)


@pytest.mark.slow
def test_runs_of_a_quadratic_attain_it() -> None:
    n, rate, steps, sigma, runs = 12, 0.1, 30, 2.0, 4000
    targets = jnp.append(jnp.zeros(n), 1e6)[:, None]

    def last(canary: float) -> np.ndarray:
        # Gradients are w/n, far from being clipped, and that of the canary always is.
        x = jnp.append(jnp.full(n, n**-0.5), canary)[:, None]
        run = dp_sgd.run(
            linear, jnp.zeros((1, 1)), x, targets, SQUARED, Abadi(1.0), learning_rate=rate,
            steps=steps, noise_multiplier=sigma, reduction="sum", test_x=jnp.ones((1, 1)),
            record_every=steps, outputs=True, key=jax.random.split(KEY, runs),
        )  # fmt: skip
        return np.asarray(known(run.test_outputs))[:, -1, 0, 0]

    absent, present = last(0.0), last(1.0)
    measured = np.mean(present - absent) / np.std(absent)
    expected = privacy.last_iterate(sigma, steps, 1e-5, contraction=0.9).mu
    assert measured == pytest.approx(expected, rel=4 / math.sqrt(2 * runs))


def by_quadrature(sigma: float, q: float, steps: int, delta: float) -> float:
    """Epsilon of the linear losses' law from its densities, on a grid, the worse direction."""
    scale = sigma * math.sqrt(steps)
    x = np.linspace(-14 * scale, steps + 14 * scale, 400_001)
    chances = stats.binom.pmf(np.arange(steps + 1), steps, q)
    drawn = np.zeros_like(x)
    for count, chance in enumerate(chances):
        if chance > 1e-30:
            drawn += chance * stats.norm.pdf(x, count, scale)
    absent = stats.norm.pdf(x, 0, scale)

    def excess(epsilon: float) -> float:
        both = [
            np.maximum(one - math.exp(epsilon) * other, 0).sum()
            for one, other in ((drawn, absent), (absent, drawn))
        ]
        return float(max(both) * (x[1] - x[0]) - delta)

    return float(optimize.brentq(excess, 0, 100, xtol=1e-10))


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "expected"),
    [(2.0, 0.5, 16, 1e-3, 3.461), (0.6, 0.01, 1000, 1e-6, 2.705), (1.0, 0.9, 3, 1e-4, None)],
)
def test_the_estimate_of_linear_losses(
    sigma: float, q: float, steps: int, delta: float, expected: float | None
) -> None:
    found = privacy.last_iterate_estimate(sigma, q, steps, delta)
    assert found == pytest.approx(by_quadrature(sigma, q, steps, delta), rel=1e-5)
    if expected is not None:
        assert found == pytest.approx(expected, abs=5e-4)
    assert found <= privacy.epsilon(sigma, q, steps, delta)


def test_the_estimate_does_not_underflow() -> None:
    # Of many steps the count is nearly normal, so that the pair is too.
    sigma, q, steps, delta = 10.0, 1e-3, 1_000_000, 1e-8
    found = privacy.last_iterate_estimate(sigma, q, steps, delta)
    mu = q * math.sqrt(steps) / sigma
    near = optimize.brentq(lambda e: balle_and_wang(mu, e) - delta, 0, 50)
    assert found == pytest.approx(near, rel=0.01)
    assert 0 < privacy.last_iterate_estimate(0.05, 1e-4, 100_000, 1e-300) < math.inf
    assert privacy.last_iterate_estimate(1e3, 1e-4, 10, 1e-5) == 0


def test_edges() -> None:
    assert privacy.last_iterate(0.0, 3, 1e-5, contraction=0.5).epsilon == math.inf
    assert privacy.last_iterate_estimate(0.0, 0.5, 3, 1e-5) == math.inf
    whole = privacy.last_iterate_estimate(3.0, 1.0, 9, 1e-5)
    assert whole == pytest.approx(privacy.epsilon(3.0, 1.0, 9, 1e-5), rel=1e-9)


@pytest.mark.parametrize("a", [-0.1, 1.1, math.nan])
def test_bad_contractions(a: Any) -> None:
    with pytest.raises(ValueError, match="contraction must be in"):
        privacy.last_iterate(1.0, 3, 1e-5, contraction=a)
