"""Temperature and Platt scaling against SciPy and scikit-learn, the private ones by statistics."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression

from ntkdp import calibration
from ntkdp.calibration import (
    fit_platt,
    fit_platt_privately,
    fit_temperature,
    fit_temperature_privately,
)


def held_out(seed: int, n: int, n_outputs: int, true: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``true`` times those that the labels are drawn from."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0.0, 1.5, (n, n_outputs))
    if n_outputs == 1:
        labels = (generator.logistic(size=n) < logits[:, 0]).astype(int)
    else:
        labels = np.argmax(logits + generator.gumbel(size=logits.shape), axis=1)
    return true * logits, labels


def likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood, a sigmoid as a softmax of (0, f)."""
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return float(
        np.mean(np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels])
    )


@pytest.mark.parametrize("n_outputs", [1, 2, 10])
@pytest.mark.parametrize("true", [0.01, 0.5, 3.0, 500.0])
def test_temperature_is_scipys_optimum(n_outputs: int, true: float) -> None:
    logits, labels = held_out(0, 400, n_outputs, true)
    found = float(fit_temperature(logits, labels).temperature)
    best = scipy.optimize.minimize_scalar(
        lambda log_T: likelihood(logits / np.exp(log_T), labels),
        bounds=(np.log(true) - 1, np.log(true) + 1), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert np.log(found) == pytest.approx(best.x, abs=1e-6)
    assert likelihood(logits / found, labels) <= best.fun + 1e-14


@pytest.mark.parametrize("n_outputs", [1, 2, 4])
def test_platt_is_scipys_optimum(n_outputs: int) -> None:
    logits, labels = held_out(1, 500, n_outputs, 2.0)
    logits = logits + np.linspace(0.0, 3.0, n_outputs)
    platt = fit_platt(logits, labels)
    best = scipy.optimize.minimize(
        lambda v: likelihood(logits * v[:n_outputs] + v[n_outputs:], labels),
        np.r_[np.ones(n_outputs), np.zeros(n_outputs)], method="BFGS", options={"gtol": 1e-7},
    )  # fmt: skip
    assert likelihood(np.asarray(platt(logits)), labels) <= best.fun + 1e-12
    shift = best.x[n_outputs:] - (best.x[n_outputs:].mean() if n_outputs > 1 else 0.0)
    np.testing.assert_allclose(platt.scale, best.x[:n_outputs], atol=1e-5)
    np.testing.assert_allclose(platt.shift, shift, atol=1e-5)


def test_platt_of_one_logit_is_scikit_learns_logistic_regression() -> None:
    logits, labels = held_out(2, 300, 1, 4.0)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits, labels)
    platt = fit_platt(logits[:, 0], labels)
    np.testing.assert_allclose(platt.scale, reference.coef_[0], rtol=1e-5)
    np.testing.assert_allclose(platt.shift, reference.intercept_, atol=1e-5)
    assert platt(jnp.asarray(logits[:, 0])).shape == (300,)


def test_badly_scaled_logits_are_fitted() -> None:
    """The optimum moves with the logits: f -> c f + d gives s / c and b - s d / c."""
    logits, labels = held_out(3, 300, 1, 1.0)
    plain, moved = fit_platt(logits, labels), fit_platt(1e-3 * logits + 5.0, labels)
    np.testing.assert_allclose(moved.scale, 1e3 * plain.scale, rtol=1e-4)
    np.testing.assert_allclose(moved.shift, plain.shift - 5e3 * plain.scale, rtol=1e-4)


@pytest.mark.parametrize("n_outputs", [2, 5])
def test_temperature_keeps_the_top_label(n_outputs: int) -> None:
    logits, labels = held_out(4, 200, n_outputs, 3.0)
    scaled = fit_temperature(logits, labels)(jnp.asarray(logits))
    np.testing.assert_array_equal(scaled.argmax(axis=1), logits.argmax(axis=1))


def test_scalings_are_pytrees_that_keep_the_dtype() -> None:
    f = jnp.ones((3, 2), jnp.float32)
    for scaling in (calibration.Temperature(2.0), calibration.Platt(jnp.ones(2), jnp.zeros(2))):
        assert jax.jit(lambda s, f: s(f))(scaling, f).dtype == jnp.float32


def test_no_best_temperature() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    with pytest.raises(ValueError, match="must not all be predicted right"):
        fit_temperature(logits, np.array([0, 1, 0]))
    for wrong in (logits, np.zeros((3, 2))):
        with pytest.raises(ValueError, match="better than equal ones"):
            fit_temperature(wrong, np.array([1, 0, 1]))


def test_no_best_platt() -> None:
    logits, labels = held_out(5, 200, 3, 1.0)
    missing = labels != 2
    with pytest.raises(ValueError, match="a class is missing"):
        fit_platt(logits[missing], labels[missing])
    with pytest.raises(ValueError, match="separate one from the others"):
        fit_platt(np.array([-2.0, -1.0, 0.5, 3.0]), np.array([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="a class is missing"):
        fit_platt(np.array([-2.0, -1.0, 0.5, 3.0]), np.ones(4, int))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.array([[np.nan, 0.0]]), np.array([0]), ValueError, "logits must be finite"),
        (np.zeros((2, 2, 2)), np.array([0, 1]), ValueError, "logits must have shape"),
        (np.zeros((0, 2)), np.zeros(0, int), ValueError, "logits must have shape"),
        (np.eye(2), np.array([0]), ValueError, "labels must be classes of shape"),
        (np.eye(2), np.array([0, 2]), ValueError, r"labels must be labels in 0\.\.1"),
        (np.eye(2), np.array([0.0, 1.0]), TypeError, "labels must be integer"),
        (np.ones(2), np.array([0.0, 1.0]), TypeError, "labels must be integer"),
        (np.ones(2), np.array([0, 2]), ValueError, r"labels must lie in \[0, 1\]"),
        (np.eye(2) * 1j, np.array([0, 1]), TypeError, "logits must be real"),
    ],
)
def test_bad_logits(logits: Any, labels: Any, error: type[Exception], message: str) -> None:
    private = partial(fit_temperature_privately, **DESCENT)
    fits: tuple[Callable[..., Any], ...] = (fit_temperature, fit_platt, private)
    for fit in fits:
        with pytest.raises(error, match=message):
            fit(logits, labels)


def test_fits_are_not_under_jit() -> None:
    with pytest.raises(TypeError, match="not traced"):
        jax.jit(fit_temperature)(jnp.eye(2), jnp.array([0, 1]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan])
def test_bad_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        calibration.Temperature(temperature)


# --- private scalings ----------------------------------------------------------------------------

DESCENT: dict[str, Any] = {
    "noise_multiplier": 0.0, "clip_norm": 1e3, "steps": 300, "learning_rate": 0.3,
    "key": jax.random.key(0),
}  # fmt: skip


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_without_noise_and_clipping_the_optimum_is_found(n_outputs: int) -> None:
    logits, labels = held_out(6, 400, n_outputs, 1.5)
    T = fit_temperature_privately(logits, labels, **DESCENT).temperature
    assert float(T) == pytest.approx(float(fit_temperature(logits, labels).temperature), rel=1e-8)
    platt = fit_platt_privately(logits, labels, **{**DESCENT, "steps": 3000})
    expected = fit_platt(logits, labels)
    np.testing.assert_allclose(platt.scale, expected.scale, atol=1e-5)
    np.testing.assert_allclose(platt.shift, expected.shift, atol=1e-5)


def test_one_clipped_step_by_hand() -> None:
    """Gradients of the sigmoid's loss in (scale, shift) are (p - y)(f, 1); in ln T, -(p - y) f."""
    f, y, R, rate = np.array([3.0, -4.0, 0.5]), np.array([0, 1, 1]), 1.0, 0.7
    a = 1 / (1 + np.exp(-f)) - y
    one = {**DESCENT, "clip_norm": R, "steps": 1, "learning_rate": rate}
    both = np.stack([a * f, a], axis=1)
    norms = np.linalg.norm(both, axis=1, keepdims=True)
    clipped = both * np.minimum(1, R / norms)
    assert 0 < np.sum(norms > R) < 3
    platt = fit_platt_privately(f, y, **one)
    moved = np.array([1.0, 0.0]) - rate * clipped.mean(axis=0)
    np.testing.assert_allclose([platt.scale[0], platt.shift[0]], moved, rtol=1e-12)
    T = fit_temperature_privately(f, y, **one).temperature
    log_T = -rate * np.mean(np.clip(-a * f, -R, R))
    assert np.log(float(T)) == pytest.approx(log_T, rel=1e-12)


@pytest.mark.slow
def test_noise_has_the_standard_deviation_that_privacy_needs() -> None:
    """Logits of zero have no gradient: ln T is the sum of ``steps`` noises eta sigma R/n."""
    sigma, R, steps, rate, n, runs = 1.3, 0.5, 4, 0.2, 10, 4000
    options: dict[str, Any] = {
        "noise_multiplier": sigma,
        "clip_norm": R,
        "steps": steps,
        "learning_rate": rate,
    }
    logits, labels = jnp.zeros((n, 3)), jnp.arange(n) % 3
    fit = jax.vmap(
        lambda key: fit_temperature_privately(logits, labels, **options, key=key).temperature
    )
    log_T = np.log(fit(jax.random.split(jax.random.key(1), runs)))
    std = rate * sigma * R / n * math.sqrt(steps)
    assert abs(log_T.mean()) < 4 * std / math.sqrt(runs)
    assert log_T.std() == pytest.approx(std, rel=4 / math.sqrt(2 * runs))


def test_one_sample_moves_a_noiseless_step_by_at_most_the_clipping_norm() -> None:
    logits, labels = held_out(7, 50, 4, 5.0)
    R, rate = 0.3, 1.0
    one = {**DESCENT, "clip_norm": R, "steps": 1, "learning_rate": rate}
    outlier = logits.copy()
    outlier[0] *= 1e6
    near, far = (fit_platt_privately(f, labels, **one) for f in (logits, outlier))
    moved = np.hypot(np.linalg.norm(near.scale - far.scale), np.linalg.norm(near.shift - far.shift))
    assert 0 < moved <= 2 * rate * R / 50 * (1 + 1e-12)


@pytest.mark.parametrize("fit", [fit_temperature_privately, fit_platt_privately])
@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("predicted", [True, False])
def test_a_sample_whose_logits_overflow_moves_nothing(
    fit: Callable[..., Any], n_outputs: int, predicted: bool
) -> None:
    """n is public, so that a rate in proportion to it takes the same steps without the sample."""
    logits, labels = held_out(8, 40, n_outputs, 0.2)
    huge = np.zeros((1, n_outputs))
    huge[0, 0] = 1e308
    label = int(predicted) if n_outputs == 1 else int(not predicted)
    options = {**DESCENT, "noise_multiplier": 0.1, "clip_norm": 1.0}
    without = fit(logits, labels, **{**options, "learning_rate": 1.0})
    # Beyond this scale the logit is infinite in the steps that remain.
    scales = 1 / without.temperature if fit is fit_temperature_privately else without.scale
    assert np.min(scales) > np.finfo(np.float64).max / 1e308
    with_it = fit(
        np.concatenate([logits, huge]), np.append(labels, label),
        **{**options, "learning_rate": 41 / 40},
    )  # fmt: skip
    for found, expected in zip(jax.tree.leaves(with_it), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -1.0),
        ("noise_multiplier", np.ones(2)),
        ("clip_norm", 0.0),
        ("clip_norm", np.ones(2)),
        ("learning_rate", 0.0),
        ("learning_rate", np.nan),
        ("steps", 0),
    ],
)
def test_bad_descents(name: str, value: Any) -> None:
    for fit in (fit_temperature_privately, fit_platt_privately):
        with pytest.raises(ValueError, match=f"{name} must be"):
            fit(np.eye(3), np.arange(3), **{**DESCENT, name: value})
