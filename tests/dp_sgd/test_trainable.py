"""Some layers train and others are constants, in runs and in kernels; parameters at the end."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, SQUARED, Gradients, known

import ntkdp
from ntkdp import clipping, dp_sgd, optimizers

X = jax.random.normal(jax.random.key(1), (6, 5))
Y = jax.random.normal(jax.random.key(2), (6, 2))
RULE = clipping.Abadi(0.5)
STEPS: dict[str, Any] = {"learning_rate": 0.25, "steps": 4, "key": KEY}


def network(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["hidden"]["W"] + params["hidden"]["b"])
    return hidden @ params["out"]["W"]


def start() -> Any:
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "hidden": {"W": jax.random.normal(keys[0], (5, 4)), "b": jax.random.normal(keys[1], (4,))},
        "out": {"W": jax.random.normal(keys[2], (4, 2))},
    }


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_a_run_of_the_head_is_a_run_of_a_linear_model(gradients: Gradients) -> None:
    """On the hidden features, clipped and noised as that model alone."""
    params = start()
    features = jnp.tanh(X @ params["hidden"]["W"] + params["hidden"]["b"])
    options = STEPS | {"noise_multiplier": 0.5, "keep_params": True, "gradients": gradients}
    run = dp_sgd.run(network, params, X, Y, SQUARED, RULE, trainable=["out"], **options)
    alone = dp_sgd.run(
        lambda p, x: x @ p["W"], params["out"], features, Y, SQUARED, RULE, **options
    )
    np.testing.assert_allclose(run.loss, alone.loss, rtol=1e-12)
    np.testing.assert_allclose(run.clip_fraction, alone.clip_fraction)
    np.testing.assert_allclose(known(run.params)["out"]["W"], known(alone.params)["W"], rtol=1e-12)
    np.testing.assert_array_equal(known(run.params)["hidden"]["W"], params["hidden"]["W"])
    phase = ntkdp.Phase(4, RULE, 0.25, 0.5, trainable=["out"])
    phases = dp_sgd.run_phases(network, params, X, Y, SQUARED, [phase], key=KEY)
    np.testing.assert_allclose(run.loss, phases.loss, rtol=1e-12)


def test_layers_that_are_not_there_are_named() -> None:
    for function in (
        partial(dp_sgd.run, network, start(), X, Y, SQUARED, RULE, **STEPS),
        partial(ntkdp.empirical_ntk, network, start(), X),
        partial(ntkdp.layerwise_ntk, network, start(), X),
    ):
        with pytest.raises(ValueError, match="unknown group 'head'; known: hidden, out"):
            function(trainable=["head"])
        with pytest.raises(TypeError, match="trainable must be a sequence of names of groups"):
            function(trainable="out")


def test_a_kernel_of_some_layers_is_the_sum_of_their_terms() -> None:
    params = start()
    layers = ntkdp.layerwise_ntk(network, params, X, X[:2])
    features = jnp.tanh(X @ params["hidden"]["W"] + params["hidden"]["b"])
    of_head = jnp.einsum("id,jd,kl->ijkl", features, features[:2], jnp.eye(2))
    head = ntkdp.empirical_ntk(network, params, X, X[:2], trainable=["out"])
    np.testing.assert_allclose(head, of_head, rtol=1e-12, atol=1e-12)
    for names in (["hidden"], ["out"], ["out", "hidden"]):
        found = ntkdp.layerwise_ntk(network, params, X, X[:2], trainable=names)
        expected = layers.select(names)
        assert found.names == expected.names
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-10, atol=1e-12)
        whole = ntkdp.empirical_ntk(network, params, X, X[:2], trainable=names)
        np.testing.assert_allclose(whole, expected.total, rtol=1e-10, atol=1e-12)
    own = {"hidden": {"W": "weights", "b": "biases"}, "out": "weights"}
    biases = ntkdp.layerwise_ntk(network, params, X, groups=own, trainable=["biases"])
    assert biases.names == ("biases",)


def test_the_run_of_the_head_is_predicted_by_its_kernel() -> None:
    params = start()
    run = dp_sgd.run(network, params, X, Y, SQUARED, RULE, trainable=["out"], **STEPS)
    kernel = ntkdp.empirical_ntk(network, params, X, trainable=["out"])
    flow = ntkdp.KernelFlow(kernel, Y, SQUARED, RULE)
    predicted = ntkdp.recursion(flow, network(params, X), learning_rate=0.25, steps=4)
    assert ntkdp.compare(predicted, run).sup_relative_error < 1e-12


def test_parameters_are_those_of_the_last_loss(tmp_path: Path) -> None:
    params = start()
    options = STEPS | {"noise_multiplier": 0.5, "keep_params": True}
    run = dp_sgd.run(network, params, X, Y, SQUARED, RULE, **options)

    def loss(end: Any) -> Any:
        return 0.5 * jnp.sum((network(end, X) - Y) ** 2, axis=1).mean()

    np.testing.assert_allclose(loss(run.params), run.loss[-1], rtol=1e-12)
    averaged = dp_sgd.run(
        network, params, X, Y, SQUARED, RULE, optimizer=optimizers.SGD(average=0.5), **options
    )
    np.testing.assert_allclose(loss(averaged.params), averaged.loss[-1], rtol=1e-12)
    seeds = options | {"key": jax.random.split(KEY, 3)}
    several = dp_sgd.run(network, params, X, Y, SQUARED, RULE, **seeds)
    np.testing.assert_allclose(jax.vmap(loss)(several.params), several.loss[:, -1], rtol=1e-12)
    plain = dp_sgd.run(network, params, X, Y, SQUARED, RULE, **STEPS)
    assert plain.params is None
    # Without noise and clipping they are those of optax.
    free = dp_sgd.run(
        network, params, X, Y, SQUARED, clipping.NoClipping(), keep_params=True, **STEPS
    )
    sgd = optax.sgd(0.25)
    weights, state = params, sgd.init(params)
    for _ in range(4):
        updates, state = sgd.update(jax.grad(loss)(weights), state)
        weights = optax.apply_updates(weights, updates)
    for one, other in zip(jax.tree.leaves(free.params), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    # Files hold what has times.
    run.save(tmp_path / "run.nc")
    loaded = ntkdp.Trajectory.load(tmp_path / "run.nc")
    assert loaded.params is None
    assert loaded.then(loaded).params is None
    assert run.then(run).params is run.params


def test_what_has_no_times_does_not_disturb_a_comparison() -> None:
    options = STEPS | {"keep_params": True, "individual": True}
    run = dp_sgd.run(network, start(), X, Y, SQUARED, RULE, **options)
    plain = dataclasses.replace(run, params=None, sensitivities=None)
    assert ntkdp.compare(run, plain).sup_relative_error == 0.0
    assert ntkdp.compare(run, plain).predicted.params is run.params
