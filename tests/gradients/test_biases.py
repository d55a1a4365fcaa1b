"""Biases that share the cotangent of a product, and those that only look as if they did."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import lax

from ntkdp._gradients import per_sample

X = normal(9, 3, 4)


class Case(NamedTuple):
    """A model, its parameters, and how many of these are biases of a product."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: list[jax.Array]
    biases: int


W, V, B, C = normal(0, 4, 5), normal(1, 5, 2), normal(2, 5), normal(3, 2)


def residual(p: Any, x: jax.Array) -> jax.Array:
    """The product is read before the bias is added to it, too."""
    z = x @ p[0]
    return jnp.tanh(z) @ p[1] + (z + p[2]) @ p[1]


def called_twice(p: Any, x: jax.Array) -> jax.Array:
    """A program that is called on a product that is read again."""
    z = x @ p[0]
    return jax.jit(lambda z, b: jnp.tanh(z + b))(z, p[2]) @ p[1] + z @ p[1]


CASES = {
    "two layers": Case(lambda p, x: jnp.tanh(x @ p[0] + p[2]) @ p[1] + p[3], [W, V, B, C], 2),
    "numbers": Case(
        lambda p, x: 0.3 * -(jnp.tanh(x @ p[0] / 2 - -0.1 * p[2]) @ p[1]) + 0.7 * p[3],
        [W, V, B, C],
        1,
    ),
    "scaled both": Case(lambda p, x: 3 * (x @ p[0]) / 7 + -0.1 * p[1], [W, B], 1),
    "times zero": Case(lambda p, x: 0 * (x @ p[0]) + p[1], [W, B], 0),
    "times next to nothing": Case(lambda p, x: 1e-30 * (x @ p[0]) + p[1], [W, B], 0),
    "divided by 500": Case(lambda p, x: (x @ p[0]) / 500 + p[1], [W, B], 1),
    "weights first": Case(
        lambda p, x: jnp.tanh((p[0].T @ x.T).T + p[2][None]) @ p[1], [W, V, B], 1
    ),
    "matrix as bias": Case(lambda p, x: x @ p[0] + p[1], [W, normal(4, 1, 5)], 1),
    "in a program": Case(
        lambda p, x: jax.checkpoint(lambda p, x: jnp.tanh(x @ p[0] + p[2]))(p, x) @ p[1],
        [W, V, B],
        1,
    ),
    "one output": Case(lambda p, x: x @ p[0] + p[1], [normal(0, 4, 1), normal(1, 1)], 1),
    "weights twice": Case(
        lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[0] + p[2],
        [normal(0, 4, 4), normal(1, 4), normal(2, 4)],
        2,
    ),
    "product read again": Case(residual, [W, V, B], 0),
    "product read after a call": Case(called_twice, [W, V, B], 0),
    "product squared": Case(lambda p, x: (x @ p[0]) ** 2 + p[1], [W, B], 0),
    "bias twice": Case(
        lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[1][:2],
        [W, B, V],
        0,
    ),
    "bias of two layers": Case(
        lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2] + p[1],
        [normal(0, 4, 4), normal(1, 4), normal(2, 4, 4)],
        0,
    ),
    "part of a bias": Case(lambda p, x: x @ p[0] + p[1][1:6], [W, normal(1, 7)], 0),
    "one number": Case(lambda p, x: x @ p[0] + p[1], [W, normal(1, 1)], 0),
    "scaled by an array": Case(lambda p, x: jnp.arange(5.0) * (x @ p[0]) + p[1], [W, B], 0),
    "scaled by data": Case(lambda p, x: x[:, :1] * (x @ p[0]) + p[1], [W, B], 0),
    "two axes out": Case(
        lambda p, x: jnp.einsum("ni,ihk->nkh", x, p[0]).reshape(len(x), -1) + p[1],
        [normal(0, 4, 2, 3), normal(1, 6)],
        0,
    ),
    "positions": Case(
        lambda p, x: jnp.sum(jnp.tanh(x.reshape(len(x), 2, 2) @ p[0] + p[1]), axis=1),
        [normal(0, 2, 5), B],
        0,
    ),
    "weight used as it is": Case(lambda p, x: x @ p[0] + jnp.sum(p[0]) + p[1], [W, B], 0),
    "scan": Case(
        lambda p, x: lax.scan(lambda h, at: (jnp.tanh(h @ at[0] + at[1]), None), x, p)[0],
        [normal(0, 2, 4, 4), normal(1, 2, 4)],
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_biases_have_the_gradients_that_plain_jacobians_have(name: str) -> None:
    """Norms, weighted sums and kernels of all leaves."""
    apply, params, count = CASES[name]
    structure = per_sample.trace(apply, params, X)
    assert len(structure.biases) == count

    @jax.jit
    def all_of_it(params: Any) -> Any:
        _, factors = per_sample.factored(structure, params, X, lambda f: jnp.ones_like(f)[None])
        rows = per_sample.factored_for_kernel(structure, params, X)
        n = len(factors)
        norms = per_sample.grouped_norms(
            [per_sample.for_norms(factor) for factor in factors], tuple(range(n)), n, len(X)
        )
        sums = [
            per_sample.weighted_sum(factor, jnp.arange(1.0, 4.0), leaf)
            for factor, leaf in zip(factors, params, strict=True)
        ]
        kernels = [jnp.asarray(per_sample.kernel(row, row)) for row in rows]
        return norms, sums, kernels, jax.jacrev(apply)(params, X)

    norms, sums, kernels, jacobians = jax.tree.map(np.asarray, all_of_it(params))
    for norm, total, kernel, jacobian in zip(norms, sums, kernels, jacobians, strict=True):
        gradients = jacobian.sum(axis=1)
        flat = jacobian.reshape(*jacobian.shape[:2], -1)
        np.testing.assert_allclose(norm, np.linalg.norm(gradients.reshape(3, -1), axis=1))
        expected = np.tensordot(np.arange(1.0, 4.0), gradients, axes=1)
        np.testing.assert_allclose(total, expected, rtol=1e-9, atol=1e-12)
        inner = np.einsum("nkp,mlp->nkml", flat, flat)
        # Blocks that are the same for all outputs or samples may have axes of one entry.
        np.testing.assert_allclose(
            np.broadcast_to(kernel, inner.shape), inner, rtol=1e-9, atol=1e-12
        )


def test_a_division_by_zero_is_infinite_and_no_error() -> None:
    """As it is in the network itself."""
    structure = per_sample.trace(lambda p, x: (x @ p[0]) / 0.0 + p[1], [W, B], X)
    assert structure.biases == {}
    per_sample.trace(lambda p, x: x @ (p[0] / 0.0) + p[1], [W, B], X)


def test_a_bias_shares_the_product_of_the_cotangents() -> None:
    """The kernel of a layer with a bias takes no more products than the one without."""
    x, w = normal(0, 8, 16), normal(1, 16, 32)

    def flops(apply: Callable[[Any, jax.Array], jax.Array], params: list[jax.Array]) -> float:
        structure = per_sample.trace(apply, params, x)

        def kernel(params: Any) -> Any:
            rows = per_sample.factored_for_kernel(structure, params, x)
            return [per_sample.kernel(row, row) for row in rows]

        cost = jax.jit(kernel).lower(params).compile().cost_analysis()
        assert cost is not None
        return float(cost["flops"])

    without = flops(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], [w, normal(2, 32, 4)])
    with_bias = flops(
        lambda p, x: jnp.tanh(x @ p[0] + p[2]) @ p[1], [w, normal(2, 32, 4), normal(3, 32)]
    )
    product = 2 * 32 * (8 * 4) ** 2
    assert with_bias < without + product / 2
