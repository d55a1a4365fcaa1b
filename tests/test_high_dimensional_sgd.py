"""The equation of clipped SGD in high dimension: closed forms, SciPy, invariants, simulation."""

import runpy
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DOCS
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from scipy.stats import norm

from ntkdp import high_dimensional_sgd
from ntkdp.high_dimensional_sgd import HighDimensionalSGD, risk_by_clip_norm, simulate, solve

TIMES = np.linspace(0.0, 1.0, 5)


def two_modes(**changes: Any) -> HighDimensionalSGD:
    """Eigenvalues 2 and 0.5, fifty of each."""
    values: dict[str, Any] = {
        "eigenvalues": np.repeat([2.0, 0.5], 50),
        "initial": np.repeat([0.004, 0.024], 50),
        "clip_norm": 8.0,
        "learning_rate": 2.0,
        "n_samples": 1000,
        "noise_multiplier": 0.05,
        "label_noise": 0.4,
    }
    return HighDimensionalSGD(**(values | changes))


def residual_moments(variance: float, threshold: float) -> tuple[float, float]:
    """Share of unclipped residuals and mean square of the clipped ones, by quadrature."""
    std = variance**0.5

    def square(a: float) -> float:
        return min(abs(a), threshold) ** 2 * norm.pdf(a, scale=std)

    mean_square = quad(square, -12 * std, 12 * std, points=[-threshold, threshold], limit=200)[0]
    return 1 - 2 * norm.sf(threshold, scale=std), mean_square


def test_the_quoted_numbers() -> None:
    """Isotropic, eta 3, c 0.5, zeta 0.3, d/n 0.1, d = 200, s^2 = 0.2: 0.606 and 0.111."""
    R = 0.5 * 200**0.5
    problem = HighDimensionalSGD(
        np.ones(200), np.full(200, 1 / 200), R, 3.0, 2000, 0.2**0.5 / R, 0.3
    )
    assert float(problem.residual_threshold) == pytest.approx(0.5)
    assert float(problem.noise_std) ** 2 == pytest.approx(0.2)
    path = solve(problem, [0.0, 0.25, 1.0])
    np.testing.assert_allclose(path.risk, [1.0, 0.606, 0.111], atol=5e-4)


def test_without_clipping_the_equation_is_linear() -> None:
    """rho' = A rho + b, A = -2 eta diag(lam) + (eta^2/n) lam lam^T, b = (eta^2/n) lam zeta^2."""
    problem = two_modes(clip_norm=1e6, noise_multiplier=0.0)
    lam, eta, n = np.repeat([2.0, 0.5], 50), 2.0, 1000
    A = -2 * eta * np.diag(lam) + eta**2 / n * np.outer(lam, lam)
    fixed = -np.linalg.solve(A, eta**2 / n * lam * 0.4**2)
    initial = np.repeat([0.004, 0.024], 50)
    expected = np.stack([fixed + expm(A * t) @ (initial - fixed) for t in TIMES])
    path = solve(problem, TIMES)
    np.testing.assert_allclose(path.modes, expected, rtol=1e-6)
    np.testing.assert_allclose(path.risk, expected @ lam, rtol=1e-6)


def test_isotropic_unclipped_risk_is_exponential() -> None:
    """r' = -(2 eta - eta^2 d/n) r + eta^2 (d/n) zeta^2."""
    d, n, eta, zeta = 30, 300, 1.5, 0.7
    problem = HighDimensionalSGD(np.ones(d), np.full(d, 2 / d), 1e5, eta, n, label_noise=zeta)
    rate, floor = 2 * eta - eta**2 * d / n, eta**2 * d / n * zeta**2
    expected = floor / rate + (2 - floor / rate) * np.exp(-rate * TIMES)
    np.testing.assert_allclose(solve(problem, TIMES).risk, expected, rtol=1e-7)
    # A log that begins late is still one of training from time 0, unless told otherwise.
    np.testing.assert_allclose(solve(problem, TIMES[1:]).risk, expected[1:], rtol=1e-7)
    shifted = solve(problem, TIMES[1:], start=TIMES[1])
    np.testing.assert_allclose(shifted.risk, expected[:-1], rtol=1e-7)


def test_two_clipped_noisy_modes_follow_another_solver_and_quadrature() -> None:
    lam, eta, n, c = np.array([2.0, 0.5]), 2.0, 1000, 8.0 / 125**0.5
    s = 0.05 * 8.0

    def velocity(t: float, rho: np.ndarray) -> np.ndarray:
        kept, square = residual_moments(50 * lam @ rho + 0.4**2, c)
        return -2 * eta * kept * lam * rho + eta**2 / n * (lam * square + s**2)

    other = solve_ivp(velocity, (0, 1), [0.004, 0.024], t_eval=TIMES, rtol=1e-8, atol=1e-12)
    path = solve(two_modes(), TIMES)
    np.testing.assert_allclose(path.modes[:, [0, 50]], other.y.T, rtol=1e-6)
    np.testing.assert_allclose(path.risk, 50 * lam @ other.y, rtol=1e-6)


def test_a_small_clipping_norm_descends_at_a_saturated_rate() -> None:
    """c -> 0, no noise: mu -> c sqrt(2/(pi v)), so that sqrt(r) falls linearly (zeta = 0)."""
    d, eta = 10, 1.0
    problem = HighDimensionalSGD(np.ones(d), np.full(d, 1 / d), 1e-4 * d**0.5, eta, 1e9)
    times = np.array([0.0, 2000.0])
    expected = (1 - eta * 1e-4 * (2 / np.pi) ** 0.5 * 2000.0) ** 2
    np.testing.assert_allclose(solve(problem, times).risk[-1], expected, rtol=1e-5)


@pytest.mark.slow
def test_simulations_follow_the_equation() -> None:
    """Risk and the part of each block of modes within 2 %, of 300 runs with their own clipping."""
    problem = two_modes()
    keys = jax.random.split(jax.random.key(0), 300)
    runs = simulate(problem, steps=500, record_every=250, key=keys)
    path = solve(problem, runs.times)
    assert runs.modes.shape == (300, 3, 100)
    np.testing.assert_allclose(runs.times, [0.0, 0.25, 0.5])
    blocks = np.mean(runs.modes, axis=0).reshape(3, 2, 50).sum(2)
    np.testing.assert_allclose(np.mean(runs.risk, axis=0), path.risk, rtol=0.02)
    np.testing.assert_allclose(blocks, path.modes.reshape(3, 2, 50).sum(2), rtol=0.02)
    share = problem.clip_fraction(path.modes[-1])
    assert 0.2 < float(share) < 0.8


def test_the_share_of_clipped_samples_is_that_of_drawn_ones() -> None:
    """Gradients of 20,000 samples at the start and at no error; those of the norm in 100 modes."""
    problem = two_modes()
    lam, generator = np.repeat([2.0, 0.5], 50), np.random.default_rng(3)
    for modes in (np.repeat([0.004, 0.024], 50), np.zeros(100)):
        x = generator.normal(size=(20_000, 100)) * np.sqrt(lam)
        residual = x @ np.sqrt(modes) + 0.4 * generator.normal(size=20_000)
        drawn = np.mean(np.abs(residual) * np.linalg.norm(x, axis=1) > 8.0)
        # 1 % for the randomness of the norm in finite dimension.
        assert abs(float(problem.clip_fraction(jnp.asarray(modes))) - drawn) < 0.02


def test_one_key_is_one_of_many_and_records_the_last_step() -> None:
    problem = two_modes()
    keys = jax.random.split(jax.random.key(1), 2)
    one = simulate(problem, steps=7, record_every=3, key=keys[1])
    many = simulate(problem, steps=7, record_every=3, key=keys)
    np.testing.assert_allclose(one.times * 1000, [0, 3, 6, 7])
    np.testing.assert_allclose(one.modes, many.modes[1], rtol=1e-12)
    every = simulate(problem, steps=7, key=keys[1])
    np.testing.assert_allclose(every.modes[jnp.array([0, 3, 6, 7])], one.modes, rtol=1e-12)


def test_noise_alone_is_a_random_walk_of_the_stated_variance() -> None:
    """Nothing to descend, tiny eigenvalue: rho grows by (eta s / n)^2 a step and coordinate."""
    problem = HighDimensionalSGD(np.full(50, 1e-12), np.zeros(50), 2.0, 3.0, 100, 0.5)
    runs = simulate(problem, steps=20, key=jax.random.split(jax.random.key(2), 100))
    grown = np.asarray(runs.modes[:, -1]) / (20 * (3.0 * 1.0 / 100) ** 2)
    assert abs(np.mean(grown) - 1) < 4 * (2 / grown.size) ** 0.5
    np.testing.assert_allclose(solve(problem, [0, 0.2]).modes[-1], 20 * 0.03**2, rtol=1e-6)


@given(
    scale=st.floats(0.01, 100.0),
    clip_norm=st.floats(0.1, 100.0),
    noise_multiplier=st.floats(0.0, 0.2),
    label_noise=st.floats(0.0, 2.0),
)
def test_units_and_signs_of_the_velocity(
    scale: float, clip_norm: float, noise_multiplier: float, label_noise: float
) -> None:
    """Errors, R and zeta in other units; the noise always adds, the descent never overshoots."""
    one = two_modes(clip_norm=clip_norm, noise_multiplier=noise_multiplier, label_noise=label_noise)
    other = eqx.tree_at(
        lambda p: (p.clip_norm, p.label_noise), one, (scale * clip_norm, scale * label_noise)
    )
    modes = jnp.asarray(one.initial)
    scaled = other.velocity(scale**2 * modes)
    np.testing.assert_allclose(scaled, scale**2 * one.velocity(modes), rtol=1e-9)
    assert np.all(one.velocity(jnp.zeros(100)) >= 0)
    louder = eqx.tree_at(lambda p: p.noise_multiplier, one, noise_multiplier + 0.1)
    assert np.all(louder.velocity(modes) > one.velocity(modes))


def test_a_residual_of_no_variance_is_not_clipped() -> None:
    problem = HighDimensionalSGD(np.ones(3), np.zeros(3), 1.0, 1.0, 10)
    np.testing.assert_array_equal(problem.velocity(jnp.zeros(3)), 0.0)
    gradient = jax.grad(lambda modes: jnp.sum(problem.velocity(modes)))(jnp.zeros(3))
    assert np.all(np.isfinite(gradient))


@pytest.mark.slow
def test_the_best_clipping_norm_is_inside_and_clips_most_samples() -> None:
    problem = HighDimensionalSGD(
        np.ones(100), np.full(100, 0.01), 1.0, 3.0, 1e5, noise_multiplier=1.0, label_noise=0.3
    )
    norms = np.geomspace(0.1, 100.0, 25)
    risks = risk_by_clip_norm(problem, norms)
    best = int(np.argmin(risks))
    assert 0 < best < 24
    assert risks[best] < 0.5 * min(float(risks[0]), float(risks[-1]))
    # Each is what the problem with that norm gives.
    alone = eqx.tree_at(lambda p: p.clip_norm, problem, norms[best])
    np.testing.assert_allclose(risks[best], solve(alone, [0.0, 1.0]).risk[-1], rtol=1e-6)
    # Without noise more of the gradient is always better here.
    quiet = eqx.tree_at(lambda p: p.noise_multiplier, problem, 0.0)
    assert np.all(np.diff(risk_by_clip_norm(quiet, norms[:20])) < 0)


@pytest.mark.slow
def test_the_page_shows_what_the_equation_gives() -> None:
    """A row of its table of the best norms, and the equation's columns of the others."""
    page = (DOCS / "high_dimensional_sgd.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page if line[:1] == "|"]
    figure = runpy.run_path(str(DOCS / "figures" / "high_dimensional_sgd.py"))
    assert figure["best_row"](0.06) in page
    at = rows.index(["t", "equation", "simulated"]) + 2
    path = solve(figure["problem"](0.5, 0.2**0.5 / 50**0.5, 0.3), [0.0, 0.25, 0.5, 0.75, 1.0])
    assert [row[1] for row in rows[at : at + 4]] == [f"{r:.3f}" for r in path.risk[1:]]
    at = next(k for k, row in enumerate(rows) if row[0] == "c") + 2
    for column, noise in enumerate(figure["NOISE_MULTIPLIERS"]):
        risk = risk_by_clip_norm(figure["problem"](1.0, noise, 1.0), figure["SIMULATED"] * 200**0.5)
        shown = [row[1 + 2 * column] for row in rows[at : at + len(risk)]]
        assert shown == [f"{r:.3f}" for r in risk]


@pytest.mark.slow
def test_it_works_in_single_precision_and_under_transformations() -> None:
    with jax.enable_x64(False):
        path = solve(two_modes(), TIMES, rtol=1e-5, atol=1e-7)
        assert path.risk.dtype == jnp.float32
        runs = simulate(two_modes(), steps=3, key=jax.random.key(0))
        assert runs.modes.dtype == jnp.float32
    np.testing.assert_allclose(path.risk, solve(two_modes(), TIMES).risk, rtol=1e-4)

    def final(rate: Any) -> Any:
        return solve(two_modes(learning_rate=rate), [0.0, 1.0]).risk[-1]

    slope = jax.jit(jax.grad(final))(2.0)
    step = (final(2.001) - final(1.999)) / 0.002
    assert float(slope) == pytest.approx(float(step), rel=1e-4)


def test_trouble_is_a_result_with_advice() -> None:
    """Unclipped, eta d/n > 2: the risk grows as exp((eta^2 d/n - 2 eta) t), past all numbers."""
    problem = HighDimensionalSGD(np.ones(50), np.ones(50), 1e160, 100.0, 500)
    path = solve(problem, [0.0, 0.001, 100.0])
    np.testing.assert_allclose(path.risk[1], 50 * np.exp(0.8), rtol=1e-6)
    assert not path.successful
    assert "lower the learning rate" in path.message
    assert np.isnan(path.risk[-1])
    assert solve(problem, [0.0, 0.001, 0.002]).message == "success"
    huge = eqx.tree_at(lambda p: p.initial, problem, np.full(50, 1e308))
    runs = simulate(huge, steps=2, key=jax.random.key(0))
    assert not runs.successful
    assert "an input overflows" in runs.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"clip_norm": np.ones(2)}, "clip_norm must be a single number"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"n_samples": 0}, "n_samples must be positive"),
        ({"noise_multiplier": -0.1}, "noise_multiplier must be at least 0"),
        ({"label_noise": np.nan}, "label_noise must be at least 0"),
        ({"eigenvalues": np.full(100, -1.0)}, "eigenvalues must be at least 0"),
        ({"eigenvalues": np.zeros(100)}, "sum of eigenvalues must be positive"),
        ({"eigenvalues": np.ones((10, 10))}, r"eigenvalues must have shape \(d,\)"),
        ({"eigenvalues": 1.0}, r"eigenvalues must have shape \(d,\)"),
        ({"eigenvalues": np.ones(0)}, r"eigenvalues must have shape \(d,\)"),
        ({"initial": np.ones(3)}, "initial must have one entry an eigenvalue"),
    ],
)
def test_bad_problems(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_modes(**changes)


def test_bad_calls() -> None:
    problem = two_modes()
    with pytest.raises(TypeError, match="problem must be a HighDimensionalSGD, got int"):
        high_dimensional_sgd._check(3)
    with pytest.raises(TypeError, match="clip_norm"):
        two_modes(clip_norm="large")
    with pytest.raises(ValueError, match="times must be strictly increasing"):
        solve(problem, [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="rtol must be positive"):
        solve(problem, TIMES, rtol=0.0)
    with pytest.raises(ValueError, match="clip_norms must be positive"):
        risk_by_clip_norm(problem, np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"clip_norms must have shape \(m,\)"):
        risk_by_clip_norm(problem, 1.0)
    with pytest.raises(ValueError, match="time must be positive"):
        risk_by_clip_norm(problem, np.ones(2), time=0.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        simulate(problem, steps=0, key=jax.random.key(0))
    plain: Any = getattr(simulate, "__wrapped__", simulate)
    with pytest.raises(TypeError, match="key must be one JAX PRNG key"):
        plain(problem, steps=1, key=0)
