"""A head on features, by its factored kernel: against NumPy on its weights, and laws of noise."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, SOFTMAX, SQUARED, known, normal
from scipy.stats import chi2

import ntkdp
from ntkdp import advisor, batches, clipping, models, optimizers, stochastic_flow
from ntkdp.gradient_flow import HeadFlow
from ntkdp.losses import Huber
from ntkdp.stochastic_flow._ensemble import ensemble as ensembles

N, M, D, K = 12, 5, 3, 2
MODEL = models.linear(K, b_std=0.3, parameterization="ntk", W_std=1.5)
X, X_TEST = normal(0, N, D), normal(1, M, D)
PHI, PHI_TEST = (np.asarray(MODEL.features(x)) for x in (X, X_TEST))  # type: ignore[misc]
Y, Y_TEST = np.arange(N) % K, np.arange(M) % K
F, F_TEST = normal(2, N, K), normal(3, M, K)
ABADI = clipping.Abadi(0.5)
RATE, STEPS, SIGMA, Q = 0.7, 5, 0.4, 0.5


def flow_of(
    rule: Any = ABADI, loss: Any = SOFTMAX, y: Any = Y, y_test: Any = Y_TEST, test: bool = True,
    **options: Any,
) -> ntkdp.KernelFlow:  # fmt: skip
    with_test = {"test_kernel": ntkdp.linear_ntk(MODEL, X_TEST, X), "test_targets": y_test}
    return ntkdp.KernelFlow(
        ntkdp.linear_ntk(MODEL, X), y, loss, rule, **(with_test if test else {}), **options
    )


def softmax_gradient(f: np.ndarray) -> np.ndarray:
    p = np.exp(f - f.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) - np.eye(K)[Y]


def clipped_descent(W: np.ndarray, divisor: float) -> np.ndarray:
    """The gradient of the weights W, which move the outputs from F, clipped sample by sample."""
    a = softmax_gradient(np.asarray(F) + PHI @ W)
    total = np.zeros_like(W)
    for phi, a_i in zip(PHI, a, strict=True):
        g = np.outer(phi, a_i)
        total += g * min(1, 0.5 / float(np.linalg.norm(g)))
    return total / divisor


def weights_that_move(train: Any, test: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights by least squares for how outputs moved, and what they do not explain."""
    moved = np.concatenate([np.asarray(train) - F, np.asarray(test) - F_TEST])
    features = np.concatenate([PHI, PHI_TEST])
    W, *_ = np.linalg.lstsq(features, moved, rcond=None)
    return W, moved - features @ W


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_steps_are_those_of_the_weights(scope: Any, momentum: float) -> None:
    flow = flow_of(clipping.Abadi(0.5, scope=scope))
    path = ntkdp.recursion(
        flow, (F, F_TEST), learning_rate=RATE, steps=STEPS, outputs=True,
        optimizer=optimizers.SGD(momentum=momentum),
    )  # fmt: skip
    W = m = np.zeros((D + 1, K))
    for k in range(STEPS + 1):
        np.testing.assert_allclose(known(path.outputs)[k], F + PHI @ W, atol=1e-12)
        np.testing.assert_allclose(known(path.test_outputs)[k], F_TEST + PHI_TEST @ W, atol=1e-12)
        m = momentum * m + clipped_descent(W, N)
        W = W - RATE * m


def test_public_samples_push_too() -> None:
    """Their gradient, not clipped, is mixed with the private one."""
    x, y = normal(7, 4, D), jnp.arange(4) % K
    public, f_public = ntkdp.PublicRows(x, y, weight=0.3), normal(8, 4, K)
    everything = jnp.concatenate([X, x, X_TEST])
    flow = flow_of(public=public, public_kernel=ntkdp.linear_ntk(MODEL, everything, x))
    path = ntkdp.recursion(flow, (F, f_public, F_TEST), learning_rate=RATE, steps=1, outputs=True)
    p = np.exp(f_public) / np.exp(f_public).sum(1, keepdims=True) - np.eye(K)[np.asarray(y)]
    of_public = np.asarray(known(MODEL.features)(x)).T @ p / 4
    W = -RATE * (0.7 * clipped_descent(np.zeros((D + 1, K)), N) + 0.3 * of_public)
    np.testing.assert_allclose(known(path.outputs)[1], F + PHI @ W, atol=1e-12)
    np.testing.assert_allclose(known(path.test_outputs)[1], F_TEST + PHI_TEST @ W, atol=1e-12)


def test_batch_clipping_sees_the_norm_of_the_sum() -> None:
    path = ntkdp.recursion(
        flow_of(clipping.Batch(0.2), test=False), F, learning_rate=RATE, steps=1, outputs=True
    )
    total = PHI.T @ softmax_gradient(np.asarray(F))
    W = -RATE * total * 0.2 / np.linalg.norm(total) / N
    np.testing.assert_allclose(known(path.outputs)[1], F + PHI @ W, atol=1e-12)


NOISY: Any = {
    "independent": {},
    "of batches": {"batches": batches.Poisson(Q)},
    "correlated": {"noise": ntkdp.noise.Correlated.square_root(3)},
    "of momentum": {"optimizer": optimizers.SGD(momentum=0.5)},
    "zeroth order": {"zeroth_order": ntkdp.ZerothOrder(directions=2)},
    "sharpness aware": {"sharpness_aware": ntkdp.SharpnessAware(0.1, n_params=(D + 1) * K)},
}


@pytest.mark.parametrize("kind", NOISY)
def test_one_draw_of_weights_moves_all_points(kind: str) -> None:
    """Every run is a run of weights: what moves train and test outputs is in the features."""
    runs = stochastic_flow.ensemble(
        flow_of(), (F, F_TEST), learning_rate=RATE, steps=STEPS, noise_multiplier=SIGMA,
        outputs=True, key=jax.random.split(KEY, 2), **NOISY[kind],
    )  # fmt: skip
    for run in range(2):
        W, rest = weights_that_move(known(runs.outputs)[run, -1], known(runs.test_outputs)[run, -1])
        assert float(np.abs(W).max()) > 0.01
        np.testing.assert_allclose(rest, 0, atol=1e-12)


def test_adam_steps_the_weights() -> None:
    """Without noise and sampling: optax on the clipped gradients of the weights."""
    runs = stochastic_flow.ensemble(
        flow_of(), (F, F_TEST), learning_rate=0.1, steps=STEPS, outputs=True, key=KEY,
        optimizer=optimizers.Adam(),
    )  # fmt: skip
    adam, W = optax.adam(0.1), jnp.zeros((D + 1, K))
    state = adam.init(W)
    for _ in range(STEPS):
        updates, state = adam.update(jnp.asarray(clipped_descent(np.asarray(W), N)), state)
        W = W + updates
    np.testing.assert_allclose(known(runs.outputs)[-1], F + PHI @ W, atol=1e-12)
    np.testing.assert_allclose(known(runs.test_outputs)[-1], F_TEST + PHI_TEST @ W, atol=1e-12)


@pytest.mark.parametrize("rule", [ABADI, clipping.Batch(0.2)], ids=["abadi", "batch"])
@pytest.mark.parametrize("kind", ["of a fixed size", "cyclic"])
def test_a_batch_is_read_by_itself(rule: Any, kind: str, monkeypatch: Any) -> None:
    """One step: some five of the twelve samples, in a sum over n, times n over five."""
    drawn = batches.FixedSize(5) if kind == "of a fixed size" else batches.Cyclic(3)
    monkeypatch.setattr(HeadFlow, "velocity_and_norms", None)  # that of all samples
    runs = stochastic_flow.ensemble(
        flow_of(rule), (F, F_TEST), learning_rate=RATE, steps=1, batches=drawn, outputs=True,
        key=KEY,
    )  # fmt: skip
    W, rest = weights_that_move(known(runs.outputs)[-1], known(runs.test_outputs)[-1])
    np.testing.assert_allclose(rest, 0, atol=1e-12)
    a = softmax_gradient(np.asarray(F))
    norms = np.linalg.norm(PHI, axis=1) * np.linalg.norm(a, axis=1)
    size = round(drawn.share(N) * N)
    possible = []
    for chosen in map(list, itertools.combinations(range(N), size)):
        total = PHI[chosen].T @ a[chosen]
        factor = np.minimum(1, 0.5 / norms[chosen])
        if rule is not ABADI:
            factor = np.full(size, min(1, 0.2 / np.linalg.norm(total)))
        possible.append(-RATE / size * PHI[chosen].T @ (factor[:, None] * a[chosen]))
    assert min(float(np.abs(W - one).max()) for one in possible) < 1e-12


def test_runs_in_groups_are_the_same_and_tell_their_progress(monkeypatch: Any) -> None:
    """Seven runs, three at a time."""
    asked: Any = {
        "learning_rate": RATE, "steps": 4, "noise_multiplier": SIGMA, "sample_rate": 0.2,
        "outputs": True, "key": jax.random.split(KEY, 7),
    }  # fmt: skip
    together = stochastic_flow.ensemble(flow_of(), (F, F_TEST), **asked)
    monkeypatch.setattr(ensembles, "_OUTPUT_BYTES", 3 * (N + M) * K * 8)
    heard: list[float] = []
    in_groups = stochastic_flow.ensemble(flow_of(), (F, F_TEST), progress=heard.append, **asked)
    for one, other in zip(jax.tree.leaves(in_groups), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert heard == sorted(set(heard))
    assert {round(done * 12) for done in heard} == set(range(13))


def assert_noise_of_weights(W: np.ndarray, std: float) -> None:
    """Draws of weights (S, D, K): independent normal numbers of this deviation."""
    z = W.reshape(len(W), -1) / std
    for statistic, freedom in (
        (float((z**2).sum()), z.size),
        (float(len(z) * (z.mean(0) ** 2).sum()), z.shape[1]),
    ):
        assert 1e-3 < chi2.cdf(statistic, freedom) < 1 - 1e-3
    pairs = np.triu_indices(z.shape[1], 1)
    correlations = (z.T @ z)[pairs] ** 2 / len(z)
    assert 1e-3 < chi2.cdf(correlations.sum(), correlations.size) < 1 - 1e-3


def test_noise_is_that_of_the_weights() -> None:
    runs = stochastic_flow.ensemble(
        flow_of(), (F, F_TEST), learning_rate=RATE, steps=1, noise_multiplier=SIGMA,
        outputs=True, key=jax.random.split(KEY, 400),
    )  # fmt: skip
    drift = -RATE * clipped_descent(np.zeros((D + 1, K)), N)
    draws = [
        weights_that_move(f[-1], g[-1])[0] - drift
        for f, g in zip(known(runs.outputs), known(runs.test_outputs), strict=True)
    ]
    assert_noise_of_weights(np.stack(draws), RATE * SIGMA * 0.5 / N)


@pytest.mark.parametrize(
    "noise", [None, ntkdp.noise.Correlated.square_root(3)], ids=["independent", "correlated"]
)
def test_ends_of_many_cells(noise: Any) -> None:
    """Without gradients the weights add up the noise of all steps."""
    flow = flow_of(loss=Huber(1e-9), y=np.asarray(F), y_test=np.asarray(F_TEST))
    final = stochastic_flow.final_outputs(
        flow, (F, F_TEST), learning_rates=[RATE, 2 * RATE], clip_norms=[0.5, 1.0], steps=STEPS,
        noise_multipliers=SIGMA, noise=noise, key=jax.random.split(KEY, 300),
    )  # fmt: skip
    of_sum = np.sqrt(STEPS)
    if noise is not None:
        C = np.zeros((STEPS, STEPS))
        for k in range(STEPS):
            for j, value in enumerate(np.asarray(noise.strategy)[: k + 1]):
                C[k, k - j] = value
        of_sum = np.linalg.norm(np.linalg.inv(C).sum(0))
    for cell, scale in ((0, 1.0), (1, 4.0)):
        draws = []
        for f, g in zip(final.train[cell], known(final.test)[cell], strict=True):
            W, rest = weights_that_move(f, g)
            np.testing.assert_allclose(rest, 0, atol=1e-7)
            draws.append(W)
        assert_noise_of_weights(np.stack(draws), scale * RATE * SIGMA * 0.5 / N * of_sum)


@pytest.mark.parametrize("rank", [None, (D + 1) * K], ids=["whole", "in features"])
def test_moments_of_an_unclipped_regression(rank: int | None) -> None:
    """Squared loss, no clipping: the covariance of the weights has a recursion of its own."""
    y, y_test = normal(4, N, K), normal(5, M, K)
    flow = flow_of(clipping.Abadi(1e3), SQUARED, y, y_test)
    sigma = 2e-4
    found = stochastic_flow.moments(
        flow, (F, F_TEST), learning_rate=RATE, steps=STEPS, noise_multiplier=sigma, rank=rank,
        outputs=True,
    )  # fmt: skip
    W, V = np.zeros((D + 1, K)), np.zeros((D + 1, D + 1))
    A = np.eye(D + 1) - RATE * PHI.T @ PHI / N
    for k in range(STEPS + 1):
        a, a_test = F + PHI @ W - y, F_TEST + PHI_TEST @ W - y_test
        spread, spread_test = (np.sum((p @ V) * p, axis=1) for p in (PHI, PHI_TEST))
        loss = 0.5 * np.mean(np.sum(np.asarray(a) ** 2, 1) + K * spread)
        test_loss = 0.5 * np.mean(np.sum(np.asarray(a_test) ** 2, 1) + K * spread_test)
        np.testing.assert_allclose(found.loss[k], loss, rtol=1e-9)
        np.testing.assert_allclose(known(found.test_loss)[k], test_loss, rtol=1e-9)
        features = np.concatenate([PHI, PHI_TEST])
        np.testing.assert_allclose(
            known(found.covariance)[k], np.kron(features @ V @ features.T, np.eye(K)), atol=1e-11
        )
        W = W - RATE * PHI.T @ np.asarray(a) / N
        V = A @ V @ A.T + (RATE * sigma * 1e3 / N) ** 2 * np.eye(D + 1)


def test_parts_of_a_step() -> None:
    """Sums over samples, one by one, with the curvature of the softmax."""
    parts = advisor.decompose(flow_of(), (F, F_TEST), noise_multiplier=SIGMA, sample_rate=Q)
    a = softmax_gradient(np.asarray(F))
    factor = np.minimum(1, 0.5 / (np.linalg.norm(PHI, axis=1) * np.linalg.norm(a, axis=1)))
    for found, phi, f, y in (
        (parts.train, PHI, np.asarray(F), Y),
        (known(parts.test), PHI_TEST, np.asarray(F_TEST), Y_TEST),
    ):
        for j in range(len(phi)):
            p = np.exp(f[j]) / np.exp(f[j]).sum()
            bend, slope = np.diag(p) - np.outer(p, p), p - np.eye(K)[y[j]]
            v = [(phi[j] @ PHI[i]) * factor[i] * a[i] / N for i in range(N)]
            u = np.sum(v, axis=0)
            sampling = (1 - Q) / Q * sum(v_i @ bend @ v_i for v_i in v)
            privacy = (SIGMA * 0.5 / (Q * N)) ** 2 * np.trace(bend) * phi[j] @ phi[j]
            np.testing.assert_allclose(found.descent[j], slope @ u, rtol=1e-10)
            np.testing.assert_allclose(found.curvature[j], u @ bend @ u, rtol=1e-10)
            np.testing.assert_allclose(found.sampling[j], sampling, rtol=1e-10)
            np.testing.assert_allclose(found.privacy[j], privacy, rtol=1e-10)


def test_advice_and_the_largest_stable_rate() -> None:
    """Unclipped, that is 2 over the largest eigenvalue of the features' covariance."""
    y = np.asarray(F) + PHI @ np.asarray(normal(6, D + 1, K))
    flow = flow_of(clipping.NoClipping(), SQUARED, y, test=False)
    rate = advisor.largest_stable_learning_rate(flow, F, steps=2000)
    assert rate == pytest.approx(2 / np.linalg.eigvalsh(PHI.T @ PHI / N)[-1], rel=0.02)
    grid = advisor.predict(
        flow_of(), (F, F_TEST), learning_rates=[0.1, 1.0], clip_norms=[0.1, 1.0], steps=STEPS,
        noise_multiplier=SIGMA, key=KEY,
    )  # fmt: skip
    assert advisor.advise(grid, objective="loss").learning_rate == 1.0


def test_the_best_correlated_noise_does_not_depend_on_the_form_of_the_kernel() -> None:
    asked: Any = {
        "learning_rate": RATE, "steps": 6, "n_bands": 3, "batches": batches.Cyclic(3),
        "n_probes": 4,
    }  # fmt: skip
    found = [
        stochastic_flow.optimal_noise(
            ntkdp.KernelFlow(kernel, Y, SOFTMAX, ABADI), F, **asked
        ).strategy
        for kernel in (ntkdp.FeatureKernel(PHI), PHI @ PHI.T)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_predict_takes_the_features_and_says_so() -> None:
    params = MODEL.init(KEY, X)
    runs = ntkdp.predict(
        MODEL, params, (X, Y, X_TEST, Y_TEST), SOFTMAX, ABADI, learning_rate=RATE, steps=3,
        noise_multiplier=5.0, n_runs=4, outputs=True, key=KEY,
    )  # fmt: skip
    assert "linear in its weights" in runs.method
    moved = np.concatenate(
        [np.asarray(f[0] - f[0, :1]) for f in (known(runs.outputs), known(runs.test_outputs))], 1
    )[-1]
    features = np.concatenate([PHI, PHI_TEST])
    W, *_ = np.linalg.lstsq(features, moved, rcond=None)
    np.testing.assert_allclose(features @ W, moved, atol=1e-12)


def test_single_precision() -> None:
    x, f = X.astype(jnp.float32), F.astype(jnp.float32)
    kernel = ntkdp.linear_ntk(MODEL, x)
    runs = stochastic_flow.ensemble(
        ntkdp.KernelFlow(kernel, Y, SOFTMAX, ABADI), f, learning_rate=RATE, steps=2,
        noise_multiplier=SIGMA, outputs=True, key=KEY,
    )  # fmt: skip
    assert kernel.dtype == known(runs.outputs).dtype == runs.loss.dtype == jnp.float32


def test_kernels_that_do_not_fit_together() -> None:
    features = ntkdp.linear_ntk(MODEL, X)
    with pytest.raises(TypeError, match="test_kernel must be a FeatureKernel if kernel is one"):
        ntkdp.KernelFlow(features, Y, SOFTMAX, ABADI, test_kernel=jnp.ones((M, N)))
    with pytest.raises(ValueError, match="must have the features of kernel, 4, got 3"):
        ntkdp.KernelFlow(features, Y, SOFTMAX, ABADI, test_kernel=ntkdp.FeatureKernel(X_TEST, X))
    with pytest.raises(ValueError, match=r"noise_kernel must be of 17 points .* got shape \(12"):
        stochastic_flow.ensemble(
            flow_of(), (F, F_TEST), learning_rate=RATE, steps=1, noise_multiplier=SIGMA,
            noise_kernel=features, key=KEY,
        )  # fmt: skip
    with pytest.raises(ValueError, match="got 5 for a rank above"):
        stochastic_flow.ensemble(
            flow_of(), (F, F_TEST), learning_rate=RATE, steps=1, noise_multiplier=SIGMA,
            sharpness_aware=ntkdp.SharpnessAware(0.1, n_params=5), key=KEY,
        )  # fmt: skip
