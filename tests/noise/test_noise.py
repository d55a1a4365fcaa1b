"""Correlated noise: its law, what it carries, and the sensitivity of its strategies."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz
from scipy.special import ellipk

import ntkdp
from ntkdp.batches import Cyclic, FixedSize, Full, Poisson, Shuffled
from ntkdp.noise import BufferedToeplitz, Correlated, Independent, Noise

STEPS = 12
RNG = np.random.default_rng(0)
FULL_MATRIX = np.eye(STEPS) + np.tril(0.3 * RNG.random((STEPS, STEPS)), -1)
BANDED = np.triu(FULL_MATRIX, -2)
KINDS: dict[str, Noise] = {
    "independent": Independent(),
    "Toeplitz": Correlated([1.0, 0.5, 0.25]),
    "scaled": Correlated([2.0, -0.5]),
    "one band": Correlated([3.0]),
    "matrix with bands": Correlated(BANDED),
    "whole matrix": Correlated(FULL_MATRIX),
    "buffered": BufferedToeplitz([0.9, 0.2], [0.2, 0.3]),
}


def streamed(noise: Noise, keys: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Noise of all steps, from a key for each."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape)

    def step(carried: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        x, carried = noise.next(draw, at[0], at[1], carried)
        return carried, x

    start = noise.start(jax.eval_shape(draw, keys[0]))
    return jax.lax.scan(step, start, (keys, jnp.arange(len(keys))))[1]


@pytest.mark.parametrize("name", KINDS)
def test_streamed_noise_is_the_inverse_of_the_strategy_times_independent_noise(name: str) -> None:
    noise, keys = KINDS[name], jax.random.split(jax.random.key(1), STEPS)
    z = np.stack([jax.random.normal(key, (2, 3)) for key in keys])
    x = jax.jit(lambda keys: streamed(noise, keys, (2, 3)))(keys)
    inverse = np.linalg.inv(noise.strategy_matrix(STEPS))
    np.testing.assert_allclose(x, np.tensordot(inverse, z, axes=1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(noise.mixing(STEPS), inverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["Toeplitz", "whole matrix", "buffered"])
def test_autocovariance_of_many_draws(name: str) -> None:
    """That of C^-1 Z is C^-1 C^-T, entry by entry, within four standard errors."""
    noise, count = KINDS[name], 100_000
    keys = jax.random.split(jax.random.key(2), (count, STEPS))
    x = np.asarray(jax.jit(jax.vmap(lambda keys: streamed(noise, keys)))(keys))
    rows = np.linalg.inv(noise.strategy_matrix(STEPS))
    expected = rows @ rows.T
    variance = np.outer(np.diagonal(expected), np.diagonal(expected)) + expected**2
    z = (x.T @ x / count - expected) / np.sqrt(variance / count)
    assert np.abs(z).max() < 4.2  # Of 78 entries.


def test_a_buffer_holds_one_vector_less_than_there_are_bands() -> None:
    like = jax.ShapeDtypeStruct((7,), jnp.float32)
    assert Correlated(np.ones(16)).start(like).shape == (15, 7)
    assert BufferedToeplitz([0.5, 0.9], [0.1, 0.1]).start(like).shape == (2, 7)
    # Noise of earlier steps is drawn again: what is carried does not grow with the parameters.
    assert Correlated(FULL_MATRIX).start(like).shape == (STEPS,)


@given(
    c=st.lists(st.floats(0.0, 1.0), min_size=0, max_size=5),
    period=st.integers(1, 6),
    signs=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_participation_exceeds_the_sensitivity(c: list[float], period: int, signs: bool) -> None:
    """Random vectors of norm at most one, in every k-th step, move C G by no more."""
    coefficients = np.array([1.0, *c])
    if signs:
        coefficients[1::2] *= -1
    noise, steps = Correlated(coefficients), 12
    bound = noise.sensitivity(Cyclic(period), steps)
    matrix, rng = noise.strategy_matrix(steps), np.random.default_rng(0)
    for first in range(period):
        gradients = np.zeros((steps, 3))
        chosen = slice(first, None, period)
        gradients[chosen] = rng.normal(size=gradients[chosen].shape)
        gradients[chosen] /= np.linalg.norm(gradients[chosen], axis=1, keepdims=True)
        assert np.linalg.norm(matrix @ gradients) <= bound * (1 + 1e-12)
        gradients[chosen] = [1.0, 0.0, 0.0]
        assert np.linalg.norm(matrix @ gradients) <= bound * (1 + 1e-12)


def largest_over(patterns: Any, matrix: np.ndarray) -> float:
    return max(float(np.linalg.norm(matrix[:, list(steps)].sum(1))) for steps in patterns)


def test_sensitivities_of_all_patterns() -> None:
    """Of positive strategies, from every set of steps in which a sample may take part."""
    for name in ("independent", "Toeplitz", "matrix with bands", "whole matrix", "buffered"):
        noise = KINDS[name]
        matrix = noise.strategy_matrix(STEPS)
        every = [range(first, STEPS, 4) for first in range(4)]
        assert noise.sensitivity(Cyclic(4), STEPS) == pytest.approx(largest_over(every, matrix))
        assert noise.sensitivity(Full(), STEPS) == pytest.approx(
            largest_over([range(STEPS)], matrix)
        )
        once = itertools.product(range(4), range(4, 8), range(8, 12))
        largest = largest_over(once, matrix)
        bound = noise.sensitivity(Shuffled(4), STEPS)
        assert largest * (1 - 1e-12) <= bound <= 1.25 * largest


def test_sensitivities_of_steps_that_lie_apart() -> None:
    """Banded and decreasing Toeplitz strategies, against all sets of steps."""

    def apart(separation: int, most: int) -> list[tuple[int, ...]]:
        return [
            steps
            for count in range(1, most + 1)
            for steps in itertools.combinations(range(STEPS), count)
            if all(b - a >= separation for a, b in itertools.pairwise(steps))
        ]

    decreasing = np.tril(toeplitz(0.8 ** np.arange(STEPS)))
    for matrix, separation in ((BANDED, 3), (BANDED, 5), (decreasing, 2), (decreasing, 4)):
        noise = Correlated(matrix)
        for most in (1, 2, 4):
            expected = largest_over(apart(separation, most), matrix)
            reached = noise.separated_sensitivity(STEPS, separation, most)
            assert reached == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"at most every 12 steps"):
        Correlated(FULL_MATRIX).separated_sensitivity(STEPS, 2)


@pytest.mark.parametrize(
    ("epochs", "ratio"), [(1, 0.4005), (4, 0.4009), (10, 0.4185), (20, 0.4916), (200, 2.655)]
)
def test_variance_of_a_mode_at_equal_privacy(epochs: int, ratio: float) -> None:
    """That of (1 - a z)^(-1/2) over that of independent noise, at the last of 200 steps."""
    a, steps = 0.9, 200
    k = np.arange(1, steps)
    noise = Correlated(np.cumprod(np.append(1.0, a * (k - 0.5) / k)))
    batches = Cyclic(steps // epochs)
    response = a ** np.arange(steps)[::-1]

    def variance(noise: Noise) -> float:
        moved = response @ noise.mixing(steps)
        return noise.sensitivity(batches, steps) ** 2 * float(moved @ moved)

    assert variance(noise) / variance(Independent()) == pytest.approx(ratio, abs=5e-5 * ratio / 0.4)


@pytest.mark.parametrize(("a", "ratio"), [(0.5, 0.8638), (0.9, 0.4005), (0.99, 0.0909)])
def test_variance_of_a_mode_over_a_long_run(a: float, ratio: float) -> None:
    steps = 3000
    k = np.arange(1, steps)
    noise = Correlated(np.cumprod(np.append(1.0, a * (k - 0.5) / k)))
    response = a ** np.arange(steps)[::-1]
    moved = np.linalg.solve(noise.strategy_matrix(steps).T, response)
    own = float(noise.strategy[: noise.n_bands] @ noise.strategy[: noise.n_bands])
    reached = own * float(moved @ moved) / float(response @ response)
    assert reached == pytest.approx((1 - a**2) * (2 * ellipk(a**2) / np.pi) ** 2, rel=1e-4)
    assert reached == pytest.approx(ratio, abs=5e-5)


def test_a_budget_pays_for_the_whole_run_at_once() -> None:
    budget = ntkdp.privacy.Budget(3.0, 1e-5)
    assert budget.mu is not None
    noise = Correlated.square_root(8)
    sigma = budget.noise_multiplier(60, batches=Cyclic(20), noise=noise)
    assert sigma == pytest.approx(noise.sensitivity(Cyclic(20), 60) / budget.mu)
    # One Gaussian mechanism of this noise over its sensitivity, for an independent accountant.
    one = ntkdp.privacy.epsilon(sigma / noise.sensitivity(Cyclic(20), 60), 1.0, 1, 1e-5)
    assert one == pytest.approx(3.0, rel=1e-3)
    same = budget.noise_multiplier(60, batches=Poisson(0.1))
    assert same == budget.noise_multiplier(60, 0.1)
    assert budget.noise_multiplier(60, batches=Full()) == budget.noise_multiplier(60)


@pytest.mark.parametrize(
    ("batches", "noise"),
    [(Poisson(0.5), Correlated([1.0, 0.5])), (FixedSize(3), Correlated([1.0, 0.5]))],
)
def test_no_epsilon_without_an_accountant(batches: Any, noise: Any) -> None:
    budget = ntkdp.privacy.Budget(3.0, 1e-5)
    with pytest.raises(ValueError, match=r"there is no accountant of .* take independent noise"):
        budget.noise_multiplier(60, batches=batches, noise=noise, n_samples=9)
    for any_noise in (noise, Independent()):
        with pytest.raises(ValueError, match=r"batches must be Full, Cyclic or Shuffled"):
            any_noise.sensitivity(batches, 60)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ([], "Toeplitz coefficients"),
        ([[1.0, 0.0]], "square matrix"),
        ([0.0, 1.0], "positive on its diagonal, got 0"),
        ([1.0, np.nan], "finite"),
        ([[1.0, 1.0], [0.0, 1.0]], "lower triangular"),
    ],
)
def test_strategies_are_checked(strategy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Correlated(strategy)


def test_buffers_and_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match=r"weights must have the length of decays"):
        BufferedToeplitz([0.5], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"decays must be in \[0, 1\)"):
        BufferedToeplitz([1.0], [0.1])
    with pytest.raises(ValueError, match=r"weights must be finite"):
        BufferedToeplitz([0.5], [np.inf])
    with pytest.raises(ValueError, match=r"steps must be at most the 12 of the strategy, got 13"):
        Correlated(BANDED).strategy_matrix(13)
