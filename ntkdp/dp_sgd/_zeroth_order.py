"""What a zeroth-order step has in place of the clipped sum of gradients, and of its noise."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.norms import wide
from ntkdp._backend.types import Array, Float, Params, PRNGKeyArray
from ntkdp._estimators.zeroth_order import ZerothOrder
from ntkdp.clipping import ClippingRule


class EstimatedSum(NamedTuple):
    """Clipped slopes times their directions, summed, and sizes and factors ``(m, n)`` of slopes."""

    total: Params
    norms: Array
    factors: Array


def estimated_sum(
    order: ZerothOrder,
    rule: ClippingRule,
    losses_of: Callable[[Params], Float[Array, " n"]],
    params: Params,
    present: Array,
    key: PRNGKeyArray,
) -> EstimatedSum:
    """The sum over the samples that are present, along the directions of a step's key."""

    def along(total: Params, key: PRNGKeyArray) -> tuple[Params, tuple[Array, Array]]:
        z = _direction(key, params)

        def losses_at(t: Array) -> Array:
            moved = jax.tree.map(
                lambda w, d: w + (t.astype(d.dtype) * d).astype(w.dtype), params, z
            )
            return wide(losses_of(moved))

        slopes = order.slopes(losses_at, wide(jax.tree.leaves(params)[0]))
        amount, sizes, factors = order.clipped_sum(rule, slopes, present)
        return _plus(total, amount, z), (sizes, factors)

    total, (norms, factors) = lax.scan(along, _zeros(params), order.keys(key))
    return EstimatedSum(total, norms, factors)


def noise(
    order: ZerothOrder, deviation: Array, params: Params, key: PRNGKeyArray, noise_key: PRNGKeyArray
) -> Params:
    """Noise of the sums of slopes times their directions, the same ones."""
    dtype = wide(jax.tree.leaves(params)[0]).dtype
    amounts = deviation.astype(dtype) * jax.random.normal(noise_key, (order.directions,), dtype)

    def along(total: Params, drawn: tuple[PRNGKeyArray, Array]) -> tuple[Params, None]:
        key, amount = drawn
        return _plus(total, amount, _direction(key, params)), None

    total: Params = lax.scan(along, _zeros(params), (order.keys(key), amounts))[0]
    return total


def _direction(key: PRNGKeyArray, params: Params) -> Params:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(own, leaf.shape, wide(leaf).dtype)
        for own, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda w: jnp.zeros_like(wide(w)), params)


def _plus(total: Params, amount: Array, direction: Params) -> Params:
    return jax.tree.map(lambda s, z: s + amount.astype(z.dtype) * z, total, direction)
