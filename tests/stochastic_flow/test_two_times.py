"""Kernels between times, and runs of infinitely wide networks."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SQUARED, examples, known, often_or_slow
from hypothesis import given
from hypothesis import strategies as st

import ntkdp
from ntkdp import clipping, models, stochastic_flow
from ntkdp._backend.neural_tangents import stax
from ntkdp.claims._instances import stored
from ntkdp.losses import Reduction
from ntkdp.stochastic_flow import TwoTimeFlow, two_time_ensemble, two_time_flow

X = jax.random.normal(jax.random.key(0), (5, 4))
X_TEST = jax.random.normal(jax.random.key(1), (3, 4))
Y = jnp.sin(X[:, :2])


def _arc_cosine(kind: int, cross: Any, one: Any, other: Any) -> Any:
    """E relu(u) relu(v), or E relu'(u) relu'(v) (Cho and Saul 2009)."""
    norms = np.sqrt(np.outer(one, other))
    angle = np.arccos(np.clip(cross / norms, -1, 1))
    if kind == 0:
        return (np.pi - angle) / (2 * np.pi)
    return norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)


def _arc_sine(kind: int, cross: Any, one: Any, other: Any) -> Any:
    """E erf(u) erf(v), or E erf'(u) erf'(v) (Williams 1997)."""
    norms = np.outer(1 + 2 * one, 1 + 2 * other)
    if kind == 0:
        return 4 / np.pi / np.sqrt(norms - 4 * cross**2)
    return 2 / np.pi * np.arcsin(2 * cross / np.sqrt(norms))


@pytest.mark.parametrize(("activation", "expectation"), [("relu", _arc_cosine), ("erf", _arc_sine)])
def test_two_hidden_layers_follow_the_closed_form(activation: str, expectation: Any) -> None:
    W, b = 1.3, 0.4
    v1, v2 = np.array([0.5, 0.7, 0.2]), np.array([0.1, 0.9, 0.2])
    model = models.mlp([3, 3], 1, activation=activation, W_std=W, b_std=b, output_W_std=0.8)
    kernel = ntkdp.two_time_kernel(model, X, X_TEST, variance1=v1, variance2=v2)

    c1, c12, c2 = 1 + v1, 1 + np.minimum(v1, v2), 1 + v2
    terms: list[Any] = []
    plain = W**2 * X @ X_TEST.T / 4 + b**2
    own1, own2 = (W**2 * np.sum(x**2, 1) / 4 + b**2 for x in (X, X_TEST))
    for layer, scale in enumerate((W, W, 0.8)):
        if layer > 0:
            cross, one, other = c12[layer - 1] * plain, c1[layer - 1] * own1, c2[layer - 1] * own2
            slope = expectation(0, cross, one, other)
            terms = [scale**2 * c12[layer] * slope * term for term in terms]
            plain = scale**2 * expectation(1, cross, one, other) + b**2
            own1, own2 = (
                scale**2 * np.diag(expectation(1, np.diag(v), v, v)) + b**2 for v in (one, other)
            )
        terms.append(plain)
    np.testing.assert_allclose(kernel.nngp, c12[2] * plain, rtol=1e-12)
    np.testing.assert_allclose(kernel.ntk.values, np.stack(terms), rtol=1e-12)
    assert kernel.ntk.names == ("0", "2", "4")


def test_standard_parameterisation_follows_the_closed_form() -> None:
    # Noise of variance v on weights of variance W^2 / N and on biases of variance b^2.
    width, W, b, w_out = 50, 1.3, 0.4, 0.8
    v1, v2, both, kept1, kept2 = 0.01, 0.03, 0.015, 0.9, 0.7
    model = models.mlp(
        [width], 1, activation="erf", W_std=W, b_std=b, output_W_std=w_out,
        parameterization="standard",
    )  # fmt: skip
    kernel = ntkdp.two_time_kernel(
        model, X, X_TEST, variance1=v1, variance2=v2, covariance=both, kept1=kept1, kept2=kept2
    )

    def covariance(kept: float, v: float, plain: Any, n: int, scale: float) -> Any:
        return (kept * scale**2 / n + v) * n * plain + kept * b**2 + v

    one, other = (
        covariance(kept**2, v, np.sum(x**2, 1) / 4, 4, W)
        for kept, v, x in ((kept1, v1, X), (kept2, v2, X_TEST))
    )
    inputs = X @ X_TEST.T / 4
    cross = covariance(kept1 * kept2, both, inputs, 4, W)
    hidden = _arc_sine(1, cross, one, other)
    slope = (kept1 * kept2 * w_out**2 + width * both) * _arc_sine(0, cross, one, other)
    nngp = covariance(kept1 * kept2, both, hidden, width, w_out)
    np.testing.assert_allclose(kernel.nngp, nngp, rtol=1e-12)
    terms = np.stack([slope * (4 * inputs + 1), width * hidden + 1])
    np.testing.assert_allclose(kernel.ntk.values, terms, rtol=1e-12)
    assert model.two_time is not None
    own = model.two_time.own_variances(X)
    assert own == pytest.approx({"0": W**2 / 4, "2": w_out**2 / width}, rel=1e-12)


NETWORKS: dict[str, tuple[models.Model, Any]] = {
    "dense": (models.mlp([3, 3], 1), X),
    "convolutions": (models.cnn([3, 3], 1, activation="erf"), np.ones((2, 3, 3, 2))),
    "pooled": (models.cnn([3], 1, pooling="global"), np.ones((2, 3, 3, 2))),
    "normalised": (
        models.serial(stax.Dense(3, 1.2, 0.3), stax.LayerNorm(), stax.Gelu(), stax.Dense(1)),
        X,
    ),
    "residual, standard": (
        models.mlp(
            [3, 3], 1, activation="tanh", layer_norm=True, residual=True,
            parameterization="standard",
        ),
        X,
    ),
    "residual images, standard": (
        models.cnn(
            [2, 2], 1, activation="erf", residual=True, pooling="sum", parameterization="standard"
        ),
        np.ones((2, 4, 4, 2)),
    ),
}  # fmt: skip


#: Dense and convolutional, with each kind of layer in one of them.
OFTEN = ["dense", "convolutions", "residual, standard"]


@pytest.mark.parametrize("name", often_or_slow(NETWORKS, OFTEN))
def test_without_noise_they_are_the_kernels_of_the_start(name: str) -> None:
    model, x = NETWORKS[name]
    x = x + jax.random.normal(jax.random.key(2), x.shape)
    # Operation by operation with relu: compiled, a fused product moves the arc cosine of 1.
    with jax.disable_jit(name in ("dense", "pooled")):
        kernel = ntkdp.two_time_kernel(model, x, variance1=0.0, variance2=0.0)
    kernel_fn = model.kernel_fn
    assert kernel_fn is not None

    @jax.jit
    def plain(x: Any) -> Any:
        found = kernel_fn(x, None, ("nngp", "ntk"))
        return found.nngp, found.ntk

    with jax.disable_jit(name in ("dense", "pooled")):
        nngp, ntk = plain(x)
    np.testing.assert_allclose(kernel.nngp, nngp, rtol=1e-9)
    np.testing.assert_allclose(kernel.ntk.total, ntk, rtol=1e-9)


@pytest.mark.parametrize("double", [False, True])
def test_of_a_sample_with_itself_half_the_digits_hold_once_compiled(double: bool) -> None:
    # relu halves a variance: with W^2 = 2 the covariances grow by b^2 = 0.01 from layer to layer.
    with jax.enable_x64(double):
        x = jax.random.normal(jax.random.key(2), (50, 4))
        kernel = ntkdp.two_time_kernel(models.mlp([3, 3], 1), x, variance1=0.0, variance2=0.0)
    assert kernel.ntk.total.dtype == (np.float64 if double else np.float32)
    squares = np.sum(np.asarray(x, float) ** 2, axis=1) / 4
    half = float(np.sqrt(jnp.finfo(kernel.ntk.total.dtype).eps))
    np.testing.assert_allclose(np.diag(kernel.ntk.total), 3 * squares + 0.035, rtol=half)


@pytest.mark.parametrize("name", often_or_slow(NETWORKS, ["residual, standard"]))
def test_a_term_is_the_slope_of_the_covariance_in_its_layer(name: str) -> None:
    # J_r(t) J_r(s)^T = d Sigma(t, s) / d V_r(t, s).
    model, x = NETWORKS[name]
    x = jnp.asarray(x + np.asarray(jax.random.normal(jax.random.key(3), x.shape)))
    assert model.two_time is not None
    names, step = model.two_time.check(x), 1e-4
    rule = jax.jit(model.two_time.kernel)
    at = dict.fromkeys(names, models.WeightLaw(0.5, 0.2, 0.3, 0.9, 0.8))
    _, terms = rule(x, x, at)
    for name_of_layer in names:
        low, high = (
            rule(x, x, at | {name_of_layer: at[name_of_layer]._replace(between=0.2 + sign * step)})[
                0
            ]
            for sign in (-1, 1)
        )
        slope = (high - low) / (2 * step)
        np.testing.assert_allclose(terms[name_of_layer], slope, rtol=1e-6, atol=1e-8)


def _wide(name: str, width: int) -> Any:
    """A network, inputs, and the noise of two times, at which weights are half noise."""
    standard: Any = {"parameterization": "standard"}
    images = 1 + jax.random.normal(jax.random.key(4), (2, 4, 4, 2))
    if name == "convolutions":
        return models.cnn([width], 1, activation="erf"), images[:, :3, :3], 0.6
    if name == "normalised":
        layers = [stax.Dense(width, 1.2, 0.3), stax.LayerNorm(), stax.Relu(), stax.Dense(1)]
        return models.serial(*layers), X[:2], 0.6
    if name == "residual, standard":
        options: Any = {"activation": "silu", "residual": True} | standard
        return models.mlp([width] * 2, 1, **options), X[:2], 3 / width
    options = {"activation": "gelu", "residual": True, "pooling": "average"} | standard
    return models.cnn([width] * 2, 1, **options), images, 1 / width


def _error_of_wide_networks(name: str, width: int, draws: int) -> tuple[float, float]:
    """Relative error of the mean tangent kernel of noisy networks, and of one at the start."""
    model, x, later = _wide(name, width)
    earlier = later / 3
    limit = ntkdp.two_time_kernel(model, x, variance1=later, variance2=earlier)

    @jax.jit
    def kernel(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        treedef: Any
        start, treedef = jax.tree.flatten(model.init(keys[0], x))

        def noisy(leaves: Any, key: Any, variance: float) -> Any:
            each = jax.random.split(key, len(leaves))
            return [
                leaf + variance**0.5 * jax.random.normal(k, leaf.shape)
                for leaf, k in zip(leaves, each, strict=True)
            ]

        before = noisy(start, keys[1], earlier)
        after = noisy(before, keys[2], later - earlier)
        jacobian = jax.jacobian(lambda leaves: model.apply(treedef.unflatten(leaves), x)[:, 0])
        return sum(
            a.reshape(len(x), -1) @ b.reshape(len(x), -1).T
            for a, b in zip(jacobian(after), jacobian(before), strict=True)
        )

    drawn = jax.lax.map(kernel, jax.random.split(jax.random.key(5), draws))
    found, exact = np.mean(drawn, axis=0), limit.ntk.total
    still = ntkdp.two_time_kernel(model, x, variance1=0.0, variance2=0.0).ntk.total
    errors = [np.linalg.norm(k - exact) / np.linalg.norm(exact) for k in (found, still)]
    return float(errors[0]), float(errors[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["convolutions", "normalised", "residual, standard", "images, standard"],
)
def test_wide_noisy_networks_have_the_kernel(name: str) -> None:
    error, of_still = _error_of_wide_networks(name, 200, 20)
    assert error < 0.05
    assert of_still > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normalised", "residual, standard", "images, standard"])
def test_the_error_falls_with_the_width(name: str) -> None:
    # The mean kernel is off by O(1/width), a single one by O(width^-1/2); both fall.
    narrow, wide = (_error_of_wide_networks(name, width, 200)[0] for width in (8, 128))
    assert wide < narrow / 3


def _flow(
    model: Any, rule: Any = None, *, test: bool = False, loss: Any = SQUARED, **options: Any
) -> TwoTimeFlow:
    rule = clipping.Abadi(0.5) if rule is None else rule
    if test:
        options |= {"test_x": X_TEST, "test_targets": jnp.zeros((3, 2))}
    return TwoTimeFlow(model, X, Y, loss, rule, **options)


ERF = models.mlp([8], 2, activation="erf")
START = (jnp.cos(X[:, :2]), jnp.cos(X_TEST[:, :2]))


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(clipping.Abadi(0.5), marks=pytest.mark.slow),
        clipping.Abadi(0.3, scope="layerwise"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"nodes": 3, "rank": 2},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"nodes": 4})),
    ],
)
def test_without_noise_runs_are_steps_of_the_kernel(rule: Any, options: Any) -> None:
    kernel = ntkdp.layerwise_infinite_ntk(ERF, X)
    test_kernel = ntkdp.layerwise_infinite_ntk(ERF, X_TEST, X)
    flow = ntkdp.KernelFlow(
        kernel, Y, SQUARED, rule, test_kernel=test_kernel, test_targets=jnp.zeros((3, 2))
    )
    schedule: dict[str, Any] = {
        "learning_rate": lambda k: 0.8 / (1 + 0.1 * k),
        "steps": 13,
        "record_every": 3,
    }
    expected = ntkdp.recursion(flow, START, outputs=True, **schedule)
    found = two_time_ensemble(
        _flow(ERF, rule, test=True),
        START,
        outputs=True,
        key=jax.random.key(0),
        **schedule,
        **options,
    )
    for name in ("times", "steps", "loss", "outputs", "test_outputs", "test_loss", "clip_fraction"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12, err_msg=name
        )


@pytest.mark.slow
def test_without_noise_paths_are_second_order_in_the_step() -> None:
    rule = clipping.Automatic(0.5)
    kernel = ntkdp.infinite_ntk(ERF, X)
    times = [0.0, 1.0, 3.0, 6.0]
    exact = ntkdp.solve(
        ntkdp.KernelFlow(kernel, Y, SQUARED, rule), START[0], times, rtol=1e-11, atol=1e-13
    )
    errors = []
    for steps in (24, 48, 96):
        path = two_time_flow(
            _flow(ERF, rule), START[0], times, variance=0.0, steps=steps, nodes=4,
            key=jax.random.key(0),
        )  # fmt: skip
        errors.append(float(np.max(np.abs(path.loss - exact.loss))))
    orders = -np.diff(np.log2(errors))
    assert np.all(np.abs(orders - 2) < 0.15)


def _linear_moments(
    theta: Any, start: Any, targets: Any, rate: float, steps: int, variance: float
) -> tuple[Any, Any]:
    """Mean outputs and their covariance after each step of the linear model; variance a step."""
    means, covariances = [start], [np.zeros_like(theta)]
    contract = np.eye(len(theta)) - rate * theta
    for _ in range(steps):
        means.append(means[-1] - rate * theta @ (means[-1] - targets))
        covariances.append(contract @ covariances[-1] @ contract.T + variance * theta)
    return np.array(means), np.array(covariances)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"nodes": 4}, {}])
def test_a_linear_model_has_the_moments_of_the_linear_recursion(options: Any) -> None:
    # The tangent kernel of a linear model does not move, and its outputs are Brownian: coarse
    # nodes with bridges between them are exact as well.
    model, rule = models.mlp([], 1, b_std=0.3), clipping.Abadi(1e3)
    n, steps, rate, n_runs = len(X), 12, 0.9, 4000
    flow = TwoTimeFlow(model, X, Y[:, :1], SQUARED, rule)
    sigma = 0.4 / 1e3 * n
    runs = two_time_ensemble(
        flow, START[0][:, :1], learning_rate=rate, steps=steps, noise_multiplier=sigma,
        outputs=True, key=jax.random.split(jax.random.key(2), n_runs), **options,
    )  # fmt: skip
    theta = X @ X.T / 4 + 0.3**2
    means, covariances = _linear_moments(
        theta, START[0][:, 0], Y[:, 0], rate / n, steps, (0.4 * rate) ** 2
    )
    assert runs.outputs is not None
    f = np.asarray(runs.outputs)[..., 0]
    spread = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2)) + 1e-12
    z = (f.mean(0) - means) / spread * np.sqrt(n_runs)
    assert np.max(np.abs(z[1:])) < 4.5
    ratios = f.var(0)[1:] / spread[1:] ** 2 - 1
    assert np.max(np.abs(ratios)) < 4.5 * np.sqrt(2 / n_runs)
    # The spread of a random start, which is drawn from the same law, adds to it.
    free = two_time_ensemble(
        flow, learning_rate=rate, steps=1, noise_multiplier=0.0, outputs=True,
        key=jax.random.split(jax.random.key(3), n_runs),
    )  # fmt: skip
    assert free.outputs is not None
    first = np.asarray(free.outputs)[:, 0, :, 0]
    # The covariance of a linear model's outputs is its tangent kernel.
    error = np.cov(first.T) - theta
    assert np.max(np.abs(error)) < 5 * np.max(theta) * np.sqrt(2 / n_runs)


@pytest.mark.slow
def test_frozen_kernels_have_the_law_of_the_frozen_ensemble() -> None:
    kernel = ntkdp.layerwise_infinite_ntk(ERF, X)
    rule = clipping.Abadi(np.array([0.3, 0.2]), scope="layerwise")
    mechanism: Any = {
        "learning_rate": 1.5, "steps": 10, "noise_multiplier": 2.0, "sample_rate": 0.7,
        "noise_per_group": True, "key": jax.random.split(jax.random.key(4), 3000),
    }  # fmt: skip
    expected = stochastic_flow.ensemble(
        ntkdp.KernelFlow(kernel, Y, SQUARED, rule), START[0], **mechanism
    )
    found = two_time_ensemble(_flow(ERF, rule, frozen=True), START[0], **mechanism)
    z = ntkdp.comparison.standardised_error(found.loss, expected.loss)[1:]
    assert np.max(np.abs(z)) < 4
    ratio = np.std(found.loss, axis=0)[1:] / np.std(expected.loss, axis=0)[1:]
    assert np.max(np.abs(ratio - 1)) < 0.08
    # Moving kernels do not have it.
    moving = two_time_ensemble(_flow(ERF, rule), START[0], **mechanism)
    assert abs(ntkdp.comparison.standardised_error(moving.loss, expected.loss)[-1]) > 8


@pytest.mark.slow
def test_frozen_kernels_follow_dp_sgd_of_linearised_networks() -> None:
    """C38's frozen kernel, against networks of width 512 made linear at their random start."""
    n, steps, width, n_networks = 16, 80, 512, 2500
    x, y = stored("c38_x"), stored("c38_y")[:, None]
    model, rule = models.mlp([width, width], 1), clipping.Abadi(1.0)
    mechanism: Any = {
        "learning_rate": 0.4, "steps": steps, "noise_multiplier": n / 0.4 / steps**0.5
    }  # fmt: skip
    flow = TwoTimeFlow(model, x, y, SQUARED, rule, frozen=True)
    keys = jax.random.split(jax.random.key(1), 4000)
    predicted = two_time_ensemble(flow, key=keys, **mechanism).loss

    with jax.enable_x64(False):
        x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

        def linearised(w0: Any) -> Any:
            def apply(w: Any, x: Any) -> Any:
                away = jax.tree.map(jnp.subtract, w, w0)
                f, change = jax.jvp(lambda w: model.apply(w, x), (w0,), (away,))
                return f + change

            return apply

        @jax.jit
        def rotated(w0: Any) -> Any:
            """The linear model in the coordinates L^-1 J (w - w0), with L L^T = J J^T.

            They are orthonormal, gradients lie along them and noise is alike in all directions:
            runs of DP-SGD have the law of those in all the weights.
            """
            gram = ntkdp.empirical_ntk(model.apply, w0, x)[:, :, 0, 0]
            return model.apply(w0, x), jnp.linalg.cholesky(gram)

        def run(f: Any, L: Any, key: Any, **options: Any) -> Any:
            return ntkdp.dp_sgd.run(
                lambda u, x: x[:, :1] + x[:, 1:] @ u, jnp.zeros((n, 1)),
                jnp.concatenate([f, L], axis=1), y, SQUARED, rule, key=key,
                **mechanism | options,
            )  # fmt: skip

        # Every weight and bias of a network in NTK parameterisation starts standard normal.
        shapes, random = jax.eval_shape(model.init, jax.random.key(2), x), np.random.default_rng(0)

        def network() -> Any:
            return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, leaf.dtype), shapes)

        # Without noise the two sets of coordinates have one path.
        w0 = network()
        quiet: Any = {"noise_multiplier": 0.0, "key": jax.random.key(3)}
        whole = ntkdp.dp_sgd.run(linearised(w0), w0, x, y, SQUARED, rule, **mechanism | quiet)
        np.testing.assert_allclose(run(*rotated(w0), **quiet).loss, whole.loss, rtol=2e-3)

        networks = [rotated(network()) for _ in range(n_networks)]
        f, L = (jnp.stack(parts) for parts in zip(*networks, strict=True))
        keys = jax.random.split(jax.random.key(4), n_networks)
        observed = jax.jit(jax.vmap(lambda f, L, key: run(f, L, key).loss))(f, L, keys)

    z = ntkdp.comparison.standardised_error(predicted, observed)
    assert np.max(np.abs(z)) < 3
    last = observed[:, -1]
    error = np.std(last) / np.sqrt(n_networks)
    assert abs(np.mean(last) - 0.3785) < 3 * error


@pytest.mark.slow
def test_the_frozen_kernel_is_the_limit_of_little_noise() -> None:
    # One key, and kernels that differ in the first order of the variance.
    differences = []
    for variance in (0.04, 0.02, 0.01):
        losses_of = [
            np.mean(
                two_time_flow(
                    _flow(ERF, frozen=frozen), START[0], [0.0, 2.0], variance=variance, steps=10,
                    key=jax.random.split(jax.random.key(5), 400),
                ).loss[:, -1]
            )
            for frozen in (False, True)
        ]  # fmt: skip
        differences.append(abs(losses_of[0] - losses_of[1]))
    orders = -np.diff(np.log2(differences))
    assert np.all(np.abs(orders - 1) < 0.3)


@pytest.mark.slow
def test_coarse_nodes_come_close_to_a_node_at_every_step() -> None:
    flow = _flow(models.mlp([8, 8], 2))
    mechanism: Any = {
        "learning_rate": 1.0, "steps": 48, "noise_multiplier": 5 / 48**0.5, "record_every": 12,
        "key": jax.random.split(jax.random.key(6), 2500),
    }  # fmt: skip
    every, fine, coarse = (
        two_time_ensemble(flow, START[0], nodes=nodes, **mechanism).loss for nodes in (49, 17, 3)
    )
    errors = [ntkdp.comparison.standardised_error(path, every)[1:] for path in (fine, coarse)]
    assert np.max(np.abs(errors[0])) < 4
    assert np.max(np.abs(np.mean(fine, 0) / np.mean(every, 0) - 1)) < 0.05
    assert np.max(np.abs(errors[1])) > 5


@pytest.mark.slow
def test_paths_recorded_late_start_at_time_zero() -> None:
    """Recorded from t = 1 on or from the start, paths of the same keys are the same."""
    options: Any = {"variance": 0.1, "steps": 4, "key": jax.random.split(jax.random.key(0), 2)}
    whole = two_time_flow(_flow(ERF), None, [0.0, 1.0, 2.0], **options)
    late = two_time_flow(_flow(ERF), None, [1.0, 2.0], **options)
    np.testing.assert_allclose(late.loss, whole.loss[:, 1:], rtol=1e-12)
    assert float(known(late.start)) == 0.0
    shifted = two_time_flow(_flow(ERF), None, [1.0, 2.0, 3.0], start=1.0, **options)
    np.testing.assert_allclose(shifted.loss, whole.loss, rtol=1e-12)


@pytest.mark.slow
def test_bridges_between_nodes_have_the_increments_covariance() -> None:
    # Without drift, with a clipping norm next to nothing, outputs are the process itself.
    flow = _flow(ERF, clipping.Abadi(1e-12))
    runs = two_time_flow(
        flow, None, np.arange(7.0), variance=0.8, steps=6, nodes=3, outputs=True,
        key=jax.random.split(jax.random.key(7), 6000),
    )  # fmt: skip
    assert runs.outputs is not None
    f = np.asarray(runs.outputs)[:, :, 0, 0]
    for later, earlier in ((3, 0), (4, 2), (5, 5), (6, 3), (1, 0)):
        exact = ntkdp.two_time_kernel(
            ERF, X[:1], variance1=0.8 * later / 6, variance2=0.8 * earlier / 6
        ).nngp[0, 0]
        found = np.mean(f[:, later] * f[:, earlier])
        error = np.std(f[:, later] * f[:, earlier]) / np.sqrt(len(f))
        assert abs(found - exact) < 4 * error + 0.01 * exact


@examples(8, 25)
@given(st.floats(0.01, 3.0), st.floats(0.0, 1.0))
def test_covariances_between_times_are_positive(later: float, share: float) -> None:
    times = jnp.array([later, share * later, 0.0])
    between = jax.vmap(_covariance_of(), (None, 0))
    whole = np.asarray(jax.vmap(between, (0, None))(times, times))
    values = np.linalg.eigvalsh(np.swapaxes(whole, 1, 2).reshape(15, 15))
    assert values[0] > -1e-10 * values[-1]


@cache
def _covariance_of() -> Any:
    flow = _flow(ERF)

    def covariance(later: Any, earlier: Any) -> Any:
        law = models.WeightLaw(later, jnp.minimum(later, earlier), earlier)
        return flow.covariance(law)

    return jax.jit(covariance)


@pytest.mark.slow
def test_runs_are_reproducible_by_key_and_independent_of_their_number() -> None:
    flow = _flow(ERF)
    keys = jax.random.split(jax.random.key(8), 3)
    mechanism: Any = {"learning_rate": 0.5, "steps": 4, "noise_multiplier": 1.0, "sample_rate": 0.6}
    several = two_time_ensemble(flow, key=keys, **mechanism)
    one = two_time_ensemble(flow, key=keys[1], **mechanism)
    assert several.loss.shape == (3, 5)
    assert one.loss.shape == (5,)
    np.testing.assert_allclose(several.loss[1], one.loss, rtol=1e-9)
    assert len({float(v) for v in several.loss[:, -1]}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "initial"),
    [(False, None), (True, START)],
    ids=("random", "frozen, given"),
)
def test_single_precision_stays_single(frozen: bool, initial: Any) -> None:
    def runs(dtype: Any) -> Any:
        x, y, x_test = (np.asarray(a, dtype) for a in (X, Y, X_TEST))
        flow = TwoTimeFlow(
            ERF, x, y, SQUARED, clipping.Abadi(0.5), test_x=x_test, test_targets=np.zeros((3, 2)),
            frozen=frozen,
        )  # fmt: skip
        noise = 2.0 if initial is None else 0.0
        return two_time_ensemble(
            flow, initial, learning_rate=0.8, steps=6, noise_multiplier=noise, nodes=3, rank=3,
            outputs=True, key=jax.random.split(jax.random.key(10), 1500),
        )  # fmt: skip

    single, double = runs(np.float32), runs(np.float64)
    for name in ("loss", "clip_fraction", "outputs", "test_loss", "test_outputs"):
        assert getattr(single, name).dtype == np.float32, name
    if initial is None:
        # The two precisions draw other numbers.
        z = ntkdp.comparison.standardised_error(single.loss, double.loss)
        assert np.max(np.abs(z)) < 4
    else:
        for name in ("outputs", "test_loss"):
            np.testing.assert_allclose(getattr(single, name), getattr(double, name), atol=1e-4)


def test_what_is_recorded_has_its_shape_and_progress_is_reported() -> None:
    told: list[float] = []
    runs = two_time_ensemble(
        _flow(ERF, test=True), START, learning_rate=0.5, steps=7, record_every=3, outputs=True,
        noise_multiplier=0.5, nodes=3, progress=told.append,
        key=jax.random.split(jax.random.key(9), 2),
    )  # fmt: skip
    assert runs.steps is not None
    assert runs.test_outputs is not None
    assert runs.steps.tolist() == [0, 3, 6, 7]
    assert runs.test_outputs.shape == (2, 4, 3, 2)
    np.testing.assert_allclose(runs.test_outputs[:, 0], np.stack([START[1]] * 2), rtol=1e-12)
    assert told[-1] == 1.0
    assert told == sorted(told)


RATES: dict[str, Any] = {"constant": 0.5, "scheduled": lambda k: 0.5 / (1 + k)}


@pytest.mark.parametrize("rate", often_or_slow(RATES, ["scheduled"]))
@pytest.mark.parametrize(
    ("rule", "per_group"),
    [
        (clipping.Abadi(0.7), False),
        pytest.param(
            clipping.Abadi(np.array([0.3, 1.1]), scope="layerwise"), False, marks=pytest.mark.slow
        ),
        (clipping.Abadi(np.array([0.3, 1.1]), scope="layerwise"), True),
    ],
    ids=("flat", "layerwise", "by group"),
)
def test_weight_noise_variance_is_that_of_the_weights(
    rate: str, rule: Any, per_group: bool
) -> None:
    # Inputs of zero have no gradient: noise alone moves the weights, which the outputs at the unit
    # vectors are.
    n, d, steps, names = 4, 2000, 6, ("a", "b")
    mechanism: Any = {
        "learning_rate": RATES[rate], "steps": steps, "noise_multiplier": 1.3, "sample_rate": 0.5,
        "noise_per_group": per_group,
    }  # fmt: skip
    found = stochastic_flow.weight_noise_variance(rule, n, n_groups=2, **mechanism)
    run = ntkdp.dp_sgd.run(
        lambda w, x: jnp.concatenate([x @ w[name] for name in names], axis=1),
        {name: jnp.zeros((d, 1)) for name in names},
        jnp.zeros((n, d)), jnp.zeros((n, 2)), SQUARED, rule, test_x=jnp.eye(d), outputs=True,
        groups={name: name for name in names}, key=jax.random.key(0), **mechanism,
    )  # fmt: skip
    assert run.test_outputs is not None
    assert found.shape == (steps + 1, 2)
    np.testing.assert_array_equal(found[0], 0)
    ratios = np.mean(run.test_outputs**2, axis=1)[1:] / found[1:]
    assert np.max(np.abs(ratios - 1)) < 4 * np.sqrt(2 / d)


def test_weight_noise_variance_is_the_sum_over_the_steps() -> None:
    rule, n, sigma, q = clipping.Abadi(np.array([0.3, 0.4]), scope="layerwise"), 4, 1.3, 0.5
    cases: tuple[tuple[Reduction, float], ...] = (("mean", q * n), ("sum", q))
    for reduction, divisor in cases:
        found = stochastic_flow.weight_noise_variance(
            rule, n, learning_rate=RATES["scheduled"], steps=6, noise_multiplier=sigma,
            sample_rate=q, n_groups=2, reduction=reduction,
        )  # fmt: skip
        each = [(0.5 / (1 + k) * sigma * 0.5 / divisor) ** 2 for k in range(6)]
        np.testing.assert_allclose(found, np.cumsum([0.0, *each])[:, None] * [1, 1], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "sensitivity", "reduction"),
    [
        (clipping.Abadi(0.6), 0.6, "mean"),
        (clipping.Abadi(np.array([0.3, 0.4]), scope="layerwise"), 0.5, "sum"),
    ],
    ids=("flat", "layerwise"),
)
def test_a_budget_is_spent_over_the_horizon(
    rule: Any, sensitivity: float, reduction: Reduction
) -> None:
    budget = ntkdp.privacy.Budget(2.0, 1e-5)
    assert budget.mu is not None
    horizon, n = 4.0, len(X) if reduction == "mean" else 1
    flow = _flow(ERF, rule, reduction=reduction)
    explicit, spent = (
        two_time_flow(
            flow, START[0], [1.0, 2.0, 4.0], variance=variance, steps=6, key=jax.random.key(0)
        ).loss
        for variance in ((horizon * sensitivity / (n * budget.mu)) ** 2, budget)
    )
    np.testing.assert_allclose(spent, explicit, rtol=1e-9)


def test_what_has_no_kernels_between_times_is_refused() -> None:
    attention = models.serial(
        stax.Conv(4, (2, 2)), stax.GlobalSelfAttention(4, 4, 4, 1, linear_scaling=False),
        stax.Flatten(), stax.Dense(1),
    )  # fmt: skip
    not_gaussian = models.serial(
        stax.Dense(4), stax.FanOut(2), stax.parallel(stax.Relu(), stax.Dense(4)), stax.FanInSum(),
        stax.Dense(1),
    )  # fmt: skip
    nested = models.serial(stax.Dense(4), stax.serial(stax.Relu(), stax.Erf()), stax.Dense(1))
    same = models.serial(
        stax.Dense(4), stax.FanOut(2), stax.parallel(stax.Identity(), stax.Identity()),
        stax.FanInSum(), stax.Dense(1),
    )  # fmt: skip
    unknown = models.from_stax(*stax.serial(stax.Dense(4), stax.Relu(), stax.Dense(1)))
    for model, message in (
        (attention, r"layers\[1\] must be one of Dense, .* got GlobalSelfAttention; .*response_e"),
        (not_gaussian, r"layers\[3\], FanInSum, has no kernel .*Gaussian.*response_ensemble"),
        (nested, r"layers\[1\]\[1\], Erf, has no kernel .*must be Gaussian"),
        (same, r"layers\[2\] must have weights in all parallel branches but one"),
        (unknown, "layers that are known"),
    ):
        x = jnp.ones((2, 3, 3, 2)) if model is attention else X
        with pytest.raises(ValueError, match=message):
            ntkdp.two_time_kernel(model, x, variance1=0.1, variance2=0.0)
        with pytest.raises(ValueError, match=message):
            TwoTimeFlow(model, x, jnp.ones((len(x), 1)), SQUARED, clipping.Abadi(1.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variance1": -0.1}, ValueError, "variance1 must be at least 0"),
        ({"variance2": [0.1, 0.2, 0.3]}, ValueError, "each of the 2 layers"),
        ({"x2": np.ones((2, 3))}, ValueError, "samples of the shape of x1's"),
        ({"x2": np.full((2, 4), np.nan)}, ValueError, "must be finite"),
        ({"covariance": 0.1}, ValueError, "covariance must be at most the root"),
        ({"kept1": -0.1}, ValueError, "kept1 must be at least 0"),
        ({"kept2": np.ones(2)}, ValueError, "kept2 must be a single number"),
    ],
)
def test_kernels_refuse_what_does_not_fit(change: Any, error: Any, message: str) -> None:
    arguments: dict[str, Any] = {"x2": None, "variance1": 0.1, "variance2": 0.0} | change
    with pytest.raises(error, match=message):
        ntkdp.two_time_kernel(ERF, X, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": clipping.Batch(1.0)}, "each sample by itself"),
        ({"rule": clipping.Abadi([1.0, 1.0, 1.0], scope="layerwise")}, "3"),
        ({"targets": np.zeros((4, 2))}, "targets"),
        ({"test_targets": jnp.zeros((3, 2))}, "need test_x"),
        ({"test_x": np.ones((3, 5))}, "test_x must have shape"),
    ],
)
def test_flows_refuse_what_does_not_fit(change: Any, message: str) -> None:
    arguments: dict[str, Any] = {"targets": Y, "rule": clipping.Abadi(1.0)} | change
    targets, rule = arguments.pop("targets"), arguments.pop("rule")
    with pytest.raises(ValueError, match=message):
        TwoTimeFlow(ERF, X, targets, SQUARED, rule, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial": START}, ValueError, "one array"),
        ({"initial": np.zeros((5, 3))}, ValueError, "initial must have outputs of shape"),
        ({"initial": np.full((5, 2), np.nan)}, ValueError, "finite"),
        ({"steps": 0}, ValueError, "steps"),
        ({"nodes": 0}, ValueError, "nodes must be at least"),
        ({"nodes": 1}, ValueError, "nodes must be at least 2, .* got 1"),
        ({"nodes": 2.5}, TypeError, "nodes"),
        ({"rank": -1}, ValueError, "rank"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier"),
        ({"noise_per_group": True}, ValueError, "layerwise"),
        ({"key": 3}, TypeError, "key"),
    ],
)
def test_ensembles_refuse_what_does_not_fit(change: Any, error: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "initial": START[0], "learning_rate": 0.5, "steps": 3, "key": jax.random.key(0),
    } | change  # fmt: skip
    initial = arguments.pop("initial")
    with pytest.raises(error, match=message):
        two_time_ensemble(_flow(ERF), initial, **arguments)


def test_noise_needs_a_bounded_rule() -> None:
    mechanism: Any = {"learning_rate": 0.5, "steps": 3, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="unbounded"):
        two_time_ensemble(_flow(ERF, clipping.NoClipping()), noise_multiplier=1.0, **mechanism)
    with pytest.raises(ValueError, match="variance must be a number with NoClipping"):
        two_time_flow(
            _flow(ERF, clipping.NoClipping()), None, [0.0, 1.0],
            variance=ntkdp.privacy.Budget(mu=1.0), key=jax.random.key(0),
        )  # fmt: skip
    with pytest.raises(ValueError, match="variance must be one number"):
        two_time_flow(_flow(ERF), None, [0.0, 1.0], variance=[0.1, 0.2, 0.3], key=jax.random.key(0))


def test_what_does_not_fit_in_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkdp._backend.memory.available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match="fewer seeds"):
        two_time_ensemble(_flow(ERF), learning_rate=0.5, steps=3, key=jax.random.key(0))
