"""Activations: their kernels against closed forms, quadrature and moments."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY

from ntkdp import models
from ntkdp._backend.neural_tangents import stax
from ntkdp.models import _activations

X = jax.random.normal(KEY, (4, 3))
#: Inputs that are nearly equal, and opposite, and zero.
CLOSE = jnp.concatenate([X, 1.0001 * X[:1], -X[:1], jnp.zeros((1, 3))])


def kernels(model: models.Model, x: Any = CLOSE) -> Any:
    assert model.kernel_fn is not None
    kernel_fn = model.kernel_fn

    @jax.jit
    def both(x: Any) -> Any:
        found = kernel_fn(x, None, ("nngp", "ntk"))
        return found.nngp, found.ntk

    return both(x)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "erf": jax.scipy.special.erf,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "sin": jnp.sin,
    "cos": jnp.cos,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_series_is_the_closed_form(name: str) -> None:
    for closed, series in zip(
        kernels(models.mlp([1, 1], 1, activation=name)),
        kernels(models.mlp([1, 1], 1, activation=FUNCTIONS[name])),
        strict=True,
    ):
        np.testing.assert_allclose(series, closed, rtol=1e-11, atol=1e-13)


def test_a_kink_keeps_digits_and_the_variances() -> None:
    # From opposite inputs to equal ones, at which the series is exact whatever the kink.
    for name, function in (("relu", jax.nn.relu), ("abs", jnp.abs)):
        closed, series = (kernels(models.mlp([1], 1, activation=a))[0] for a in (name, function))
        np.testing.assert_allclose(series, closed, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(np.diag(series), np.diag(closed), rtol=1e-3)


@pytest.mark.parametrize("name", ["tanh", "silu"])
def test_the_series_is_what_quadrature_tends_to(name: str) -> None:
    function = {"tanh": jnp.tanh, "silu": jax.nn.silu}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quadrature = stax.ElementwiseNumerical(function, deg=80)
    gain = _activations.unit_gain(name)
    layers = [stax.Dense(1, gain, 0.1), quadrature, stax.Dense(1, 1.0, 0.1)]
    for series, expected in zip(
        kernels(models.mlp([1], 1, activation=name), X / 3),
        kernels(models.serial(*layers), X / 3),
        strict=True,
    ):
        np.testing.assert_allclose(series, expected, rtol=1e-5)


@pytest.mark.parametrize("activation", [*_activations.NAMES, jnp.arctan])
def test_default_weights_keep_the_second_moment(activation: Any) -> None:
    # With unit inputs through a first layer of scale 1, each hidden activation has moment 1.
    unit = X * np.sqrt(3) / jnp.linalg.norm(X, axis=1, keepdims=True)
    gain = _activations.unit_gain(activation)
    layers = [stax.Dense(1), _activations.layer_of(activation), stax.Dense(1, gain)]
    np.testing.assert_allclose(np.diag(kernels(models.serial(*layers), unit)[0]), 1.0, rtol=1e-7)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "softplus", "elu", "leaky_relu"])
def test_outputs_of_wide_networks_have_the_covariance(name: str) -> None:
    model = models.mlp([4000], 200, activation=name)
    f = model.apply(model.init(KEY, X), X)
    np.testing.assert_allclose(f @ f.T / 200, kernels(model, X)[0], rtol=0.3, atol=0.15)


def test_gradients_of_kernels_are_finite() -> None:
    kernel_fn = models.mlp([1], 1, activation="tanh").kernel_fn
    assert kernel_fn is not None
    total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(kernel_fn(x, None, "ntk"))))
    slope, step = total(X)[1], 1e-5 * jnp.ones_like(X)
    rise = (total(X + step)[0] - total(X - step)[0]) / 2
    np.testing.assert_allclose(jnp.sum(slope * step), rise, rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        ("tahn", ValueError, "'tahn'; did you mean 'tanh'"),
        (lambda x: jnp.stack([x, x]), ValueError, "turn one number into one number"),
        (lambda x: x > 0, ValueError, "turn one number into one number"),
        (lambda x: 0 * x, ValueError, "not zero everywhere"),
        (lambda x: 1 / x, ValueError, "activation must be finite"),
    ],
)
def test_what_is_no_activation_is_refused(activation: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        models.mlp([2], 1, activation=activation)
