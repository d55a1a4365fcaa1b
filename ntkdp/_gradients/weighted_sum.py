"""Sums of factored gradients over the samples, each with a weight."""

import jax.numpy as jnp
from jax import lax

from ntkdp._backend.norms import power_of_two, scaled, wide
from ntkdp._backend.types import Array, common_dtype
from ntkdp._gradients.factors import Dense, Factor, Lookup


def weighted_sum(factor: Factor, weights: Array, like: Array) -> Array:
    """``sum_i weights[i] g_i`` (b = 1), as the leaf ``like``, but in single precision at least."""
    total = jnp.zeros(like.shape, common_dtype(like.dtype, jnp.float32))
    for part in factor:
        if isinstance(part, Dense):
            gradients = wide(part.gradients[:, 0])
            one = jnp.tensordot(weights, gradients, axes=1, precision="highest")
            if part.layout is None:
                one = one.reshape(like.shape)
            else:
                one = part.layout.restore(jnp.swapaxes(one, 1, 2))
        else:
            delta = wide(part.cotangents[:, 0])
            if isinstance(part, Lookup):
                delta = _weighted(delta, weights)
                table = jnp.zeros((part.n_rows, delta.shape[-1]), delta.dtype)
                summed = table.at[part.rows].add(delta)
            else:
                summed = _summed_products(wide(part.inputs), delta, weights)
            one = part.layout.restore(summed)
        total = total + one.astype(total.dtype)
    return total


def _weighted(delta: Array, weights: Array) -> Array:
    """Cotangents times the weight of their sample, within the range of the dtype.

    A gradient of bounded length may have cotangents beyond it, if its inputs are tiny.
    """
    largest = jnp.finfo(delta.dtype).max
    weighted = delta * weights.reshape(-1, *[1] * (delta.ndim - 1))
    return jnp.clip(weighted, -largest, largest)


def _summed_products(x: Array, delta: Array, weights: Array) -> Array:
    """``sum_i weights[i] x[i] (x) delta[i]`` over samples and positions, ``(g, p, q)``.

    Where the weighted cotangents of a sample leave the range of the dtype, because its inputs are
    at the other end of it, some would become zero and others not, and what cancels between its
    positions would no longer do so. Such samples are summed again, with both sides near each other
    in size. That is a loop of at most one turn, so that it costs nothing where there are none.
    """
    plain = _weighted(delta, weights)
    summed = _summed(x, plain)
    is_far = _is_out_of_range(lax.stop_gradient(delta), lax.stop_gradient(weights))

    def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
        far = is_far[:, None, None, None]
        sides = _balanced(x, delta, weights)
        near = _summed(*[jnp.where(far, lax.stop_gradient(side), 0) for side in sides])
        lost = _summed(x, jnp.where(far, plain, 0))
        return lax.stop_gradient(near - lost), jnp.zeros((), bool)

    start = jnp.zeros_like(summed), jnp.any(is_far)
    return summed + lax.while_loop(lambda state: state[1], turn, start)[0]


def _is_out_of_range(delta: Array, weights: Array) -> Array:
    """For which samples the largest weighted cotangent is near either end of the dtype's range."""
    limits = jnp.finfo(delta.dtype)
    largest = jnp.max(jnp.abs(delta), axis=(1, 2, 3), initial=0)
    exponent = jnp.frexp(largest)[1] + jnp.frexp(weights)[1]
    counts = (largest > 0) & (weights != 0) & jnp.isfinite(largest) & jnp.isfinite(weights)
    is_small = exponent < limits.minexp + 2 * limits.nmant
    return counts & (is_small | (exponent > limits.maxexp - 2))


def _balanced(x: Array, delta: Array, weights: Array) -> tuple[Array, Array]:
    """Inputs, and cotangents with their weights, by powers of two about as large as each other."""
    inputs, cotangents = scaled(x, (1, 2, 3)), scaled(delta, (1, 2, 3))
    weight = scaled(weights[:, None, None, None], (1, 2, 3))
    exponent = inputs.exponent + cotangents.exponent + weight.exponent
    ours = exponent // 2
    return (
        inputs.values * power_of_two(ours, x.dtype),
        cotangents.values * weight.values * power_of_two(exponent - ours, x.dtype),
    )


def _summed(x: Array, delta: Array) -> Array:
    """Over samples and positions, ``(g, p, q)``."""
    if x.shape[1:3] == (1, 1):
        # As matrices, whose product needs no copy of its transposed side.
        x, delta = (v.reshape(v.shape[0], v.shape[-1]) for v in (x, delta))
        return lax.dot_general(x, delta, (((0,), (0,)), ((), ())), precision="highest")[None]
    if x.shape[2] == 1:
        return jnp.einsum("ngtp,ngtq->gpq", x, delta, precision="highest")
    # Many positions are summed faster this way around.
    summed = jnp.einsum("ngtq,ngtp->gqp", delta, x, precision="highest")
    return jnp.swapaxes(summed, 1, 2)
