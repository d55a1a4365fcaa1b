"""Responses: exact for linear models and without noise, and close to runs of networks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import known

import ntkdp
from ntkdp import clipping, losses, optimizers
from ntkdp.clipping import ClippingRule
from ntkdp.dp_sgd import run
from ntkdp.stochastic_flow import ResponseFlow, response_ensemble
from ntkdp.stochastic_flow._response import noise_free_path

N, M, D, K = 6, 4, 5, 3
KEYS = jax.random.split(jax.random.key(1), 4)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


X, TEST_X = draw(N, D), draw(M, D, seed=1)
Y, TEST_Y = jnp.arange(N) % K, jnp.arange(M) % K
LINEAR = {"body": draw(D, K, seed=2) / 3, "head": draw(K, seed=3) / 3}
NETWORK = [draw(D, 8, seed=4) / 2, draw(8, K, seed=5) / 3]


def linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["body"] + p["head"]


def network(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p[0]) @ p[1]


def decayed(learning_rate: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(0.1),
        optax.trace(0.8, nesterov=True),
        optax.scale_by_learning_rate(learning_rate),
    )


AVERAGE = optimizers.SGD(momentum=0.5, average=0.8)
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation] | None] = {
    "steps": None,
    "heavy ball": functools.partial(optax.sgd, momentum=0.9),
    "Nesterov with decay": decayed,
    "average": AVERAGE,
}


def both(
    apply_fn: Any, params: Any, rule: ClippingRule, about: Any = "path", **options: Any
) -> tuple[ntkdp.Trajectory, ntkdp.Trajectory]:
    """A prediction of the very runs, and the runs, with test samples and outputs."""
    loss = losses.SoftmaxCrossEntropy()
    data: dict[str, Any] = {"test_x": TEST_X, "test_targets": TEST_Y}
    flow = ResponseFlow(apply_fn, params, X, Y, loss, rule, **data)
    own: dict[str, Any] = {
        name: options.pop(name) for name in ("nodes", "draws") if name in options
    }
    settings: dict[str, Any] = {"learning_rate": 0.3, "steps": 12, "outputs": True, "key": KEYS}
    settings |= options
    predicted = response_ensemble(flow, about=about, noise_at="steps", **own, **settings)
    settings.pop("noise_per_group", None)
    observed = run(apply_fn, params, X, Y, loss, rule, gradients="vmap", **data, **settings)
    return predicted, observed


@pytest.mark.parametrize(
    ("optimizer", "about"),
    [
        pytest.param("steps", "path", marks=pytest.mark.slow),
        ("heavy ball", "start"),
        pytest.param("Nesterov with decay", "path", marks=pytest.mark.slow),
        pytest.param("average", "path", marks=pytest.mark.slow),
    ],
)
def test_a_linear_model_is_predicted_run_by_run(optimizer: str, about: str) -> None:
    predicted, observed = both(
        linear,
        LINEAR,
        clipping.Abadi((0.3, 0.5), scope="layerwise"),
        about,
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=optax.cosine_decay_schedule(0.4, 12),
        noise_multiplier=0.7,
        sample_rate=0.6,
        nodes=4,
        draws=1,
        record_every=5,
    )
    np.testing.assert_allclose(predicted.times, observed.times)
    np.testing.assert_array_equal(predicted.steps, observed.steps)
    for name in ("outputs", "test_outputs", "loss", "test_loss", "accuracy"):
        np.testing.assert_allclose(
            getattr(predicted, name), getattr(observed, name), rtol=1e-9, atol=1e-10, err_msg=name
        )


@pytest.mark.slow
def test_a_path_on_other_data_leaves_a_linear_model_exact() -> None:
    public = ResponseFlow(
        linear, LINEAR, draw(7, D, seed=8), jnp.zeros(7, int), losses.SoftmaxCrossEntropy(),
        clipping.Abadi(0.2),
    )  # fmt: skip
    predicted, observed = both(
        linear, LINEAR, clipping.Automatic(1.0), public, noise_multiplier=0.7, nodes=3, draws=1
    )
    np.testing.assert_allclose(
        known(predicted.outputs), known(observed.outputs), rtol=1e-9, atol=1e-10
    )


@pytest.mark.slow
def test_without_noise_any_network_is_predicted() -> None:
    predicted, observed = both(
        network, NETWORK, clipping.Abadi(0.5), optimizer=OPTIMIZERS["heavy ball"], nodes=3
    )
    np.testing.assert_allclose(
        known(predicted.outputs), known(observed.outputs), rtol=1e-9, atol=1e-10
    )
    np.testing.assert_allclose(predicted.clip_fraction, observed.clip_fraction)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optimizers.Adam(eps=1e-3), marks=pytest.mark.slow),
        optimizers.Adam(correct_noise=True, floor=1e-2),
    ],
)
def test_adam_is_predicted_run_by_run(optimizer: optimizers.Adam) -> None:
    """Without noise exactly; with noise that dominates, next to how far it moves the outputs."""
    still, real = both(
        network, NETWORK, clipping.Abadi(0.5), optimizer=optimizer, learning_rate=0.02, nodes=13
    )
    assert still.outputs is not None
    assert real.outputs is not None
    np.testing.assert_allclose(still.outputs, real.outputs, rtol=1e-7, atol=1e-9)
    predicted, observed = both(
        network, NETWORK, clipping.Abadi(0.5), optimizer=optimizer, learning_rate=0.02,
        noise_multiplier=2.0, nodes=13, draws=1,
    )  # fmt: skip
    assert predicted.outputs is not None
    assert observed.outputs is not None
    left = jnp.sqrt(jnp.mean((predicted.outputs - observed.outputs) ** 2))
    moved = jnp.sqrt(jnp.mean((observed.outputs - still.outputs) ** 2))
    assert left < 0.02 * moved


@pytest.mark.slow
def test_a_network_is_predicted_run_by_run() -> None:
    """What is left out is of second order in the noise, but for a small part."""
    shares = []
    for sigma in (1.6, 0.2):
        # Every step is a node, so that no kernel is interpolated.
        predicted, observed = both(
            network, NETWORK, clipping.Abadi(0.5), noise_multiplier=sigma, nodes=13, draws=1
        )
        left = jnp.max(jnp.abs(known(predicted.outputs) - known(observed.outputs)))
        seen = known(observed.outputs)
        moved = jnp.max(jnp.abs(seen - jnp.mean(seen, axis=0)))
        shares.append(float(left / moved))
    assert shares[0] < 0.06
    assert shares[1] < 0.012


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["steps", "Nesterov with decay"])
def test_noise_at_nodes_has_the_law_of_the_runs(optimizer: str) -> None:
    """Mean, spread and the correlation between times of a linear model, 600 runs each."""
    loss, rule = losses.SquaredError(), clipping.Abadi(0.5)
    targets = draw(N, K, seed=9)
    options: dict[str, Any] = {
        "learning_rate": 0.5,
        "steps": 12,
        "noise_multiplier": 1.0,
        "sample_rate": 0.5,
        "optimizer": OPTIMIZERS[optimizer],
    }
    flow = ResponseFlow(linear, LINEAR, X, targets, loss, rule)
    drawn = jax.random.split(jax.random.key(3), 600)
    predicted = response_ensemble(flow, nodes=3, draws=1, key=drawn, **options).loss
    drawn = jax.random.split(jax.random.key(4), 600)
    observed = run(linear, LINEAR, X, targets, loss, rule, key=drawn, **options).loss
    deviation = np.std(observed, axis=0)[1:] / 600**0.5
    difference = (np.mean(predicted, axis=0) - np.mean(observed, axis=0))[1:]
    assert np.max(np.abs(difference) / deviation / 2**0.5) < 3.5
    np.testing.assert_allclose(np.std(predicted, 0)[1:], np.std(observed, 0)[1:], rtol=0.15)
    # Between neighbouring times, inside a cell and across a node.
    steps = [np.std(np.diff(path, axis=1), axis=0) for path in (predicted, observed)]
    one, other = steps
    np.testing.assert_allclose(one, other, rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("own_noise", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_noise_under_a_flat_loss_is_a_random_walk(
    mutate: Any, own_noise: bool, momentum: float
) -> None:
    """Outputs have the variance s^2 tr H times the sum over m = 1 ... k of ((1 - b^m) / (1 - b))^2.

    As for many outputs, the steps of a block may share what is drawn between the nodes: then it is
    right where the block ends.
    """
    from ntkdp.stochastic_flow._response import schedule

    mutate(schedule, "_OWN_NOISE", 512 if own_noise else 0)
    flow = ResponseFlow(linear, LINEAR, X, Y, lambda f, y: 0.0 * f[0], clipping.Abadi(0.5))
    path = response_ensemble(
        flow,
        learning_rate=0.125,
        steps=48,
        noise_multiplier=2.0,
        optimizer=optimizers.SGD(momentum),
        nodes=3,
        draws=1,
        outputs=True,
        key=jax.random.split(jax.random.key(3), 8000),
    )
    trace = float(jnp.einsum("iikk->", ntkdp.empirical_ntk(linear, LINEAR, X)))
    reached = (1 - momentum ** np.arange(1, 49)) / (1 - momentum)
    walk = np.cumsum(reached**2) * (0.125 * 2.0 * 0.5 / N) ** 2 * trace
    ratio = np.asarray(known(path.outputs)).var(0).sum((1, 2))[1:] / walk
    places, filled = schedule._grid(noise_free_path.place_nodes(0.125 * np.arange(49), 3), 48)
    ends = np.where(filled, places, 0).max(axis=2)[filled.any(axis=2)]
    right = ratio if own_noise else ratio[ends[ends < 48]]
    np.testing.assert_allclose(right, 1.0, atol=0.025)
    if not own_noise:
        # Inside a block the noise is on its way, and most of it is missing where it is least.
        assert 0.1 < ratio[0] < 0.9
        assert ratio[0] < ratio[1] < 1
        assert ratio.max() < 1.025


def test_few_draws_and_few_nodes_are_told() -> None:
    flow = ResponseFlow(
        network, NETWORK, 3 * X, Y, losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
    )
    options: dict[str, Any] = {"steps": 12, "key": KEYS[0]}
    with (
        pytest.warns(UserWarning, match="draws=2; use more draws"),
        pytest.warns(UserWarning, match="nodes=13 times"),
    ):
        single = response_ensemble(
            flow, learning_rate=0.3, noise_multiplier=8.0, draws=2, nodes=13, **options
        )
    # One key gives one run, without an axis of seeds.
    assert single.loss.shape == (13,)
    assert jnp.all(jnp.isfinite(single.loss))
    with pytest.warns(UserWarning, match="nodes=3 times"):
        response_ensemble(flow, learning_rate=10.0, noise_multiplier=1e-3, nodes=3, **options)


def test_optimizers_that_are_not_linear_are_refused() -> None:
    flow = ResponseFlow(network, NETWORK, X, Y, losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0))
    with pytest.raises(ValueError, match="optimizer must be linear in the gradients"):
        response_ensemble(flow, learning_rate=0.1, steps=2, optimizer=optax.lion, key=KEYS[0])
    with pytest.raises(ValueError, match="clipping must treat each sample by itself"):
        ResponseFlow(network, NETWORK, X, Y, losses.SoftmaxCrossEntropy(), clipping.Batch(1.0))


@pytest.mark.parametrize("steps", [2, 6, 12, 1000])
@pytest.mark.parametrize("rests", [False, True])
def test_nodes_are_steps_of_their_own_and_closer_at_the_beginning(steps: int, rests: bool) -> None:
    """Also if the learning rate is zero from half of the steps on."""
    rates = np.where(rests & (np.arange(steps) >= steps / 2), 0.0, 0.1)
    times = np.concatenate([[0.0], np.cumsum(rates)])
    places = noise_free_path.place_nodes(times, 7)
    assert (places[0], places[-1], len(places)) == (0, steps, min(7, steps + 1))
    lengths = np.diff(places)
    assert lengths.min() > 0
    if steps == 1000:
        assert lengths[0] < 0.5 * lengths[4]
