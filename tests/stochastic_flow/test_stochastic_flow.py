"""Runs drawn from a kernel: their law is that of DP-SGD on the linearised model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from helpers import known

import ntkdp
from ntkdp import clipping, dp_sgd, losses, stochastic_flow
from ntkdp.stochastic_flow import _matrix_root

N, P, M = 6, 9, 3
GROUPS = {"first": "first", "second": "second"}
SEEDS = 600


def linear(w: dict[str, Any], x: jax.Array) -> jax.Array:
    half = P // 2
    return x[:, :half] @ w["first"] + x[:, half:] @ w["second"]


def problem(n_outputs: int) -> tuple[Any, np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(3), 3)
    x = np.asarray(jax.random.normal(keys[0], (N + M, P)))
    start = np.asarray(jax.random.normal(keys[1], (P, n_outputs)))
    params = {"first": jnp.asarray(start[: P // 2]), "second": jnp.asarray(start[P // 2 :])}
    return params, x[:N], x[N:]


RULES = {
    "abadi": clipping.Abadi(0.7),
    "abadi layerwise": clipping.Abadi(np.array([0.4, 0.9]), scope="layerwise"),
    "automatic": clipping.Automatic(0.5),
    "unclipped": clipping.Abadi(1e4),
}
#: Rule, loss, learning rate, noise multiplier, sampling rate, reduction, noise by group.
SETTINGS = [
    ("abadi", "squared", 0.3, 0.5, 1.0, "mean", False),
    ("abadi", "squared", 0.2, 0.5, 0.5, "mean", False),
    ("abadi layerwise", "squared", 0.05, 1.0, 1.0, "sum", False),
    ("abadi layerwise", "squared", 0.3, 1.0, 0.4, "mean", True),
    ("abadi", "softmax", 0.5, 1.0, 0.5, "mean", False),
    ("automatic", "softmax", 0.05, 0.5, 1.0, "sum", False),
    ("unclipped", "squared", 0.2, 1e-4, 0.5, "mean", False),
]


#: The settings that others cover in part; `make test-slow` runs them.
SLOW = (0, 1, 2, 3, 5, 6)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(setting, marks=pytest.mark.slow if number in SLOW else ())
        for number, setting in enumerate(SETTINGS)
    ],
)
def test_drawn_runs_have_the_mean_and_the_spread_of_real_ones(setting: Any) -> None:
    """Mean and standard deviation of train and test loss, two-sided, at four standard errors."""
    name, kind, rate, sigma, q, reduction, per_group = setting
    n_outputs = 1 if kind == "squared" else 3
    params, x, x_test = problem(n_outputs)
    rule = RULES[name]
    if kind == "squared":
        loss: Any = losses.SquaredError()
        y, y_test = jnp.zeros((N, 1)), jnp.zeros((M, 1))
    else:
        loss = losses.SoftmaxCrossEntropy()
        y, y_test = jnp.arange(N) % 3, jnp.arange(M) % 3
    options = {"learning_rate": rate, "steps": 12, "noise_multiplier": sigma, "sample_rate": q}
    options |= {"noise_per_group": per_group, "record_every": 3}
    observed = dp_sgd.run(
        linear,
        params,
        x,
        y,
        loss,
        rule,
        groups=GROUPS,
        reduction=reduction,
        test_x=x_test,
        test_targets=y_test,
        gradients="vmap",
        key=jax.random.split(jax.random.key(1), SEEDS),
        **options,
    )
    everything = np.concatenate([x, x_test])
    kernel = ntkdp.layerwise_ntk(linear, params, jnp.asarray(everything), groups=GROUPS)
    block = ntkdp.LayerwiseKernel(kernel.names, kernel.values[:, :N, :N])
    across = ntkdp.LayerwiseKernel(kernel.names, kernel.values[:, N:, :N])
    flow = ntkdp.KernelFlow(
        block, y, loss, rule, reduction=reduction, test_kernel=across, test_targets=y_test
    )
    outputs = linear(params, jnp.asarray(everything))
    predicted = stochastic_flow.ensemble(
        flow,
        (outputs[:N], outputs[N:]),
        noise_kernel=kernel,
        key=jax.random.split(jax.random.key(2), SEEDS),
        **options,
    )
    np.testing.assert_array_equal(predicted.times, observed.times)
    np.testing.assert_array_equal(predicted.steps, observed.steps)
    for field in ("loss", "test_loss", "clip_fraction"):
        drawn, real = np.asarray(getattr(predicted, field)), np.asarray(getattr(observed, field))
        np.testing.assert_allclose(drawn[:, 0], real[:, 0], rtol=1e-12)
        error = np.sqrt((drawn.var(0) + real.var(0)) / SEEDS)
        assert np.all(np.abs(drawn.mean(0) - real.mean(0))[1:] <= 4 * error[1:] + 1e-12), field
        if field != "clip_fraction":
            spread, true = drawn.std(0)[1:], real.std(0)[1:]
            # The standard error of a deviation, by the fourth moment.
            fourth = np.mean((real - real.mean(0)) ** 4, axis=0)[1:] / true**4
            relative = np.sqrt((fourth - 1) / (4 * SEEDS) * 2)
            assert np.all(np.abs(spread / true - 1) <= 4 * relative), field


def one_sample(**options: Any) -> ntkdp.KernelFlow:
    rule = clipping.Abadi(100.0)
    chosen = {"kernel": 2.0 * jnp.eye(1), "targets": jnp.zeros((1, 1)), "clipping": rule}
    return ntkdp.KernelFlow(loss=losses.SquaredError(), reduction="sum", **{**chosen, **options})


def test_stationary_variance_is_the_closed_form_and_no_other() -> None:
    """f+ = (1 - eta h) f + eta sigma R sqrt(h) z: variance eta sigma^2 R^2 / (2 - eta h)."""
    eta, h, std = 0.4, 2.0, 0.03
    runs = stochastic_flow.ensemble(
        one_sample(),
        jnp.zeros((1, 1)),
        learning_rate=eta,
        steps=60,
        record_every=60,
        noise_multiplier=std / 100,
        key=jax.random.split(jax.random.key(5), 4000),
    )
    variance = eta * std**2 / (2 - eta * h)
    ratio = 2 * float(jnp.mean(runs.loss[:, -1])) / variance
    error = np.sqrt(2 / 4000)
    assert abs(ratio - 1) < 4 * error
    for wrong in (2 / 3, 3 / 2):
        assert abs(ratio - wrong) > 4 * error


def test_without_noise_it_is_the_recursion() -> None:
    params, x, _ = problem(2)
    kernel = ntkdp.empirical_ntk(linear, params, jnp.asarray(x))
    y = jnp.zeros((N, 2))
    flow = ntkdp.KernelFlow(kernel, y, losses.SquaredError(), clipping.Abadi(0.5))
    start = linear(params, jnp.asarray(x))
    options: dict[str, Any] = {"learning_rate": 0.3, "steps": 7, "record_every": 3, "outputs": True}
    exact = ntkdp.recursion(flow, start, **options)
    drawn = stochastic_flow.ensemble(flow, start, key=jax.random.key(0), **options)
    np.testing.assert_allclose(known(drawn.outputs), known(exact.outputs), rtol=1e-12)
    np.testing.assert_array_equal(drawn.times, exact.times)


def test_the_norm_of_the_sum_is_that_of_the_samples_drawn() -> None:
    """Without noise only the batches are random, and the same key draws those of a run."""
    params, x = problem(2)[0], jnp.asarray(problem(2)[1])
    loss, rule, y = losses.SquaredError(), clipping.Batch(0.5), jnp.ones((N, 2))
    options: dict[str, Any] = {"learning_rate": 0.3, "steps": 5, "sample_rate": 0.4}
    options |= {"outputs": True, "key": jax.random.key(0)}
    run = dp_sgd.run(linear, params, x, y, loss, rule, **options)
    flow = ntkdp.KernelFlow(ntkdp.empirical_ntk(linear, params, x), y, loss, rule)
    drawn = stochastic_flow.ensemble(flow, linear(params, x), **options)
    np.testing.assert_allclose(known(drawn.outputs), known(run.outputs), rtol=1e-10)
    flow_of_weights = ntkdp.LinearisedFlow(linear, params, x, y, loss, rule, batch_size=4)
    drawn = stochastic_flow.ensemble(flow_of_weights, params, **options)
    np.testing.assert_allclose(known(drawn.outputs), known(run.outputs), rtol=1e-10)


def test_a_flow_that_went_through_a_transformation_is_still_not_preconditioned() -> None:
    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 2, "noise_multiplier": 0.01}
    again = jax.tree.map(lambda leaf: leaf * 1, one_sample())
    drawn = [
        stochastic_flow.ensemble(flow, jnp.ones((1, 1)), key=jax.random.key(1), **options).loss
        for flow in (one_sample(), again)
    ]
    once, twice = drawn
    np.testing.assert_array_equal(once, twice)


def test_the_same_key_draws_the_same_and_a_schedule_is_followed() -> None:
    options: dict[str, Any] = {"steps": 5, "noise_multiplier": 0.01}
    keys = jax.random.split(jax.random.key(4), 3)
    start = jnp.ones((1, 1))

    def draw(rate: Any, key: Any) -> np.ndarray:
        return np.asarray(
            stochastic_flow.ensemble(
                one_sample(), start, learning_rate=rate, key=key, **options
            ).loss
        )

    first = draw(0.1, keys)
    np.testing.assert_array_equal(first, draw(0.1, keys))
    np.testing.assert_allclose(first[1], draw(0.1, keys[1]), rtol=1e-12)
    np.testing.assert_allclose(first, draw(lambda k: 0.1 + 0 * k, keys), rtol=1e-12)
    assert len(np.unique(first[:, -1])) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be at least 0"),
        ({"sample_rate": 0.0}, ValueError, r"sample_rate must be in \(0, 1\]"),
        ({"noise_per_group": True}, ValueError, "needs clipping with scope='layerwise'"),
        ({"noise_kernel": jnp.eye(2)}, ValueError, r"noise_kernel must have terms of shape"),
        (
            {"flow": one_sample(clipping=clipping.NoClipping())},
            ValueError,
            "noise_multiplier must be 0 with NoClipping",
        ),
        (
            {"flow": one_sample(preconditioned_kernel=jnp.eye(1))},
            ValueError,
            "flow must have no preconditioned_kernel",
        ),
        (
            {"flow": one_sample(kernel=jnp.diag(jnp.array([1.0, -1.0])), targets=jnp.zeros((2, 1)))}
            | {"initial": jnp.ones((2, 1))},
            ValueError,
            "positive semi-definite",
        ),
        (
            {"flow": one_sample(test_kernel=jnp.ones((1, 1)))}
            | {"initial": (jnp.ones((1, 1)), jnp.ones((1, 1)))},
            ValueError,
            "noise_kernel must be the kernel of train and test points",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type, message: str) -> None:
    options: dict[str, Any] = {
        "flow": one_sample(),
        "initial": jnp.ones((1, 1)),
        "learning_rate": 0.1,
        "steps": 2,
        "noise_multiplier": 0.1,
        "key": jax.random.key(0),
        **change,
    }
    with pytest.raises(error, match=message):
        stochastic_flow.ensemble(options.pop("flow"), options.pop("initial"), **options)


def test_noise_is_that_of_the_symmetric_root() -> None:
    # Which LAPACK finds the eigenvectors, and with which signs, changes nothing that is drawn.
    a = np.random.default_rng(0).standard_normal((6, 4))
    matrix = a @ a.T + np.diag([0, 0, 0, 0, 1e-3, 1.0])
    found = _matrix_root.square_root(jnp.asarray(matrix))
    np.testing.assert_allclose(found, np.real(scipy.linalg.sqrtm(matrix)), atol=1e-7)
    np.testing.assert_allclose(found @ found, matrix, atol=1e-12)


@pytest.mark.parametrize("dtype", [int, np.float32])
def test_a_noise_kernel_of_another_type_makes_the_same_noise(dtype: Any) -> None:
    flow = ntkdp.KernelFlow(
        jnp.eye(2), jnp.ones((2, 1)), losses.SquaredError(), clipping.Abadi(1.0)
    )
    found, expected = (
        stochastic_flow.ensemble(
            flow, jnp.zeros((2, 1)), learning_rate=0.1, steps=2, noise_multiplier=0.1,
            noise_kernel=kernel, key=jax.random.key(0),
        ).loss
        for kernel in (2 * np.eye(2, dtype=dtype), 2 * jnp.eye(2))
    )  # fmt: skip
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
