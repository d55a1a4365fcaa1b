"""The filter of a linear optimizer, held to optax itself and to formulas for Gaussians."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntkdp.noise import BufferedToeplitz, Correlated, Noise
from ntkdp.stochastic_flow._linear_filter import (
    bridge,
    interpolation,
    linear_filter,
    mixed,
    pinned,
)

STEPS = 24
NODES = np.array([0, 7, 15, 24])
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "steps": optax.sgd,
    "heavy ball": functools.partial(optax.sgd, momentum=0.9),
    "Nesterov": functools.partial(optax.sgd, momentum=0.7, nesterov=True),
    "average of gradients": lambda rate: optax.chain(
        optax.ema(0.9, debias=True), optax.scale_by_learning_rate(rate)
    ),
    "decay": lambda rate: optax.chain(
        optax.add_decayed_weights(0.3), optax.scale_by_learning_rate(rate)
    ),
}


def impulse_responses(optimizer: Callable[..., optax.GradientTransformation]) -> np.ndarray:
    """Positions ``(STEPS + 1, STEPS)`` after a gradient of one at each step, by optax."""
    transformation = optimizer(optax.cosine_decay_schedule(0.3, STEPS + 4))
    position = jnp.zeros(STEPS)
    state, positions = transformation.init(position), [position]
    for k in range(STEPS):
        updates, state = transformation.update(jnp.eye(STEPS)[k], state, position)
        position = position + updates
        positions.append(position)
    return np.stack(positions)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_covariances_are_those_of_the_impulse_responses(name: str) -> None:
    filter = linear_filter(OPTIMIZERS[name], optax.cosine_decay_schedule(0.3, STEPS + 4), STEPS)
    responses = impulse_responses(OPTIMIZERS[name])
    covariance = responses @ responses.T
    scale = covariance.max()
    np.testing.assert_allclose(
        filter.position_covariance(NODES), covariance[:, NODES], atol=1e-6 * scale
    )
    # Given the nodes: the formulas for a Gaussian, with the start, which is known, left out.
    known = NODES[1:]
    solved = np.linalg.solve(covariance[np.ix_(known, known)], covariance[known]).T
    np.testing.assert_allclose(interpolation(filter, NODES)[:, 1:], solved, atol=1e-5)
    left = covariance - solved @ covariance[known]
    gains, deviations = bridge(filter, NODES)
    state = np.zeros((filter.size, STEPS))
    positions = [state[0]]
    for k in range(STEPS):
        noise = -gains[k] @ state
        noise[k] += deviations[k]
        state = filter.matrices[k] @ state + np.outer(filter.drives[k], noise)
        positions.append(state[0])
    paths = np.stack(positions)
    np.testing.assert_allclose(paths @ paths.T, left, atol=2e-5 * scale)


def test_an_optimizer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer must be linear"):
        linear_filter(optax.adam, 0.1, 3)


@pytest.mark.parametrize(
    "noise",
    [
        Correlated([2.0, 0.5, 0.25]),
        Correlated(np.eye(STEPS) + 0.3 * np.tril(np.ones((STEPS, STEPS)), -1)),
        Correlated(np.eye(STEPS + 2) + 0.4 * np.eye(STEPS + 2, k=-2)),
        BufferedToeplitz([0.9, 0.3], [0.2, 0.3]),
    ],
    ids=["Toeplitz", "matrix", "banded matrix", "buffered"],
)
def test_correlated_noise_has_the_covariance_of_its_mixing(noise: Noise) -> None:
    filter = linear_filter(OPTIMIZERS["heavy ball"], optax.cosine_decay_schedule(0.3, 28), STEPS)
    of_noise = mixed(filter, noise.recursion(STEPS))
    rows = impulse_responses(OPTIMIZERS["heavy ball"]) @ noise.mixing(STEPS)
    covariance = rows @ rows.T
    scale = covariance.max()
    np.testing.assert_allclose(
        of_noise.position_covariance(NODES), covariance[:, NODES], atol=1e-6 * scale
    )
    known = NODES[1:]
    solved = np.linalg.solve(covariance[np.ix_(known, known)], covariance[known]).T
    rest = pinned(of_noise, NODES)
    states = np.zeros((STEPS + 1, of_noise.size, STEPS))
    for k in range(STEPS):
        states[k + 1] = rest.matrices[k] @ states[k]
        states[k + 1, :, k] = rest.drives[k]
    left = covariance - solved @ covariance[known]
    np.testing.assert_allclose(states[:, 0] @ states[:, 0].T, left, atol=1e-5 * scale)
