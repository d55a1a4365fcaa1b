r"""Activations by name or as functions, with their expectations at infinite width.

Where there is a closed form, it is neural-tangents'. For any other activation :math:`\varphi`,
Mehler's formula gives the two expectations of a layer,

.. math::
    E[\varphi(u) \varphi(v)] = \sum_k a_k(\sigma_u)\, a_k(\sigma_v)\, \rho^k, \qquad
    a_k(\sigma) = E[\varphi(\sigma z)\, h_k(z)],

with :math:`h_k` the normalised Hermite polynomials and :math:`\rho` the correlation, and the same
for :math:`\varphi'`. The coefficients are sums over a grid, once for each sample, so a pair costs
as many products as there are terms. What is left of the series is taken as two more terms, an even
and an odd one, which make it exact for :math:`\rho = \pm 1` (*derived*).
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import neural_tangents
from ntkdp._backend.types import Array, Float
from ntkdp._backend.validate import choice
from ntkdp.models._stax_types import StaxLayer, stax

#: An activation by name, or as a function of one number.
Activation: TypeAlias = str | Callable[[Array], Array]

#: Terms of the series, an even number, and the grid of its coefficients.
_TERMS, _REACH, _STEP = 128, 13.0, 1 / 16
#: A sum of squares that is left, below this share of the whole, is rounding.
_ROUNDING = 1e-14

#: Activations with a closed form: names and arguments of their layers, and E[phi(z)^2].
_CLOSED: dict[str, tuple[str, tuple[float, ...], float]] = {
    "relu": ("Relu", (), 1 / 2),
    "leaky_relu": ("LeakyRelu", (0.01,), (1 + 0.01**2) / 2),
    "abs": ("Abs", (), 1.0),
    "gelu": ("Gelu", (), 1 / 3 + 1 / (2 * math.sqrt(3) * math.pi)),
    "erf": ("Erf", (), 2 / math.pi * math.asin(2 / 3)),
    "sin": ("Sin", (), (1 - math.exp(-2)) / 2),
    "cos": ("Cos", (), (1 + math.exp(-2)) / 2),
    "identity": ("Identity", (), 1.0),
}
#: Activations whose kernels are sums of a series.
_BY_SERIES: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
}
#: What `activation` may be by name.
NAMES = (*_CLOSED, *_BY_SERIES)


def layer_of(activation: Activation) -> StaxLayer:
    """The layer of an activation."""
    if not isinstance(activation, str):
        return _by_series(_checked(activation))
    choice(NAMES, activation=activation)
    if activation in _BY_SERIES:
        return _by_series(_BY_SERIES[activation])
    name, arguments, _ = _CLOSED[activation]
    layer: StaxLayer = getattr(neural_tangents.stax, name)(*arguments)
    return layer


def unit_gain(activation: Activation) -> float:
    """The scale of weights that keeps the second moment 1: W_std^2 E[phi(z)^2] = 1."""
    if isinstance(activation, str) and choice(NAMES, activation=activation) in _CLOSED:
        return 1 / math.sqrt(_CLOSED[activation][2])
    function = _BY_SERIES[activation] if isinstance(activation, str) else _checked(activation)
    grid, table = _table()
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        squares = np.asarray(function(jnp.asarray(grid)), np.float64) ** 2
    second_moment = float(table[0] @ squares)
    if not 0 < second_moment < math.inf:
        raise ValueError(
            f"activation must be finite and not zero everywhere, got {activation!r} with the "
            f"second moment {second_moment}"
        )
    return 1 / math.sqrt(second_moment)


def _checked(function: object) -> Callable[[Array], Array]:
    """A function of one number."""
    if not callable(function):
        raise TypeError(
            f"activation must be one of {', '.join(NAMES)} or a function of one number, got "
            f"{function!r}"
        )
    one = jax.ShapeDtypeStruct((), jnp.result_type(float))
    value = jax.eval_shape(function, one)
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"activation must turn one number into one number, got {function!r}, which returns "
            f"{value}"
        )
    checked: Callable[[Array], Array] = function
    return checked


def _by_series(function: Callable[[Array], Array]) -> StaxLayer:
    """A layer that applies a function to each number, whose kernel is the sum of the series."""

    def expectation(covariance: Array, one: Array, other: Array) -> Array:
        return _expectation(function, covariance, one, other)

    def expectation_of_slopes(covariance: Array, one: Array, other: Array) -> Array:
        return _expectation(jax.vmap(jax.grad(function)), covariance, one, other)

    def elementwise(x: Array) -> Array:
        return function(x)

    return stax().Elementwise(elementwise, expectation, expectation_of_slopes)


def _expectation(
    function: Callable[[Array], Array], covariance: Array, one: Array, other: Array
) -> Array:
    """E f(u) f(v) of a pair; under ``vmap`` coefficients are computed once for each sample."""
    first, second = _coefficients(function, one), _coefficients(function, other)
    product = one * other
    usable = product > 0
    correlation = jnp.where(usable, covariance / jnp.sqrt(jnp.where(usable, product, 1.0)), 0.0)
    correlation = jnp.clip(correlation, -1.0, 1.0)

    def horner(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        a, b = pair
        return total * correlation + a * b, None

    total, _ = lax.scan(horner, jnp.zeros_like(correlation), (first, second), reverse=True)
    return total


def _coefficients(function: Callable[[Array], Array], variance: Array) -> Float[Array, " K"]:
    """Coefficients of ``function`` at a variance, and the roots of what they leave out."""
    grid, table = (jnp.asarray(part, variance.dtype) for part in _table())
    values = function(jnp.sqrt(variance) * grid)
    coefficients = table @ values
    even, odd = (values + values[::-1]) / 2, (values - values[::-1]) / 2
    left = [
        table[0] @ part**2 - jnp.sum(coefficients[parity::2] ** 2)
        for parity, part in enumerate((even, odd))
    ]
    rest = jnp.stack(left)
    usable = rest > _ROUNDING * (table[0] @ values**2)
    return jnp.append(coefficients, jnp.where(usable, jnp.sqrt(jnp.where(usable, rest, 1.0)), 0.0))


@cache
def _table() -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, "K M"]]:
    """A grid, and h_k times the weights of the grid's points under the standard normal."""
    half = round(_REACH / _STEP)
    grid = np.arange(-half, half + 1) * _STEP
    # h_k times the root of the density does not overflow, as h_k itself would.
    root = (2 * np.pi) ** -0.25 * np.exp(-(grid**2) / 4)
    rows = [root, grid * root]
    for k in range(1, _TERMS - 1):
        rows.append((grid * rows[-1] - math.sqrt(k) * rows[-2]) / math.sqrt(k + 1))
    return grid, _STEP * np.stack(rows) * root
