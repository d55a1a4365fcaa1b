"""Gradients a little way uphill: private runs, and their predictions."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, known, linear, normal, often_or_slow
from scipy.stats import chi2, kstest

import ntkdp
from ntkdp import PublicRows, SharpnessAware, dp_sgd, privacy, stochastic_flow
from ntkdp.batches import Full
from ntkdp.clipping import Abadi, Adaptive, Automatic, NoClipping
from ntkdp.noise import Independent
from ntkdp.optimizers import SGD, Adam
from ntkdp.stochastic_flow._ensemble.step_noise import (
    OutputNoise,
    finding_norms,
    noise_of_step,
)

N, M, D, K = 10, 3, 4, 2
N_WEIGHTS = D * K
X, TEST_X, PUBLIC_X = normal(0, N, D), normal(1, M, D), normal(2, 4, D)
Y, TEST_Y, PUBLIC_Y = 2 * X[:, :K] + 1, 2 * TEST_X[:, :K], PUBLIC_X[:, 1 : K + 1]
W = {"a": normal(3, 2, K), "b": jnp.zeros((D - 2, K))}
LOSS = ntkdp.losses.SquaredError()
FAR = SharpnessAware(1.5)
TESTS: dict[str, Any] = {"test_x": TEST_X, "test_targets": TEST_Y}
PUBLIC = PublicRows(PUBLIC_X, PUBLIC_Y, weight=0.3)


def in_layers(w: Any, x: Any) -> jax.Array:
    return jnp.asarray(x[:, :2] @ w["a"] + x[:, 2:] @ w["b"])


def run(rule: Any, **options: Any) -> ntkdp.Trajectory:
    given: dict[str, Any] = {"learning_rate": 0.2, "key": KEY, "gradients": "vmap"} | options
    return dp_sgd.run(in_layers, W, X, Y, LOSS, rule, **TESTS, **given)


def textbook(R: float, sigma: float, rho: float, momentum: float, steps: int) -> np.ndarray:
    """The algorithm in NumPy with the random numbers of the run's key: weights at the end."""
    x, y = np.asarray(X), np.asarray(Y)
    w = np.concatenate([W["a"], W["b"]])
    last, velocity = np.zeros_like(w), np.zeros_like(w)
    for k in range(steps):
        length = np.sqrt(np.sum(last**2))
        point = w + rho * last / length if k else w
        total = np.zeros_like(w)
        for x_i, y_i in zip(x, y, strict=True):
            gradient = np.outer(x_i, x_i @ point - y_i)
            total += gradient * min(1.0, R / np.sqrt(np.sum(gradient**2)))
        keys = jax.random.split(jax.random.split(jax.random.fold_in(KEY, k))[1])
        noise = np.concatenate([jax.random.normal(own, (2, K)) for own in keys])
        last = (total + sigma * R * noise) / N
        velocity = momentum * velocity + last
        w = w - 0.2 * velocity
    return w


def test_a_run_is_the_algorithm() -> None:
    algorithm = dp_sgd.build(
        in_layers, X, Y, LOSS, Abadi(2.0), learning_rate=0.2, noise_multiplier=0.5,
        sharpness_aware=FAR, optimizer=SGD(momentum=0.5), gradients="vmap",
    )  # fmt: skip
    state, step = algorithm.init(W), algorithm.compile()
    for k in range(6):
        state, _ = step(jax.random.fold_in(KEY, k), state)
    found = np.concatenate([state.params["a"], state.params["b"]])
    np.testing.assert_allclose(found, textbook(2.0, 0.5, 1.5, 0.5, 6), rtol=1e-9)
    assert np.abs(found - textbook(2.0, 0.5, 0.0, 0.5, 6)).max() > 0.01


def test_one_sample_more_moves_a_step_by_its_sensitivity() -> None:
    """The way uphill is the same for neighbours, since it was released before the step."""
    R = 0.5

    def build(x: Any, y: Any) -> dp_sgd.Algorithm:
        return dp_sgd.build(
            in_layers, x, y, LOSS, Abadi(R), learning_rate=1.0, noise_multiplier=1.0,
            sharpness_aware=FAR, reduction="sum", gradients="vmap",
        )  # fmt: skip

    ours = build(X, Y)
    theirs = build(jnp.concatenate([X, 50 * X[:1]]), jnp.concatenate([Y, -Y[:1]]))
    state, _ = ours.compile()(jax.random.key(1), ours.init(W))
    ends = [algorithm.compile()(KEY, state)[0].params for algorithm in (ours, theirs)]
    moved = jax.tree.leaves(jax.tree.map(jnp.subtract, *ends))
    assert np.sqrt(sum(np.sum(leaf**2) for leaf in moved)) == pytest.approx(R, rel=1e-9)


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": SGD(momentum=0.6, weight_decay=0.1), "sample_rate": 0.5},
    "Adam": {"optimizer": Adam(), "rule": Automatic(1.0, scope="layerwise")},
    "by layer": {"rule": Abadi((0.5, 1.0), scope="layerwise"), "noise_per_group": True},
    "correlated": {
        "noise": ntkdp.noise.Correlated.square_root(3),
        "batches": ntkdp.batches.Cyclic(2),
    },
    "adaptive": {"adaptive": Adaptive(0.7, rate=0.5, count_noise=4.0)},
    "public": {"public": PUBLIC},
}


@pytest.mark.parametrize("name", often_or_slow(VARIANTS, ["momentum"]))
def test_the_linearised_model_makes_the_run_of_its_key(name: str) -> None:
    options: dict[str, Any] = {
        "steps": 9, "noise_multiplier": 0.8, "outputs": True, "record_every": 3,
        "sharpness_aware": FAR,
    } | VARIANTS[name]  # fmt: skip
    rule, public = options.pop("rule", Abadi(1.0)), options.pop("public", None)
    observed = run(rule, public=public, **options)
    flow = ntkdp.LinearisedFlow(in_layers, W, X, Y, LOSS, rule, public=public, **TESTS)
    predicted = stochastic_flow.ensemble(flow, W, learning_rate=0.2, key=KEY, **options)
    for recorded in ("outputs", "test_outputs", "clip_fraction"):
        np.testing.assert_allclose(
            getattr(predicted, recorded), getattr(observed, recorded), rtol=1e-8, err_msg=recorded
        )
    assert ntkdp.compare(predicted, observed).differences == {}
    assert predicted.setup[0].sharpness_aware == "SharpnessAware(radius=1.5)"


def flow_of_kernel(rule: Any, public: PublicRows | None = None) -> tuple[Any, Any]:
    """Flow of the outputs, and where it starts."""
    points = [X, TEST_X] if public is None else [X, PUBLIC_X, TEST_X]
    everything = jnp.concatenate(points)
    kernel = ntkdp.empirical_ntk(in_layers, W, everything)
    n_public = 0 if public is None else len(PUBLIC_X)
    of_public = None if public is None else kernel[:, N : N + n_public]
    flow = ntkdp.KernelFlow(
        kernel[:N, :N], Y, LOSS, rule, public=public, public_kernel=of_public,
        test_kernel=kernel[N + n_public :, :N], test_targets=TEST_Y,
    )  # fmt: skip
    return flow, tuple(in_layers(W, x) for x in points)


@pytest.mark.parametrize("public", often_or_slow([None, PUBLIC], [PUBLIC]))
def test_without_noise_outputs_make_the_steps_of_the_weights(public: PublicRows | None) -> None:
    rule = Abadi(1.0)
    options: dict[str, Any] = {
        "steps": 8, "optimizer": SGD(momentum=0.3), "sharpness_aware": FAR, "outputs": True,
    }  # fmt: skip
    observed = run(rule, public=public, **options)
    flow, start = flow_of_kernel(rule, public)
    predicted = ntkdp.recursion(flow, start, learning_rate=0.2, **options)
    np.testing.assert_allclose(known(predicted.outputs), known(observed.outputs), rtol=1e-9)
    np.testing.assert_allclose(known(predicted.test_loss), known(observed.test_loss), rtol=1e-9)
    assert ntkdp.compare(predicted, observed).differences == {}


@pytest.mark.parametrize("public", [None, PUBLIC])
def test_outputs_know_the_norm_of_a_noisy_gradient(public: PublicRows | None) -> None:
    """By weights and their noise, moved to the outputs by hand."""
    flow, start = flow_of_kernel(Abadi(1.0), public)
    state, drawn = flow.init(start), jnp.arange(N) % 3 / 2
    w = np.concatenate([W["a"], W["b"]])
    gradients = np.einsum("nd,nk->ndk", X, X @ w - Y)
    lengths = np.sqrt(np.sum(gradients**2, axis=(1, 2)))
    gradient = np.einsum("n,ndk->dk", drawn * np.minimum(1, 1 / lengths), gradients) / N
    points = [X, TEST_X]
    if public is not None:
        points = [X, PUBLIC_X, TEST_X]
        of_public = PUBLIC_X.T @ (PUBLIC_X @ w - PUBLIC_Y) / len(PUBLIC_X)
        gradient = 0.7 * gradient + 0.3 * np.asarray(of_public)
    noise = np.asarray(0.2 * normal(5, D, K))
    drift, added = ((-X @ v, -jnp.concatenate(points[1:]) @ v) for v in (gradient, noise))
    found = flow.gradient_norm(state, drawn, drift, added, np.sum(noise**2))
    assert float(found) == pytest.approx(np.linalg.norm(gradient + noise), rel=1e-9)


@pytest.mark.parametrize("n_params", [N_WEIGHTS, N_WEIGHTS + 5])
def test_noise_of_outputs_has_the_length_of_that_of_the_weights(n_params: int) -> None:
    """What outputs show of it is known from them, and the rest has the law of the rest."""
    kernel, sigma = X @ X.T, 0.6
    flow = ntkdp.KernelFlow(kernel, Y, LOSS, Abadi(2.0))
    state = flow.init(jnp.zeros((N, K)))
    plain = noise_of_step(flow, sigma, Full(), None, False, Independent())
    steps = finding_norms(plain, flow, state, SharpnessAware(0.1, n_params))
    added = steps.added
    assert isinstance(added, OutputNoise)

    def draw(key: Any) -> Any:
        return added.draw(None, state, key)[0], added.square(state, key)

    moved, squares = jax.vmap(draw)(jax.random.split(KEY, 500))
    deviation = sigma * 2.0 / N
    shown = np.einsum("sik,ij,sjk->s", moved, np.linalg.pinv(kernel), moved)
    hidden = (np.asarray(squares) - shown) / deviation**2
    if n_params == N_WEIGHTS:
        np.testing.assert_allclose(hidden, 0, atol=1e-8)
    else:
        assert kstest(hidden, chi2(n_params - N_WEIGHTS).cdf).pvalue > 0.01
        assert abs(np.corrcoef(hidden, shown)[0, 1]) < 3 / np.sqrt(500)
    assert kstest(shown / deviation**2, chi2(N_WEIGHTS).cdf).pvalue > 0.01


def test_there_is_nothing_uphill_of_the_first_step_or_without_a_gradient() -> None:
    plain, uphill = (run(Abadi(1.0), steps=2, sharpness_aware=s, outputs=True) for s in (None, FAR))
    np.testing.assert_array_equal(known(plain.outputs)[1], known(uphill.outputs)[1])
    assert np.abs(known(plain.outputs)[2] - known(uphill.outputs)[2]).max() > 1e-3
    with pytest.raises(ValueError, match=r"sharpness_aware.*at the weights predicted.*radius=1\.5"):
        ntkdp.compare(plain, uphill)
    flow = ntkdp.KernelFlow(X @ X.T, Y, LOSS, NoClipping())
    still = ntkdp.recursion(flow, Y, learning_rate=0.2, steps=3, sharpness_aware=FAR)
    np.testing.assert_array_equal(still.loss, 0)


def test_a_radius_of_zero_is_training_without_it_to_the_last_bit() -> None:
    zero = SharpnessAware(0.0)
    noisy: dict[str, Any] = {"steps": 3, "noise_multiplier": 0.5}
    flow, start = flow_of_kernel(Abadi(1.0))
    kernel = ntkdp.empirical_ntk(in_layers, W, jnp.concatenate([X, TEST_X]))
    for make in (
        lambda s: run(Abadi(1.0), sharpness_aware=s, **noisy),
        lambda s: stochastic_flow.ensemble(
            flow, start, learning_rate=0.2, noise_kernel=kernel, sharpness_aware=s, key=KEY, **noisy
        ),
    ):
        plain, other = make(None), make(zero)
        np.testing.assert_array_equal(plain.loss, other.loss)
        assert plain.setup == other.setup


@pytest.mark.slow
def test_a_radius_may_be_traced() -> None:
    flow = ntkdp.KernelFlow(X @ X.T, Y, LOSS, Abadi(1.0))
    start = jnp.zeros((N, K))

    def final(radius: Any) -> Any:
        uphill = SharpnessAware(radius)
        path = ntkdp.recursion(flow, start, learning_rate=0.2, steps=4, sharpness_aware=uphill)
        return path.loss[-1]

    slope = (final(0.5 + 1e-5) - final(0.5 - 1e-5)) / 2e-5
    assert float(jax.grad(final)(0.5)) == pytest.approx(float(slope), rel=1e-6)


def assert_same_law(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Mean and variance within three standard errors of the difference."""
    for one, other in ((ours, theirs), ((ours - ours.mean()) ** 2, (theirs - theirs.mean()) ** 2)):
        error = np.hypot(one.std() / np.sqrt(len(one)), other.std() / np.sqrt(len(other)))
        assert abs(one.mean() - other.mean()) < 3 * error


#: Samples, test points, inputs, outputs: with fewer weights than outputs of points, and with more.
SIZES = {"few weights": (10, 3, 4, 2), "many weights": (4, 2, 30, 1), "in between": (3, 1, 6, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shared"), [*itertools.product(SIZES, (True, False))])
def test_an_ensemble_has_the_law_of_the_runs(name: str, shared: bool) -> None:
    n, m, d, k = SIZES[name]
    x, w = normal(7, n + m, d), normal(8, d, k) / 2
    y = x[:, :k] + 0.5
    kernel = x @ x.T if shared else ntkdp.empirical_ntk(linear, w, x)
    rule, rate = Abadi(2.0), 0.8 / float(jnp.linalg.eigvalsh(x @ x.T / n)[-1])
    options: dict[str, Any] = {
        "steps": 20, "noise_multiplier": privacy.Budget(mu=8.0), "sample_rate": 0.7,
        "record_every": 20, "learning_rate": rate,
    }  # fmt: skip

    def observed(radius: float) -> ntkdp.Trajectory:
        return dp_sgd.run(
            linear, w, x[:n], y[:n], LOSS, rule, sharpness_aware=SharpnessAware(radius),
            test_x=x[n:], test_targets=y[n:], key=jax.random.split(jax.random.key(5), 400),
            **options,
        )  # fmt: skip

    flow = ntkdp.KernelFlow(
        kernel[:n, :n], y[:n], LOSS, rule, test_kernel=kernel[n:, :n], test_targets=y[n:]
    )
    outputs = linear(w, x)
    predicted = stochastic_flow.ensemble(
        flow, (outputs[:n], outputs[n:]), noise_kernel=kernel,
        sharpness_aware=SharpnessAware(2.0, n_params=w.size),
        key=jax.random.split(jax.random.key(6), 400), **options,
    )  # fmt: skip
    runs = observed(2.0)
    for recorded in ("loss", "test_loss"):
        ours, theirs = (np.asarray(getattr(path, recorded)[:, -1]) for path in (predicted, runs))
        assert_same_law(ours, theirs)
    with pytest.raises(AssertionError):
        assert_same_law(np.asarray(predicted.loss[:, -1]), np.asarray(observed(0.0).loss[:, -1]))
