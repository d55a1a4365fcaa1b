"""Sums of factored gradients over the samples, each with a weight."""

import jax.numpy as jnp
from jax import lax

from ntkdp._backend.norms import power_of_two, scaled, wide
from ntkdp._backend.types import Array, common_dtype
from ntkdp._gradients.factors import Dense, Factor, Outer, Part


def weighted_sum(factor: Factor, weights: Array, like: Array) -> Array:
    """``sum_i weights[i] g_i`` in the shape of ``like``, in single precision at least (b = 1)."""
    total = jnp.zeros(like.shape, common_dtype(like.dtype, jnp.float32))
    for part in factor:
        total = total + _weighted_part(part, weights, like).astype(total.dtype)
    return total


def _weighted_part(part: Part, weights: Array, like: Array) -> Array:
    if isinstance(part, Dense):
        gradients = wide(part.gradients[:, 0])
        summed = jnp.tensordot(weights, gradients, axes=1, precision="highest")
        if part.layout is None:
            return summed.reshape(like.shape)
        return part.layout.restore(jnp.swapaxes(summed, 1, 2))
    delta = wide(part.cotangents[:, 0])
    if isinstance(part, Outer):
        return part.layout.restore(_summed_products(wide(part.inputs), delta, weights))
    delta = _weighted(delta, weights)
    table = jnp.zeros((part.n_rows, delta.shape[-1]), delta.dtype)
    return part.layout.restore(table.at[part.rows].add(delta))


def _weighted(delta: Array, weights: Array) -> Array:
    """Cotangents times the weight of their sample, within the range of the dtype.

    A gradient of bounded length may have cotangents beyond that range, if its inputs are tiny.
    """
    largest = jnp.finfo(delta.dtype).max
    weighted = delta * weights.reshape(-1, *[1] * (delta.ndim - 1))
    return jnp.clip(weighted, -largest, largest)


def _summed_products(x: Array, delta: Array, weights: Array) -> Array:
    """``sum_i weights[i] x[i] (x) delta[i]`` over samples and positions, ``(g, p, q)``.

    The weighted cotangents of a sample may leave the range of the dtype, because its inputs are at
    the other end of it. Some would then become zero and others not, and products that cancel
    between its positions would no longer do so. Such samples are summed again, with both sides near
    each other in size, one by one in a loop, which costs nothing if there are none.
    """
    summed = _summed(x, _weighted(delta, weights))
    # The derivative is that of the plain sum.
    x, delta, weights = (lax.stop_gradient(values) for values in (x, delta, weights))

    def correct(state: tuple[Array, Array]) -> tuple[Array, Array]:
        is_left, correction = state
        sample = jnp.argmax(is_left)
        alone = [lax.dynamic_index_in_dim(values, sample) for values in (x, delta, weights)]
        near = _summed(*_balanced(*alone))
        lost = _summed(alone[0], _weighted(*alone[1:]))
        return is_left.at[sample].set(False), correction + (near - lost)

    start = _is_out_of_range(delta, weights), jnp.zeros_like(summed)
    return summed + lax.while_loop(lambda state: jnp.any(state[0]), correct, start)[1]


def _is_out_of_range(delta: Array, weights: Array) -> Array:
    """Whether each sample's largest weighted cotangent is near an end of the dtype's range."""
    limits = jnp.finfo(delta.dtype)
    largest = jnp.max(jnp.abs(delta), axis=(1, 2, 3), initial=0)
    exponent = jnp.frexp(largest)[1] + jnp.frexp(weights)[1]
    counts = (largest > 0) & (weights != 0) & jnp.isfinite(largest) & jnp.isfinite(weights)
    is_small = exponent < limits.minexp + 2 * limits.nmant
    return counts & (is_small | (exponent > limits.maxexp - 2))


def _balanced(x: Array, delta: Array, weights: Array) -> tuple[Array, Array]:
    """Inputs and weighted cotangents, scaled by powers of two to about the same size."""
    inputs, cotangents = scaled(x, (1, 2, 3)), scaled(delta, (1, 2, 3))
    weight = scaled(weights[:, None, None, None], (1, 2, 3))
    exponent = inputs.exponent + cotangents.exponent + weight.exponent
    half = exponent // 2
    return (
        inputs.values * power_of_two(half, x.dtype),
        cotangents.values * weight.values * power_of_two(exponent - half, x.dtype),
    )


def _summed(x: Array, delta: Array) -> Array:
    """Products summed over samples and positions, ``(g, p, q)``."""
    if x.shape[1:3] == (1, 1):
        # The product of matrices needs no copy of its transposed side.
        x, delta = (v.reshape(v.shape[0], v.shape[-1]) for v in (x, delta))
        return lax.dot_general(x, delta, (((0,), (0,)), ((), ())), precision="highest")[None]
    if x.shape[2] == 1:
        return jnp.einsum("ngtp,ngtq->gpq", x, delta, precision="highest")
    # Many positions are summed faster this way around.
    summed = jnp.einsum("ngtq,ngtp->gqp", delta, x, precision="highest")
    return jnp.swapaxes(summed, 1, 2)
