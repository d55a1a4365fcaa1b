"""Runs of infinitely wide networks by momentum, weight decay and averages."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SQUARED

import ntkdp
from ntkdp import clipping, dp_sgd, models
from ntkdp.claims._instances import stored
from ntkdp.noise import Independent
from ntkdp.optimizers import SGD, Adam
from ntkdp.stochastic_flow import TwoTimeFlow, two_time_ensemble
from ntkdp.stochastic_flow._two_time import weight_path

X = jax.random.normal(jax.random.key(0), (5, 4))
Y = jnp.sin(X[:, :2])
START = jnp.cos(X[:, :2])
ERF = models.mlp([8], 2, activation="erf")

OPTIMIZERS = {
    "plain": SGD(),
    "heavy ball": SGD(momentum=0.8),
    "decay": SGD(weight_decay=0.5, average=0.9),
    "all": SGD(momentum=0.7, nesterov=True, weight_decay=0.3, average=0.8),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_law_between_nodes_is_that_of_all_steps(name: str) -> None:
    # Plain linear algebra over all steps at once, without recursions.
    steps, per_cell = 18, 5
    path = weight_path.path_of(
        OPTIMIZERS[name], lambda k: 0.3 / (1 + 0.1 * k), steps, Independent()
    )
    at = np.minimum(per_cell * np.arange(steps // per_cell + 2), steps)
    nodes, rest_path = weight_path.nodes_of(path, at), weight_path.rest_of(path, at)

    def read(matrices: Any, pushes: Any) -> Any:
        """What the readers have, at every step, of the white noise of every step."""
        states = np.zeros((steps + 1, pushes.shape[1], steps))
        for k in range(steps):
            states[k + 1] = matrices[k] @ states[k]
            states[k + 1, :, k] = pushes[k]
        return states[:, list(path.readers)]

    everywhere = read(path.filter.matrices, path.filter.drives)
    on_nodes = np.swapaxes(everywhere[at], 0, 1).reshape(-1, steps)
    covariance = on_nodes @ on_nodes.T
    np.testing.assert_allclose(nodes.covariance, covariance, rtol=1e-10, atol=1e-14)
    rest = everywhere - nodes.weights @ on_nodes
    scale = np.max(covariance)
    # What is left is independent of the nodes, and has the law of the rest.
    assert np.max(np.abs(rest @ on_nodes.T)) < 1e-5 * scale
    flat, drawn = (part.reshape(-1, steps) for part in (rest, read(*rest_path)))
    np.testing.assert_allclose(drawn @ drawn.T, flat @ flat.T, atol=1e-5 * scale)
    assert np.max(np.diag(flat @ flat.T)) > 1e-3 * scale
    # Initial weights without noise are read off the nodes too.
    state = np.zeros(path.filter.size)
    state[list(path.readers)] = 1.0
    for k in range(steps):
        np.testing.assert_allclose(
            nodes.weights[k] @ nodes.kept, state[list(path.readers)], rtol=1e-4
        )
        state = path.filter.matrices[k] @ state


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(momentum=0.8),
        SGD(average=0.9),
        SGD(momentum=0.8, nesterov=True, average=0.7),
    ],
)
def test_without_noise_runs_are_steps_of_the_kernel(optimizer: SGD) -> None:
    rule = clipping.Abadi(0.5)
    options: Any = {
        "learning_rate": lambda k: 0.8 / (1 + 0.1 * k), "steps": 13, "record_every": 3,
        "outputs": True, "optimizer": optimizer,
    }  # fmt: skip
    flow = ntkdp.KernelFlow(ntkdp.infinite_ntk(ERF, X), Y, SQUARED, rule)
    expected = ntkdp.recursion(flow, START, **options)
    found = two_time_ensemble(
        TwoTimeFlow(ERF, X, Y, SQUARED, rule), START, nodes=4, key=jax.random.key(0), **options
    )
    for name in ("times", "loss", "outputs", "clip_fraction"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12, err_msg=name
        )
    assert ntkdp.compare(found, expected).sup_relative_error < 1e-10


def _moments(theta: Any, optimizer: SGD, rate: float, steps: int, deviation: float) -> Any:
    """Mean and covariance of what a linear model is measured at, step by step."""
    n, (beta, decay) = len(theta), (float(v) for v in (optimizer.momentum, optimizer.weight_decay))
    average = 0.0 if optimizer.average is None else float(optimizer.average)
    start, targets = np.asarray(START[:, 0]), np.asarray(Y[:, 0])
    one, none = np.eye(n), np.zeros((n, n))
    # Outputs, momentum and average after a step, from those before it, targets and noise.
    gradient = np.hstack([theta / n + decay * one, none, none])
    momentum = gradient + np.hstack([none, beta * one, none])
    step = gradient + beta * momentum if optimizer.nesterov else momentum
    moved = -rate * (1 + beta if optimizer.nesterov else 1)
    outputs = np.hstack([one, none, none]) - rate * step
    averages = average * np.hstack([none, none, one]) + (1 - average) * outputs
    matrix = np.vstack([outputs, momentum, averages])
    spread = np.vstack([moved * one, one, (1 - average) * moved * one])
    push = -spread @ theta @ targets / n
    mean, covariance = np.concatenate([start, 0 * start, start]), np.zeros((3 * n, 3 * n))
    found = []
    for _ in range(steps):
        mean = matrix @ mean + push
        covariance = matrix @ covariance @ matrix.T + deviation**2 * spread @ theta @ spread.T
        found.append((mean[2 * n :], covariance[2 * n :, 2 * n :]))
    return [np.stack(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        pytest.param("heavy ball", 4, marks=pytest.mark.slow),
        ("all", 4),
        pytest.param("decay", 4, marks=pytest.mark.slow),
        pytest.param("all", None, marks=pytest.mark.slow),
    ],
)
def test_a_linear_model_has_the_moments_of_the_linear_recursion(
    name: str, nodes: int | None
) -> None:
    # Coarse nodes are exact as well: outputs are linear in the weights' noise.
    optimizer, n_runs, rate, steps = OPTIMIZERS[name], 4000, 0.3, 12
    model = models.mlp([], 1, b_std=0.3)
    flow = TwoTimeFlow(model, X, Y[:, :1], SQUARED, clipping.Abadi(1e3))
    runs = two_time_ensemble(
        flow, START[:, :1], learning_rate=rate, steps=steps, noise_multiplier=0.4 / 1e3 * len(X),
        optimizer=optimizer, nodes=nodes, outputs=True,
        key=jax.random.split(jax.random.key(2), n_runs),
    )  # fmt: skip
    means, covariances = _moments(np.asarray(X @ X.T / 4 + 0.09), optimizer, rate, steps, 0.4)
    assert runs.outputs is not None
    f = np.asarray(runs.outputs)[:, 1:, :, 0]
    variances = np.diagonal(covariances, axis1=1, axis2=2)
    z = (f.mean(0) - means) / np.sqrt(variances / n_runs)
    assert np.max(np.abs(z)) < 4.5
    assert np.max(np.abs(f.var(0) / variances - 1)) < 4.5 * np.sqrt(2 / n_runs)


def test_weight_decay_moves_the_kernels_without_noise() -> None:
    # A clipping norm next to nothing: outputs are those of the initial weights, shrunk.
    rate, decay, steps = 0.5, 0.4, 4
    flow = TwoTimeFlow(ERF, X, Y, SQUARED, clipping.Abadi(1e-12))
    runs = two_time_ensemble(
        flow, learning_rate=rate, steps=steps, optimizer=SGD(weight_decay=decay), outputs=True,
        key=jax.random.split(jax.random.key(3), 4000),
    )  # fmt: skip
    assert runs.outputs is not None
    f = np.asarray(runs.outputs)[..., 0]
    kept = (1 - rate * decay) ** steps
    for later, share in ((steps, kept), (0, 1.0)):
        limit = ntkdp.two_time_kernel(
            ERF, X, variance1=0.0, variance2=0.0, kept1=kept, kept2=share
        ).nngp
        found = f[:, steps].T @ f[:, later] / len(f)
        assert np.max(np.abs(found - limit)) < 5 * np.max(limit) * np.sqrt(2 / len(f))


def test_optax_by_name_is_the_same_optimizer() -> None:
    flow = TwoTimeFlow(ERF, X, Y, SQUARED, clipping.Abadi(0.5))
    options: Any = {
        "learning_rate": 0.2, "steps": 3, "noise_multiplier": 0.5, "key": jax.random.key(0)
    }  # fmt: skip
    ours, theirs = (
        two_time_ensemble(flow, START, optimizer=optimizer, **options).loss
        for optimizer in (SGD(momentum=0.5), partial(optax.sgd, momentum=0.5))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_linear_or_not_followed_is_refused() -> None:
    flow, frozen = (
        TwoTimeFlow(ERF, X, Y, SQUARED, clipping.Abadi(0.5), frozen=frozen)
        for frozen in (False, True)
    )
    options: Any = {"learning_rate": 0.2, "steps": 3, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"optimizer must be linear.*got Adam"):
        two_time_ensemble(flow, optimizer=Adam(), **options)
    with pytest.raises(ValueError, match=r"flow must not be frozen with weight decay"):
        two_time_ensemble(frozen, optimizer=SGD(weight_decay=0.1), **options)


WIDE: dict[str, tuple[SGD, float, float, dict[str, Any]]] = {
    "heavy ball": (SGD(momentum=0.9), 0.04, 4.55, {}),
    "nesterov, decay": (
        SGD(momentum=0.9, nesterov=True, weight_decay=0.05), 0.04, 6.63, {},
    ),
    "average": (SGD(momentum=0.8, average=0.9), 0.08, 4.23, {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_wide_networks_train_as_predicted(name: str) -> None:
    """Runs of DP-SGD from random weights, v(T) about 0.6, in means over runs."""
    optimizer, rate, sigma, network = WIDE[name]
    model, rule = models.mlp([128, 128], 1, **network), clipping.Abadi(1.0)
    problem = (stored("c38_x"), stored("c38_y")[:, None], SQUARED, rule)
    options: Any = {
        "learning_rate": rate, "steps": 60, "noise_multiplier": sigma, "optimizer": optimizer,
        "record_every": 5,
    }  # fmt: skip

    def run(key: Any) -> Any:
        of_network, of_run = jax.random.split(key)
        params = model.init(of_network, problem[0])
        return dp_sgd.run(model.apply, params, *problem, key=of_run, **options).loss

    observed = jax.jit(partial(jax.lax.map, run, batch_size=10))(
        jax.random.split(jax.random.key(38), 200)
    )
    predicted = two_time_ensemble(
        TwoTimeFlow(model, *problem), key=jax.random.split(jax.random.key(1), 2000), **options
    ).loss
    assert np.max(np.abs(ntkdp.comparison.standardised_error(predicted, observed))) < 3
