"""Clipping norms by group: against closed forms, and in runs of DP-SGD."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import ntkdp
from ntkdp import advisor, dp_sgd, losses, stochastic_flow
from ntkdp.clipping import Abadi


def one_sample(kernels: list[float], norms: list[float]) -> ntkdp.KernelFlow:
    """An output that each group moves by its clipping norm times the root of its kernel."""
    names = tuple(str(number) for number in range(len(kernels)))
    kernel = ntkdp.LayerwiseKernel(names, jnp.asarray(kernels)[:, None, None])
    rule = Abadi(jnp.asarray(norms), scope="layerwise")
    return ntkdp.KernelFlow(kernel, jnp.zeros((1, 1)), losses.SquaredError(), rule)


def test_shares_of_clipped_groups_are_those_of_their_kernels() -> None:
    """Steps fall by the sum of root h_r R_r, which is most at R_r in proportion to root h_r."""
    kernels, start = [9.0, 0.0, 16.0], 100.0
    flow = one_sample(kernels, [1.0, 2.0, 2.0])
    found = advisor.allocate_clip_norms(flow, jnp.full((1, 1), start), learning_rate=0.1, steps=10)
    np.testing.assert_allclose(found.clip_norms[[0, 2]] / 3, [0.6, 0.8], rtol=1e-4)
    # One of no use keeps the least that a rule can have.
    assert found.clip_norms[1] <= 2e-3 * 3
    assert math.hypot(*found.clip_norms) == pytest.approx(3, rel=1e-12)
    assert found.loss == pytest.approx((start - 15) ** 2 / 2, rel=1e-5)
    assert found.equal_loss == pytest.approx((start - 7 * 3**0.5) ** 2 / 2, rel=1e-12)


def test_groups_that_are_alike_share_equally() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 3))
    kernel = ntkdp.LayerwiseKernel(("one", "other"), jnp.stack([x @ x.T] * 2))
    rule = Abadi(jnp.array([0.2, 0.6]), scope="layerwise")
    flow = ntkdp.KernelFlow(kernel, x[:, :1] - 0.5, losses.SquaredError(), rule)
    found = advisor.allocate_clip_norms(
        flow, jnp.zeros((8, 1)), learning_rate=0.3, steps=8, noise_multiplier=1.0,
        batches=ntkdp.batches.FixedSize(4), key=jax.random.split(jax.random.key(1), 16),
    )  # fmt: skip
    np.testing.assert_allclose(found.clip_norms, math.sqrt(0.2), rtol=2e-2)
    assert found.loss <= found.equal_loss


def test_noise_by_group_is_weighed_against_what_the_group_does() -> None:
    """A clipped output falls by eta sum root h_r R_r, with variance 2 (eta sigma R_r)^2 h_r."""
    kernels, start, steps, rate, sigma, n_runs = np.array([1.0, 16.0]), 60.0, 4, 0.25, 6.5, 5_000

    def law(angle: float) -> tuple[float, float]:
        norms = np.array([math.cos(angle), math.sin(angle)])
        mean = start - rate * steps * float(np.sqrt(kernels) @ norms)
        return mean, steps * (rate * sigma) ** 2 * 2 * float(kernels @ norms**2)

    def loss(angle: float) -> float:
        mean, variance = law(angle)
        return (mean**2 + variance) / 2

    best = optimize.minimize_scalar(loss, bounds=(0, math.pi / 2), method="bounded")
    found = advisor.allocate_clip_norms(
        one_sample([1.0, 16.0], [0.6, 0.8]), jnp.full((1, 1), start), learning_rate=rate,
        steps=steps, noise_multiplier=sigma, noise_per_group=True,
        key=jax.random.split(jax.random.key(0), n_runs),
    )  # fmt: skip
    # Noise moves the best norms away from those without it, past equal ones.
    assert found.clip_norms[1] == pytest.approx(math.sin(best.x), rel=0.05)
    assert math.sin(best.x) < 0.9 * math.sqrt(0.5)
    mean, variance = law(best.x)
    assert mean > 4 * math.sqrt(variance)
    error = mean * math.sqrt(variance / n_runs)
    assert found.loss == pytest.approx(best.fun, abs=3 * error)
    assert found.equal_loss == pytest.approx(loss(math.pi / 4), abs=3 * error)


X = jax.random.normal(jax.random.key(0), (40, 5)) * jnp.array([1.0, 1.0, 0.3, 0.3, 0.3])
Y = jnp.sign(X[:, :1] + 0.3 * X[:, 2:3])
PARAMS = {"body": jnp.zeros((2, 1)), "head": jnp.zeros((3, 1))}


def model(params: Any, x: Any) -> Any:
    return x[:, :2] @ params["body"] + x[:, 2:] @ params["head"]


def with_norms(flow: Any, norms: Any) -> Any:
    return eqx.tree_at(lambda flow: flow.clipping.R, flow, jnp.asarray(norms))


@pytest.mark.slow
@pytest.mark.parametrize("per_group", [False, True])
def test_runs_gain_what_is_predicted(per_group: bool) -> None:
    """Mean losses of 400 runs of a linear model by both splits, within three standard errors."""
    rule = Abadi(jnp.array([0.5, 0.5]), scope="layerwise")
    problem = (Y, losses.SquaredError())
    flow = ntkdp.KernelFlow(ntkdp.layerwise_ntk(model, PARAMS, X), *problem, rule)
    asked: dict[str, Any] = {
        "learning_rate": 0.5, "steps": 20, "noise_multiplier": 2.0, "noise_per_group": per_group,
        "batches": ntkdp.batches.FixedSize(20),
    }  # fmt: skip
    one, other = jax.random.split(jax.random.key(1), (2, 400))
    found = advisor.allocate_clip_norms(flow, model(PARAMS, X), key=one, **asked)
    equal = np.full(2, 0.5)
    predicted, seen = [], []
    for norms in (equal, found.clip_norms):
        ruled = Abadi(norms, scope="layerwise")
        drawn = stochastic_flow.ensemble(
            with_norms(flow, norms), model(PARAMS, X), key=one, **asked
        )
        runs = dp_sgd.run(model, PARAMS, X, *problem, ruled, key=other, **asked)
        predicted.append(np.asarray(drawn.loss)[:, -1])
        seen.append(np.asarray(runs.loss)[:, -1])
    losses_of_both = (found.equal_loss, found.loss)
    if not per_group:  # Noise by group is drawn by group here, and together by the ensemble.
        np.testing.assert_allclose(np.mean(predicted, axis=1), losses_of_both, rtol=1e-9)
    gain, expected = seen[0] - seen[1], predicted[0] - predicted[1]
    error = math.sqrt(gain.var() / 400 + expected.var() / 400)
    assert gain.mean() > 3 * error
    assert abs(gain.mean() - (found.equal_loss - found.loss)) < 3 * error


@pytest.mark.slow
def test_a_linear_model_needs_no_kernel() -> None:
    """The search by weights finds the norms of the search by outputs, which draws other numbers."""
    rule = Abadi(jnp.array([0.3, 0.6]), scope="layerwise")
    problem = (Y, losses.SquaredError(), rule)
    asked: dict[str, Any] = {
        "learning_rate": 0.5, "steps": 10, "noise_multiplier": 2.0, "noise_per_group": True,
        "sample_rate": 0.5, "optimizer": ntkdp.optimizers.SGD(momentum=0.3),
        "key": jax.random.split(jax.random.key(1), 400),
    }  # fmt: skip
    by_outputs = advisor.allocate_clip_norms(
        ntkdp.KernelFlow(ntkdp.layerwise_ntk(model, PARAMS, X), *problem), model(PARAMS, X), **asked
    )
    by_weights = advisor.allocate_clip_norms(
        ntkdp.LinearisedFlow(model, PARAMS, X, *problem), PARAMS, **asked
    )
    np.testing.assert_allclose(by_weights.clip_norms, by_outputs.clip_norms, rtol=0.05)
    assert by_weights.loss == pytest.approx(by_outputs.loss, rel=0.05)


@pytest.mark.slow
def test_the_loss_of_the_test_points_may_be_asked_for() -> None:
    """A group that helps in training alone loses its share."""
    train, test = jnp.array([[1.0, 1.0], [-1.0, 1.0]]), jnp.array([[1.0, -1.0]])
    parts = [jnp.outer(train[:, k], train[:, k]) for k in range(2)]
    across = [jnp.outer(test[:, k], train[:, k]) for k in range(2)]
    names = ("shared", "own")
    flow = ntkdp.KernelFlow(
        ntkdp.LayerwiseKernel(names, jnp.stack(parts)), 9 * train.sum(1, keepdims=True),
        losses.SquaredError(), Abadi(1.0, scope="layerwise"),
        test_kernel=ntkdp.LayerwiseKernel(names, jnp.stack(across)), test_targets=9 * test[:, :1],
    )  # fmt: skip
    start = jnp.zeros((2, 1)), jnp.zeros((1, 1))
    asked: dict[str, Any] = {"learning_rate": 0.1, "steps": 5}
    of_test = advisor.allocate_clip_norms(flow, start, test=True, **asked)
    of_train = advisor.allocate_clip_norms(flow, start, **asked)
    assert of_test.clip_norms[0] > of_train.clip_norms[0]
    assert of_test.loss <= of_test.equal_loss


def test_what_cannot_be_shared_is_refused() -> None:
    flat = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), losses.SquaredError(), Abadi(1.0))
    for flow, message in (
        (flat, r"flow must have layerwise clipping.*got Abadi with scope='flat'"),
        (one_sample([1.0], [1.0]), "flow must have two groups or more, got one"),
    ):
        with pytest.raises(ValueError, match=message):
            advisor.allocate_clip_norms(flow, jnp.ones((1, 1)), learning_rate=0.1, steps=2)
    two = one_sample([1.0, 1.0], [1.0, 1.0])
    asked: dict[str, Any] = {"learning_rate": 0.1, "steps": 2}
    with pytest.raises(ValueError, match="key must be given with noise or sampling"):
        advisor.allocate_clip_norms(two, jnp.ones((1, 1)), noise_multiplier=1.0, **asked)
    unstable = one_sample([1.0, 1.0], [1e200, 1e200])
    with pytest.raises(ValueError, match=r"learning_rate must be stable with equal norms.* is inf"):
        advisor.allocate_clip_norms(unstable, jnp.full((1, 1), 1e150), learning_rate=1e9, steps=2)
    with pytest.raises(ValueError, match="test=True needs a flow with test targets"):
        advisor.allocate_clip_norms(two, jnp.ones((1, 1)), test=True, **asked)
