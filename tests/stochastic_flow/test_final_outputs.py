"""A whole grid of cells at once: what the single predictions end with, noise and divergence too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known

import ntkdp
from ntkdp import clipping, losses
from ntkdp.stochastic_flow import ensemble, final_outputs

N, M, K, P = 5, 3, 2, 9
RATES, NORMS = jnp.array([0.3, 1.0, 60.0]), jnp.array([0.4, 3.0, 50.0])
STEPS = 12


def linear_problem(by_group: bool = False) -> tuple[Any, Any, Any]:
    """Kernels of all points of a linear model with full K x K blocks, targets and outputs."""
    features = jax.random.normal(jax.random.key(0), (N + M, K, P)) / np.sqrt(P)
    parts = jnp.split(features, [4], axis=2) if by_group else [features]
    terms = jnp.stack([jnp.einsum("ikp,jlp->ijkl", part, part) for part in parts])
    kernel = ntkdp.LayerwiseKernel(("a", "b"), terms) if by_group else terms[0]
    outputs = jax.random.normal(jax.random.key(1), (N + M, K))
    return kernel, jnp.arange(N) % K, outputs


def rows(kernel: Any, which: slice) -> Any:
    if isinstance(kernel, ntkdp.LayerwiseKernel):
        return ntkdp.LayerwiseKernel(kernel.names, kernel.values[:, which, :N])
    return kernel[which, :N]


def flow_of(kernel: Any, targets: Any, rule: Any) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(
        rows(kernel, slice(N)),
        targets,
        losses.SoftmaxCrossEntropy(),
        rule,
        test_kernel=rows(kernel, slice(N, None)),
    )


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
@pytest.mark.parametrize("rule", [clipping.Abadi, clipping.Automatic, clipping.Batch])
def test_each_cell_is_the_recursion_of_its_own(rule: Any, scope: Any) -> None:
    kernel, targets, outputs = linear_problem(scope == "layerwise")
    initial = (outputs[:N], outputs[N:])
    found = final_outputs(
        flow_of(kernel, targets, rule(1.0, scope=scope)),
        initial,
        learning_rates=RATES,
        clip_norms=NORMS,
        steps=STEPS,
    )
    for cell, (rate, norm) in enumerate(zip(RATES, NORMS, strict=True)):
        path = ntkdp.recursion(
            flow_of(kernel, targets, rule(float(norm), scope=scope)),
            initial,
            learning_rate=rate,
            steps=STEPS,
            outputs=True,
        )
        np.testing.assert_allclose(found.train[cell], known(path.outputs)[-1], rtol=1e-10)
        np.testing.assert_allclose(
            known(found.test)[cell], known(path.test_outputs)[-1], rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
def test_noise_has_the_law_of_the_weights(scope: Any) -> None:
    """Where the gradient is zero the outputs are those of noisy weights: J J^T times their v."""
    kernel, _, _ = linear_problem(scope == "layerwise")
    flow = ntkdp.KernelFlow(
        rows(kernel, slice(N)),
        jnp.zeros((N, K)),
        losses.Custom(lambda f, y: 0.0 * jnp.sum(f * y)),
        clipping.Abadi(1.0, scope=scope),
        test_kernel=rows(kernel, slice(N, None)),
    )
    sigmas = jnp.array([0.0, 0.7, 1.4])
    found = final_outputs(
        flow,
        (jnp.zeros((N, K)), jnp.zeros((M, K))),
        learning_rates=RATES,
        clip_norms=NORMS,
        noise_multipliers=sigmas,
        steps=STEPS,
        noise_kernel=kernel,
        key=jax.random.split(jax.random.key(3), 4000),
    )
    whole = kernel.total if scope == "layerwise" else kernel
    covariance = jnp.transpose(whole, (0, 2, 1, 3)).reshape((N + M) * K, -1)
    n_groups = 2 if scope == "layerwise" else 1
    for cell, sigma in enumerate(sigmas):
        drawn = jnp.concatenate([found.train[cell], known(found.test)[cell]], axis=1)
        drawn = drawn.reshape(4000, -1)
        v = STEPS * n_groups * (RATES[cell] * sigma * NORMS[cell] / N) ** 2
        measured = drawn.T @ drawn / 4000
        spread = jnp.sqrt(
            (covariance**2 + jnp.outer(jnp.diag(covariance), jnp.diag(covariance))) / 4000
        )
        # 256 entries, symmetric: four and a half standard errors are crossed by none in 1000.
        np.testing.assert_array_less(jnp.abs(measured - v * covariance), 4.5 * v * spread + 1e-12)


def test_noisy_clipped_runs_have_the_law_of_the_ensemble() -> None:
    kernel, targets, outputs = linear_problem()
    initial = (outputs[:N], outputs[N:])
    flow = flow_of(kernel, targets, clipping.Abadi(0.4))
    draws: dict[str, Any] = {"noise_kernel": kernel, "sample_rate": 0.6}
    found = final_outputs(
        flow,
        initial,
        learning_rates=[0.5],
        clip_norms=0.4,
        noise_multipliers=0.8,
        steps=STEPS,
        key=jax.random.split(jax.random.key(5), 3000),
        **draws,
    )
    path = ensemble(
        flow,
        initial,
        learning_rate=0.5,
        noise_multiplier=0.8,
        steps=STEPS,
        record_every=STEPS,
        outputs=True,
        key=jax.random.split(jax.random.key(6), 3000),
        **draws,
    )
    for mine, theirs in (
        (found.train[0], known(path.outputs)[:, -1]),
        (known(found.test)[0], known(path.test_outputs)[:, -1]),
    ):
        error = jnp.sqrt((jnp.var(mine, 0) + jnp.var(theirs, 0)) / 3000)
        difference = jnp.abs(jnp.mean(mine, 0) - jnp.mean(theirs, 0))
        np.testing.assert_array_less(difference, 4 * error)
        ratio = jnp.var(mine, 0) / jnp.var(theirs, 0)
        # A variance of 3000 draws has a relative error of sqrt(2 / 3000), the ratio root two more.
        np.testing.assert_array_less(jnp.abs(jnp.log(ratio)), 4 * np.sqrt(4 / 3000))


@pytest.mark.parametrize("noisy", [False, True])
def test_fully_clipped_cells_depend_on_the_product_alone(noisy: bool) -> None:
    """Claim C11: rows of the map repeat along its anti-diagonals."""
    kernel, targets, outputs = linear_problem()
    found = final_outputs(
        flow_of(kernel, targets, clipping.Abadi(1.0)),
        (outputs[:N], outputs[N:]),
        learning_rates=[8.0, 4.0, 1.0, 0.1],
        clip_norms=[1e-4, 2e-4, 8e-4, 8e-3],
        noise_multipliers=0.5 if noisy else 0.0,
        noise_kernel=kernel,
        steps=STEPS,
        key=jax.random.key(0),
    )
    assert float(jnp.max(jnp.abs(found.train[0] - outputs[:N]))) > 1e-4
    for part in map(np.asarray, found):
        np.testing.assert_allclose(part[1:], np.broadcast_to(part[0], part[1:].shape), rtol=1e-12)


def test_float32_and_a_kernel_that_means_the_identity() -> None:
    x = jax.random.normal(jax.random.key(0), (N + M, 4))
    kernel = x @ x.T
    targets, outputs = jnp.arange(N) % K, jnp.zeros((N + M, K))
    found = {}
    for dtype in (jnp.float32, jnp.float64):
        cast = kernel.astype(dtype)
        found[dtype] = final_outputs(
            flow_of(cast, targets, clipping.Abadi(1.0)),
            (outputs[:N].astype(dtype), outputs[N:].astype(dtype)),
            learning_rates=0.5,
            clip_norms=[0.2, 20.0],
            noise_multipliers=0.0,
            steps=STEPS,
        )
        assert known(found[dtype].test).dtype == dtype
        noisy = ensemble(
            flow_of(cast, targets, clipping.Abadi(1.0)),
            (outputs[:N].astype(dtype), outputs[N:].astype(dtype)),
            learning_rate=0.5,
            steps=2,
            noise_multiplier=1.0,
            noise_kernel=cast,
            outputs=True,
            key=jax.random.key(0),
        )
        assert known(noisy.outputs).dtype == dtype
    whole = kernel[:, :, None, None] * jnp.eye(K)
    full = final_outputs(
        flow_of(whole, targets, clipping.Abadi(1.0)),
        (outputs[:N], outputs[N:]),
        learning_rates=0.5,
        clip_norms=[0.2, 20.0],
        steps=STEPS,
    )
    np.testing.assert_allclose(known(found[jnp.float64].test), known(full.test), rtol=1e-12)
    np.testing.assert_allclose(
        known(found[jnp.float32].test), known(full.test), rtol=2e-5, atol=1e-5
    )


def test_divergence_is_seen() -> None:
    flow = ntkdp.KernelFlow(
        jnp.eye(1), jnp.zeros((1, 1)), losses.SquaredError(), clipping.Abadi(1.0), reduction="sum"
    )
    found = final_outputs(
        flow, jnp.ones((1, 1)), learning_rates=[0.5, 3.0], clip_norms=1e300, steps=300
    )
    assert float(jnp.abs(found.train[0, 0, 0])) < 1e-12
    np.testing.assert_allclose(found.train[1], [[2.0**300]], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": [0.1, 0.2], "clip_norms": [1.0, 2.0, 3.0]}, "one shape"),
        ({"learning_rates": [[0.1]]}, "one shape"),
        ({"learning_rates": []}, "one shape"),
        ({"learning_rates": [0.1, -0.2]}, "learning_rates must be positive"),
        ({"clip_norms": 0.0}, "clip_norms must be positive"),
        ({"noise_multipliers": -1.0}, "noise_multipliers must be at least 0"),
        ({"noise_multipliers": 1.0, "key": None}, "key must be given"),
        ({"sample_rate": 0.5, "key": None}, "key must be given"),
        ({"noise_multipliers": 1.0, "noise_kernel": None}, "noise_kernel must be"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    kernel, targets, outputs = linear_problem()
    options: dict[str, Any] = {
        "learning_rates": 0.1,
        "clip_norms": 1.0,
        "steps": 2,
        "noise_kernel": kernel,
        "key": jax.random.key(0),
    }
    flow = flow_of(kernel, targets, clipping.Abadi(1.0))
    with pytest.raises(ValueError, match=message):
        final_outputs(flow, (outputs[:N], outputs[N:]), **(options | change))


@pytest.mark.parametrize(
    ("rule", "sigma", "message"),
    [(clipping.NoClipping(), 0.0, "got NoClipping"), (clipping.Batch(1.0), 1.0, "Batch")],
)
def test_rules_that_cannot_be_swept(rule: Any, sigma: float, message: str) -> None:
    kernel, targets, outputs = linear_problem()
    with pytest.raises(ValueError, match=message):
        final_outputs(
            flow_of(kernel, targets, rule),
            (outputs[:N], outputs[N:]),
            learning_rates=0.1,
            clip_norms=1.0,
            noise_multipliers=sigma,
            noise_kernel=kernel,
            steps=2,
            key=jax.random.key(0),
        )
