"""Noise relative to the weights' own variance."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkdp import models
from ntkdp._backend.neural_tangents import stax
from ntkdp.stochastic_flow import relative_weight_noise

X = jax.random.normal(jax.random.key(0), (3, 6))
KEY = jax.random.key(1)


def test_in_ntk_parameterisation_it_is_the_variance() -> None:
    model = models.mlp([8, 8], 2, activation="tanh", layer_norm=True)
    v = np.array([[0.1, 0.2, 0.3], [0.2, 0.1, 0.0]])
    found = relative_weight_noise(v, model, model.init(KEY, X), X)
    np.testing.assert_allclose(found, [0.3, 0.2], rtol=1e-12)


def test_in_standard_parameterisation_the_widest_layer_decides() -> None:
    options: Any = {"W_std": 1.3, "output_W_std": 0.5, "parameterization": "standard"}
    model = models.mlp([50], 2, **options)
    params = model.init(KEY, X)
    found = relative_weight_noise(0.01, model, params, X)
    np.testing.assert_allclose(found, 0.01 * 50 / 0.5**2, rtol=1e-12)
    # Of one variance for each layer, each counts for itself; biases do not.
    by_layer = relative_weight_noise([0.01, 0.0], model, params, X)
    np.testing.assert_allclose(by_layer, 0.01 * 6 / 1.3**2, rtol=1e-12)
    # In a residual block the own variance is that of the layer inside.
    residual = models.mlp([20, 20], 1, residual=True, **options)
    blocks = relative_weight_noise([0.0, 0.01, 0.0], residual, residual.init(KEY, X), X)
    np.testing.assert_allclose(blocks, 0.01 * 20 / 1.3**2, rtol=1e-12)


def test_of_unknown_layers_the_parameters_tell() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(nn.Dense(400)(x))
            return nn.Dense(2)(x)

    model = models.from_flax(Net())
    params: Any = model.init(KEY, X)
    squares = [np.mean(params[name]["kernel"] ** 2) for name in ("Dense_0", "Dense_1")]
    found = relative_weight_noise([0.0, 0.01], model, params, X)
    np.testing.assert_allclose(found, 0.01 / squares[1], rtol=1e-6)
    np.testing.assert_allclose(relative_weight_noise(0.01, model, params, X), found, rtol=1e-6)
    # Attention has no kernel between times, but weights.
    attention = models.serial(
        stax.Conv(4, (2, 2)), stax.GlobalSelfAttention(4, 4, 4, 1, linear_scaling=False),
        stax.Flatten(), stax.Dense(1),
    )  # fmt: skip
    images = jnp.ones((2, 3, 3, 2))
    relative = relative_weight_noise(0.1, attention, attention.init(KEY, images), images)
    assert 0.05 < float(relative) < 0.5


def test_what_does_not_fit_is_refused() -> None:
    model = models.mlp([8], 2)
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match="variance must be at least 0"):
        relative_weight_noise(-0.1, model, params, X)
    with pytest.raises(ValueError, match=r"one for each of the 2 groups, got shape \(3,\)"):
        relative_weight_noise([0.1, 0.1, 0.1], model, params, X)
    scale = models.from_function(lambda key, x: jnp.ones(3), lambda w, x: x[:, :3] * w)
    with pytest.raises(ValueError, match="an array of two axes or more that is not zero"):
        relative_weight_noise(0.1, scale, scale.init(KEY, X), X)
