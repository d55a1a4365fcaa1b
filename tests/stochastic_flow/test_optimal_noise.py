"""Noise that adds least to the final loss of a predicted run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, SOFTMAX, SQUARED, linear, normal
from sklearn.datasets import load_wine

import ntkdp
from ntkdp.batches import Cyclic, Full
from ntkdp.noise import Correlated, Independent, Noise
from ntkdp.stochastic_flow import optimal_noise


def test_it_is_the_strategy_of_the_kernel_for_a_squared_loss() -> None:
    x = normal(0, 6, 4)
    flow = ntkdp.KernelFlow(x @ x.T, jnp.ones((6, 2)), SQUARED, ntkdp.clipping.Abadi(100.0))
    options: dict[str, Any] = {"learning_rate": 0.3, "steps": 30, "n_bands": 6}
    options["batches"] = Cyclic(10)
    path = optimal_noise(flow, jnp.zeros((6, 2)), n_probes=500, **options)
    kernel = Correlated.optimal(x @ x.T, **options)
    np.testing.assert_allclose(path.strategy, kernel.strategy, atol=0.01)
    full = optimal_noise(flow, jnp.zeros((6, 2)), **(options | {"batches": Full()}))
    np.testing.assert_allclose(full.strategy, np.eye(6)[0], atol=1e-6)


def test_linearised_steps_against_whole_jacobians() -> None:
    """Clipped, softmax, with momentum and a schedule, in plain steps written here."""
    n, K, steps, R = 5, 3, 12, 0.8
    x, labels = normal(1, n, 4), jnp.arange(n) % K
    kernel, start = x @ x.T, normal(2, n, K)
    rate = optax.linear_schedule(1.0, 0.2, steps)

    def last(noise: jax.Array) -> jax.Array:
        f, momentum = start, jnp.zeros((n, K))
        for k in range(steps):
            a = jax.nn.softmax(f) - jax.nn.one_hot(labels, K)
            norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(x, axis=1)
            clipped = a * jnp.minimum(1, R / norms)[:, None]
            momentum = 0.5 * momentum + kernel @ clipped / n + noise[k]
            f = f - rate(k) * momentum
        return f

    none = jnp.zeros((steps, n, K))
    moved = np.asarray(jax.jacobian(last)(none))
    p = np.asarray(jax.nn.softmax(last(none)))
    second = np.einsum("nk,kl->nkl", p, np.eye(K)) - p[:, :, None] * p[:, None]
    exact = np.einsum("nij,nitak,ab,njubk->tu", second, moved, kernel, moved, optimize=True)
    squares, directions = np.linalg.eigh(exact)
    rows = np.sqrt(np.maximum(squares, 0))[:, None] * directions.T
    expected = Correlated.optimal_for_rows(rows, n_bands=4, batches=Cyclic(4))

    flow = ntkdp.KernelFlow(kernel, labels, SOFTMAX, ntkdp.clipping.Abadi(R))
    found = optimal_noise(
        flow,
        start,
        learning_rate=rate,
        steps=steps,
        n_bands=4,
        batches=Cyclic(4),
        optimizer=ntkdp.optimizers.SGD(0.5),
        n_probes=1000,
    )
    np.testing.assert_allclose(found.strategy, expected.strategy, atol=0.01)


def test_what_it_refuses() -> None:
    rule = ntkdp.clipping.Abadi(1.0)
    options: dict[str, Any] = {"learning_rate": 0.1, "steps": 4, "n_bands": 2}
    tested = ntkdp.KernelFlow(
        jnp.eye(2), jnp.zeros((2, 1)), SQUARED, rule, test_kernel=jnp.ones((1, 2)),
        test_targets=jnp.zeros((1, 1)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"flow must have no test_kernel"):
        optimal_noise(tested, jnp.zeros((2, 1)), batches=Full(), **options)
    flow = ntkdp.KernelFlow(jnp.eye(2), jnp.zeros((2, 1)), SQUARED, rule)
    with pytest.raises(ValueError, match=r"batches must be Full, Cyclic or Shuffled"):
        optimal_noise(flow, jnp.zeros((2, 1)), batches=ntkdp.batches.FixedSize(1), **options)
    with pytest.raises(ValueError, match=r"n_probes must be at least 1, got 0"):
        optimal_noise(flow, jnp.zeros((2, 1)), batches=Full(), n_probes=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("R", [0.3, 1.0])
def test_no_strategy_trains_a_clipped_classifier_better(R: float) -> None:
    """On wine with softmax, where a kernel with one scale does not know that training slows."""
    x, labels = load_wine(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1) / np.sqrt(14)
    chosen = np.random.default_rng(0).permutation(len(x))[:168]
    x, labels = x[chosen], labels[chosen]
    rule, start = ntkdp.clipping.Abadi(R), jnp.zeros((len(x), 3))
    flow = ntkdp.KernelFlow(x @ x.T, labels, SOFTMAX, rule)
    path = optimal_noise(flow, start, learning_rate=4.0, steps=60, n_bands=12, batches=Cyclic(12))
    kinds: dict[str, Noise] = {
        "independent": Independent(),
        "square root": Correlated.square_root(12),
        "sums": Correlated.optimal_for_sums(steps=60, n_bands=12, batches=Cyclic(12)),
    }
    losses = {}
    for name, noise in (kinds | {"path": path}).items():
        run = ntkdp.dp_sgd.run(
            linear, jnp.zeros((14, 3)), x, labels, SOFTMAX, rule, learning_rate=4.0, steps=60,
            batches=Cyclic(12), noise=noise, noise_multiplier=ntkdp.privacy.Budget(8.0, 1e-5),
            record_every=60, key=jax.random.split(KEY, 200),
        )  # fmt: skip
        losses[name] = np.asarray(run.loss[:, -1])
    for name in kinds:
        difference = losses["path"] - losses[name]
        errors = np.mean(difference) / np.std(difference, ddof=1) * np.sqrt(len(difference))
        assert errors < 2.58
    assert losses["path"].mean() < 0.9 * losses["independent"].mean()
