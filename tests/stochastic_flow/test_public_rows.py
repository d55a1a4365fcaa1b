"""Private runs with public samples, and their predictions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, Gradients, known, often_or_slow
from scipy.stats import ks_2samp

import ntkdp
from ntkdp import dp_sgd, privacy, stochastic_flow
from ntkdp.batches import Cyclic
from ntkdp.clipping import Abadi, Adaptive, Batch, ClippingRule, Scope
from ntkdp.losses import Reduction
from ntkdp.noise import Correlated
from ntkdp.optimizers import SGD, Adam

N, P, M, D = 12, 5, 3, 4
RNG = np.random.default_rng(0)
X, PUBLIC_X, TEST_X = (RNG.normal(size=(size, D)) for size in (N, P, M))
Y, PUBLIC_Y, TEST_Y = (
    2 * x[:, :2] + 0.5 * RNG.normal(size=(len(x), 2)) for x in (X, PUBLIC_X, TEST_X)
)
LOSS = ntkdp.losses.SquaredError()
W = {"a": jnp.asarray(RNG.normal(size=(2, 2))), "b": jnp.zeros((D - 2, 2))}
ALL = jnp.asarray(np.concatenate([X, PUBLIC_X, TEST_X]))


def linear(w: Any, x: Any) -> jax.Array:
    return jnp.asarray(x[:, :2] @ w["a"] + x[:, 2:] @ w["b"])


def public(weight: float) -> ntkdp.PublicRows:
    return ntkdp.PublicRows(PUBLIC_X, PUBLIC_Y, weight=weight)


def run(rule: ClippingRule, weight: float | None, **options: Any) -> ntkdp.Trajectory:
    rows = None if weight is None else public(weight)
    given: dict[str, Any] = {"learning_rate": 0.3, "key": KEY, "test_x": TEST_X} | options
    return dp_sgd.run(linear, W, X, Y, LOSS, rule, public=rows, test_targets=TEST_Y, **given)


def linearised(rule: ClippingRule, weight: float, **options: Any) -> ntkdp.LinearisedFlow:
    return ntkdp.LinearisedFlow(
        linear, W, X, Y, LOSS, rule, test_x=TEST_X, test_targets=TEST_Y, public=public(weight),
        **options,
    )  # fmt: skip


def blocks(kernel: ntkdp.LayerwiseKernel, rows: slice, columns: slice) -> ntkdp.LayerwiseKernel:
    return ntkdp.LayerwiseKernel(kernel.names, kernel.values[:, rows, columns])


KERNEL = ntkdp.layerwise_ntk(linear, W, ALL)
TRAIN, OF_PUBLIC, TEST = slice(0, N), slice(N, N + P), slice(N + P, None)
START = tuple(linear(W, ALL[part]) for part in (TRAIN, OF_PUBLIC, TEST))


def kernel_flow(rule: ClippingRule, weight: float, **options: Any) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(
        blocks(KERNEL, TRAIN, TRAIN), Y, LOSS, rule,
        test_kernel=blocks(KERNEL, TEST, TRAIN), test_targets=TEST_Y,
        public=public(weight), public_kernel=blocks(KERNEL, slice(None), OF_PUBLIC), **options,
    )  # fmt: skip


def textbook(R: float, sigma: float, alpha: float, steps: int, reduction: Reduction) -> list[float]:
    """Full batches, flat clipping, in NumPy with the noise of the run's key: test losses."""
    w, losses = np.concatenate([W["a"], W["b"]]), []
    n, p = (N, P) if reduction == "mean" else (1, 1)
    for k in range(steps):
        _, noise_key = jax.random.split(jax.random.fold_in(KEY, k))
        z = [np.asarray(jax.random.normal(one, (2, 2))) for one in jax.random.split(noise_key)]
        g = np.einsum("ni,nk->nik", X, X @ w - Y)
        norms = np.linalg.norm(g.reshape(N, -1), axis=1)
        clipped = np.einsum("nik,n->ik", g, np.minimum(1, R / norms))
        private = (clipped + sigma * R * np.concatenate(z)) / n
        shared = PUBLIC_X.T @ (PUBLIC_X @ w - PUBLIC_Y) / p
        w = w - 0.03 * ((1 - alpha) * private + alpha * shared)
        squares = 0.5 * np.sum((TEST_X @ w - TEST_Y) ** 2, axis=1)
        losses.append(float(np.mean(squares) if reduction == "mean" else np.sum(squares)))
    return losses


@pytest.mark.parametrize(
    ("gradients", "reduction"),
    often_or_slow(
        [(g, r) for g in ("structured", "vmap") for r in ("mean", "sum")],
        [("vmap", "mean")],
    ),
)
def test_a_run_is_that_of_the_formula(gradients: Gradients, reduction: Reduction) -> None:
    expected = textbook(1.0, 0.7, 0.4, 8, reduction)
    found = run(
        Abadi(1.0), 0.4, steps=8, noise_multiplier=0.7, learning_rate=0.03, gradients=gradients,
        reduction=reduction,
    )  # fmt: skip
    np.testing.assert_allclose(known(found.test_loss)[1:], expected, rtol=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": SGD(0.8, average=0.5), "sample_rate": 0.5},
    "adam": {"optimizer": Adam(correct_noise=True)},
    "correlated": {"noise": Correlated.square_root(3), "batches": Cyclic(3)},
    "adaptive": {"adaptive": Adaptive(0.5, count_noise=3.0), "sample_rate": 0.5},
}


@pytest.mark.parametrize(
    ("name", "scope"),
    often_or_slow(
        [(name, scope) for name in OPTIONS for scope in ("flat", "layerwise")],
        [("momentum", "flat")],
    ),
)
def test_the_linearised_model_makes_the_run_of_its_key(name: str, scope: Scope) -> None:
    rule = Abadi(1.0, scope=scope)
    options = {"steps": 12, "noise_multiplier": 0.8, "outputs": True, **OPTIONS[name]}
    observed = run(rule, 0.3, gradients="vmap", **options)
    predicted = stochastic_flow.ensemble(
        linearised(rule, 0.3, batch_size=5), W, learning_rate=0.3, key=KEY, **options
    )
    np.testing.assert_allclose(known(predicted.outputs), known(observed.outputs), rtol=1e-9)
    np.testing.assert_allclose(known(predicted.test_loss), known(observed.test_loss), rtol=1e-9)
    assert ntkdp.compare(predicted, observed).differences == {}
    other = ntkdp.compare(predicted, run(rule, None, **options), allow="public")
    assert other.differences["public"].startswith("5 public rows of weight 0.3 predicted")


@pytest.mark.parametrize("scope", often_or_slow(["flat", "layerwise"], ["layerwise"]))
def test_without_noise_outputs_make_the_steps_of_the_run(scope: Scope) -> None:
    rule = Abadi(1.0, scope=scope)
    observed = run(rule, 0.3, steps=10, optimizer=SGD(0.5), outputs=True)
    path = ntkdp.recursion(
        kernel_flow(rule, 0.3), START, learning_rate=0.3, steps=10, optimizer=SGD(0.5), outputs=True
    )
    np.testing.assert_allclose(known(path.outputs), known(observed.outputs), rtol=1e-9)
    np.testing.assert_allclose(known(path.test_outputs), known(observed.test_outputs), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["flat", "layerwise"])
def test_outputs_and_weights_flow_alike(scope: Scope) -> None:
    rule = Abadi(1.0, scope=scope)
    exact = ntkdp.WeightFlow(linear, X, Y, LOSS, rule, public=public(0.3))
    flows = ((kernel_flow(rule, 0.3), START), (linearised(rule, 0.3), W), (exact, W))
    in_time = [ntkdp.solve(flow, start, [0.0, 1.0], rtol=1e-9).loss for flow, start in flows]
    np.testing.assert_allclose(in_time[0], in_time[1], rtol=1e-6)
    np.testing.assert_allclose(in_time[0], in_time[2], rtol=1e-6)


def test_weights_flow_along_the_mixed_gradient() -> None:
    """Without clipping that is the gradient of the mixed loss."""
    exact = ntkdp.WeightFlow(linear, X, Y, LOSS, Abadi(1e3), public=public(0.3))

    def mixed(w: Any) -> jax.Array:
        own, other = (
            jnp.mean(LOSS(linear(w, x), jnp.asarray(y))) for x, y in ((X, Y), (PUBLIC_X, PUBLIC_Y))
        )
        return 0.7 * own + 0.3 * other

    expected = jax.tree.map(jnp.negative, jax.grad(mixed)(W))
    for name, velocity in exact.velocity(exact.init(W)).items():
        np.testing.assert_allclose(velocity, expected[name], rtol=1e-10, atol=1e-12)


def test_phases_with_public_samples_are_a_run_with_them() -> None:
    rule = Abadi(1.0)
    phases = [ntkdp.Phase(steps, rule, 0.3, noise_multiplier=0.5) for steps in (2, 3)]
    parts = dp_sgd.run_phases(linear, W, X, Y, LOSS, phases, public=public(0.3), key=KEY)
    whole = run(rule, 0.3, steps=5, noise_multiplier=0.5)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-12)
    assert parts.setup[1].public == whole.setup[0].public


@pytest.mark.parametrize(
    ("noise", "gradients"),
    often_or_slow([("noisy", "structured"), ("noiseless", "vmap")], [("noisy", "structured")]),
)
def test_a_weight_of_zero_is_today_bit_for_bit(noise: str, gradients: Gradients) -> None:
    sigma = 0.8 if noise == "noisy" else 0.0
    options: dict[str, Any] = {"steps": 6, "noise_multiplier": sigma, "sample_rate": 0.5}
    one, other = (run(Abadi(1.0), weight, gradients=gradients, **options) for weight in (0.0, None))
    assert one.loss.tolist() == other.loss.tolist()
    assert known(one.test_loss).tolist() == known(other.test_loss).tolist()
    plain = ntkdp.LinearisedFlow(linear, W, X, Y, LOSS, Abadi(1.0))
    given: list[Any] = [linearised(Abadi(1.0), 0.0), plain]
    one, other = (
        stochastic_flow.ensemble(flow, W, learning_rate=0.3, key=KEY, **options) for flow in given
    )
    assert one.loss.tolist() == other.loss.tolist()


def test_a_weight_of_one_is_training_on_public_samples_without_noise() -> None:
    found = run(Abadi(1.0), 1.0, steps=10, noise_multiplier=50.0)
    expected = dp_sgd.run(
        linear, W, PUBLIC_X, PUBLIC_Y, LOSS, ntkdp.clipping.NoClipping(), learning_rate=0.3,
        steps=10, test_x=TEST_X, test_targets=TEST_Y, key=KEY,
    )  # fmt: skip
    np.testing.assert_allclose(known(found.test_loss), known(expected.test_loss), rtol=1e-12)
    drawn = stochastic_flow.ensemble(
        kernel_flow(Abadi(1.0), 1.0), START, learning_rate=0.3, steps=10, noise_multiplier=50.0,
        noise_kernel=KERNEL, key=KEY,
    )  # fmt: skip
    np.testing.assert_allclose(known(drawn.test_loss), known(expected.test_loss), rtol=1e-9)


@pytest.mark.parametrize(
    ("scope", "per_group"),
    often_or_slow([("flat", False), ("layerwise", False), ("layerwise", True)], [("flat", False)]),
)
def test_an_ensemble_has_the_law_of_the_runs(scope: Scope, per_group: bool) -> None:
    rule, keys = Abadi(1.0, scope=scope), jax.random.split(jax.random.key(7), 400)
    options: dict[str, Any] = {
        "steps": 25, "noise_multiplier": privacy.Budget(mu=8.0), "sample_rate": 0.5,
        "noise_per_group": per_group, "record_every": 25,
    }  # fmt: skip
    observed = run(rule, 0.4, gradients="vmap", **options | {"key": keys})
    predicted = stochastic_flow.ensemble(
        kernel_flow(rule, 0.4), START, learning_rate=0.3, noise_kernel=KERNEL,
        **options | {"key": jax.random.split(jax.random.key(8), 400)},
    )  # fmt: skip
    for name in ("loss", "test_loss"):
        ours, theirs = (np.asarray(getattr(path, name)[:, -1]) for path in (predicted, observed))
        deviation = np.hypot(ours.std(), theirs.std()) / np.sqrt(400)
        assert abs(ours.mean() - theirs.mean()) < 3 * deviation
        assert ks_2samp(ours, theirs).pvalue > 0.01
        assert theirs.std() > 0.02 * theirs.mean()


@pytest.mark.parametrize(
    ("weight", "gradients"),
    often_or_slow([(0.0, "structured"), (0.3, "structured"), (0.9, "vmap")], [(0.3, "structured")]),
)
def test_a_private_sample_moves_a_step_by_its_share(weight: float, gradients: Gradients) -> None:
    """The step's difference over its noise is at most 1 / sigma: that is what is paid for."""
    R, sigma, rate = 0.5, 2.0, 0.3

    def after(x: Any, y: Any, noise_multiplier: float) -> np.ndarray:
        algorithm = dp_sgd.build(
            linear, x, y, LOSS, Abadi(R), learning_rate=rate, noise_multiplier=noise_multiplier,
            public=public(weight), reduction="sum", gradients=gradients,
        )  # fmt: skip
        state, _ = algorithm.step(KEY, algorithm.init(W))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    far_x, far_y = np.concatenate([X, 1e3 * X[:1]]), np.concatenate([Y, -Y[:1]])
    moved = np.linalg.norm(after(far_x, far_y, 0.0) - after(X, Y, 0.0))
    assert moved == pytest.approx(rate * (1 - weight) * R, rel=1e-9)
    noise = after(X, Y, sigma) - after(X, Y, 0.0)
    unit = (after(X, Y, 1.0) - after(X, Y, 0.0)) / (rate * (1 - weight) * R)
    np.testing.assert_allclose(noise, rate * (1 - weight) * sigma * R * unit, rtol=1e-9)
    _, noise_key = jax.random.split(KEY)
    z = [jax.random.normal(one, (2, 2)) for one in jax.random.split(noise_key)]
    np.testing.assert_allclose(unit, -np.ravel(jnp.concatenate(z)), rtol=1e-9)


def test_labels_are_checked_and_what_cannot_mix_is_refused() -> None:
    flow = kernel_flow(Abadi(1.0), 0.5)
    with pytest.raises(ValueError, match=r"flow must have no public samples here, got 5 public"):
        stochastic_flow.moments(flow, START, learning_rate=0.1, steps=2, noise_multiplier=1.0)
    with pytest.raises(ValueError, match=r"initial must be a \(train, public, test\) tuple"):
        ntkdp.recursion(flow, START[:2], learning_rate=0.1, steps=2)
    with pytest.raises(ValueError, match=r"noise_kernel must be .* train, public and test"):
        stochastic_flow.ensemble(
            flow, START, learning_rate=0.1, steps=2, noise_multiplier=1.0, key=KEY
        )
    labels = ntkdp.PublicRows(PUBLIC_X, jnp.full(P, 7), weight=0.5)
    algorithm = dp_sgd.build(
        linear, X, jnp.zeros(N, int), ntkdp.losses.SoftmaxCrossEntropy(), Batch(1.0),
        learning_rate=0.1, public=labels,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"public\.targets"):
        algorithm.init(W)
