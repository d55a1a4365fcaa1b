"""Sums of factored gradients over the samples, each with a weight."""

import math

import jax.numpy as jnp
from jax import lax

from ntkdp._backend.norms import power_of_two, scaled, wide
from ntkdp._backend.types import Array, common_dtype
from ntkdp._gradients.factors import Dense, Factor, Outer, Part

#: The share of a weighted gradient that may be lost to the ends of the range, by precision in bits.
_NEGLIGIBLE = {32: 1e-5, 64: 1e-10}


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
        return part.layout.restore(_summed(wide(part.inputs), _weighted(delta, weights)))
    delta = _weighted(delta, weights)
    table = jnp.zeros((part.n_rows, delta.shape[-1]), delta.dtype)
    return part.layout.restore(table.at[part.rows].add(delta))


def loses_precision(factor: Factor, weights: Array, contributions: Array) -> Array:
    """Whether the dtype can hold a weighted gradient only in part, sample by sample.

    If inputs and cotangents are at opposite ends of the range of the dtype, some weighted
    cotangents may leave it and others not: products that cancel between the positions of a sample
    then no longer do so. Those that overflow are cut off, which always counts; those that vanish
    count if they show next to ``contributions``, the norms of the weighted gradients. A weight of
    zero loses nothing, and without several positions nothing cancels.
    """
    is_lost = jnp.zeros(len(weights), bool)
    for part in factor:
        if isinstance(part, Dense) or part.cotangents.shape[-2] == 1:
            continue
        delta = wide(part.cotangents[:, 0])
        entries = tuple(range(1, delta.ndim))
        limits = jnp.finfo(delta.dtype)
        weighted = jnp.abs(_weighted(delta, weights))
        is_lost |= jnp.any(weighted >= limits.max, axis=entries)
        if isinstance(part, Outer):
            vanishes = (weighted < limits.tiny) & (delta != 0)
            exponents = scaled(wide(part.inputs), (2, 3)).exponent.max(axis=(1, 2, 3))
            size = math.sqrt(math.prod(delta.shape[1:]) * math.prod(part.inputs.shape[1:]))
            hidden = size * power_of_two(exponents + limits.minexp, delta.dtype)
            shows = hidden > _NEGLIGIBLE[limits.bits] * contributions
            is_lost |= jnp.any(vanishes, axis=entries) & shows
    return is_lost & (weights != 0)


def _weighted(delta: Array, weights: Array) -> Array:
    """Cotangents times the weight of their sample, within the range of the dtype.

    A gradient of bounded length may have cotangents beyond that range, if its inputs are tiny.
    """
    largest = jnp.finfo(delta.dtype).max
    weighted = delta * weights.reshape(-1, *[1] * (delta.ndim - 1))
    return jnp.clip(weighted, -largest, largest)


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
