"""Shifted predictions: exact without noise, and closer to noisy runs than the kernel alone."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known

import ntkdp
from ntkdp import clipping, losses
from ntkdp.stochastic_flow import ensemble, shifted

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)))
TEST_X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)))
Y, TEST_Y = jnp.arange(5) % 2, jnp.arange(3) % 2
PARAMS = [
    jnp.asarray(np.random.default_rng(2).standard_normal((4, 6))),
    jnp.asarray(np.random.default_rng(3).standard_normal((6, 2))),
]
LOSS, RULE = losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
STEPS: dict[str, Any] = {"learning_rate": 0.5, "steps": 20, "outputs": True}


def network(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p[0] / 2) @ p[1] / 6**0.5


def flow_and_start() -> tuple[ntkdp.KernelFlow, tuple[jax.Array, jax.Array], jax.Array]:
    points = jnp.concatenate([X, TEST_X])
    kernel = ntkdp.empirical_ntk(network, PARAMS, points)
    flow = ntkdp.KernelFlow(
        kernel[:5, :5], Y, LOSS, RULE, test_kernel=kernel[5:, :5], test_targets=TEST_Y
    )
    return flow, (network(PARAMS, X), network(PARAMS, TEST_X)), kernel


def observed(**options: Any) -> ntkdp.Trajectory:
    return ntkdp.dp_sgd.run(
        network, PARAMS, X, Y, LOSS, RULE, test_x=TEST_X, test_targets=TEST_Y, gradients="vmap",
        **(STEPS | {"key": jax.random.key(0)} | options),
    )  # fmt: skip


def test_without_noise_it_is_the_run_itself() -> None:
    flow, start, _ = flow_and_start()
    path = ntkdp.recursion(flow, start, **STEPS)
    run = observed()
    assert float(jnp.max(jnp.abs(path.loss - run.loss))) > 0.01
    moved = shifted(path, flow, predicted=path, observed=run)
    for name in ("loss", "test_loss", "accuracy", "test_accuracy", "outputs", "test_outputs"):
        np.testing.assert_allclose(getattr(moved, name), getattr(run, name), atol=1e-12)
    assert moved.setup == path.setup


@pytest.mark.slow
def test_it_is_closer_to_noisy_runs_than_the_kernel_alone() -> None:
    flow, start, kernel = flow_and_start()
    keys = jax.random.split(jax.random.key(1), 300)
    noise: dict[str, Any] = {"noise_multiplier": 0.15, "key": keys}
    frozen = ensemble(flow, start, noise_kernel=kernel, **STEPS, **noise)
    moved = shifted(
        frozen, flow, predicted=ntkdp.recursion(flow, start, **STEPS), observed=observed()
    )
    runs = observed(**noise)
    mean = runs.loss.mean(0)
    error_frozen = float(jnp.max(jnp.abs(frozen.loss.mean(0) - mean) / mean))
    error_moved = float(jnp.max(jnp.abs(moved.loss.mean(0) - mean) / mean))
    assert error_moved < 0.4 * error_frozen


def test_what_does_not_belong_together_is_refused() -> None:
    flow, start, _ = flow_and_start()
    path = ntkdp.recursion(flow, start, **STEPS)
    run = observed()
    with pytest.raises(ValueError, match=r"observed must have outputs, got none; .*outputs=True"):
        shifted(path, flow, predicted=path, observed=observed(outputs=False))
    short = ntkdp.recursion(flow, start, **(STEPS | {"steps": 10}))
    with pytest.raises(ValueError, match=r"predicted must be recorded at the times .* 11 times"):
        shifted(path, flow, predicted=short, observed=run)
    two = observed(key=jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"observed must be one run without noise, got 2 runs"):
        shifted(path, flow, predicted=path, observed=two)
    fewer = replace(run, outputs=known(run.outputs)[:, :3])
    with pytest.raises(ValueError, match=r"observed must have outputs of the same samples"):
        shifted(path, flow, predicted=path, observed=fewer)
