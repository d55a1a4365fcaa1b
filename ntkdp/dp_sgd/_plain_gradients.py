"""Clipped sums of plain per-sample gradients, as a textbook writes them.

Nothing here is shared with the predictions or with the engine that reads gradients off a model's
program, so that a run of this kind can disagree with both. Only the clipping rule is the same,
which maps norms to factors.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ntkdp._backend.types import ApplyFn, Array, Params, common_dtype
from ntkdp.clipping import ClippingRule
from ntkdp.losses import Loss


def clipped_sum(
    apply_fn: ApplyFn,
    loss: Loss,
    rule: ClippingRule,
    leaf_to_group: Sequence[int],
    params: Params,
    x: Array,
    targets: Array,
    present: Array,
    total: Callable[[list[Array]], list[Array]],
) -> tuple[list[Array], Array, Array, Array]:
    """``sum_i C_i g_i`` leaf by leaf, outputs, and norms and factors ``(R, n)`` (flat: R = 1).

    A sample that is not present, or whose norm or factor is not finite, has no part in the sum.
    ``total`` adds up what the devices have.
    """

    def loss_of(params: Params, x_i: Array, y_i: Array) -> tuple[Array, Array]:
        f = apply_fn(params, x_i[None])
        return loss(f, y_i[None])[0], f[0]

    per_sample = jax.vmap(jax.grad(loss_of, has_aux=True), in_axes=(None, 0, 0))
    tree, outputs = per_sample(params, x, targets)
    gradients = [leaf.astype(common_dtype(leaf.dtype, jnp.float32)) for leaf in _leaves(tree)]
    labels = range(max(leaf_to_group) + 1)

    def norms(gradients: list[Array]) -> Array:
        members = [_of_group(gradients, leaf_to_group, r) for r in labels]
        return jnp.stack([_norm(group) for group in members])

    sizes = norms(gradients)
    usable = present
    if rule.bounds_each_sample:
        usable &= jnp.all(jnp.isfinite(sizes), axis=0)
    gradients = [_where(usable, leaf) for leaf in gradients]
    totals = None
    if rule.needs_total_norm:
        summed = total([jnp.sum(leaf, axis=0) for leaf in gradients])
        totals = norms([leaf[None] for leaf in summed])[:, 0]
    factors = rule.by_group(jnp.where(usable, sizes, 0.0), totals)
    weights = jnp.where(usable, factors, 0.0)
    if rule.bounds_each_sample:
        weights = jnp.where(jnp.all(jnp.isfinite(weights), axis=0), weights, 0.0)
    clipped = [
        jnp.tensordot(weights[r], leaf, axes=1, precision="highest")
        for r, leaf in zip(leaf_to_group, gradients, strict=True)
    ]
    return clipped, outputs, sizes, factors


def _leaves(tree: Params) -> list[Array]:
    return jax.tree.leaves(tree)


def _of_group(gradients: list[Array], leaf_to_group: Sequence[int], r: int) -> list[Array]:
    return [leaf for leaf, group in zip(gradients, leaf_to_group, strict=True) if group == r]


def _where(usable: Array, leaf: Array) -> Array:
    return jnp.where(usable.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)


def _norm(leaves: list[Array]) -> Array:
    """Norms ``(n,)`` over several arrays ``(n, ...)``, whose squares may leave the range."""

    def over(leaf: Array) -> tuple[int, ...]:
        return tuple(range(1, leaf.ndim))

    largest = [jnp.max(jnp.abs(leaf), axis=over(leaf), initial=0) for leaf in leaves]
    unit = jax.lax.stop_gradient(jnp.max(jnp.stack(largest), axis=0))
    # Neither the unit nor its inverse may leave the range: compilers divide by multiplying.
    limits = jnp.finfo(unit.dtype)
    unit = jnp.clip(unit, 8 * limits.tiny, limits.max / 8)
    squares = jnp.zeros_like(unit)
    for leaf in leaves:
        relative = leaf / unit.reshape(-1, *[1] * (leaf.ndim - 1))
        squares += jnp.sum(relative**2, axis=over(leaf))
    length = unit * jnp.sqrt(jnp.where(squares == 0, 1.0, squares))
    return jnp.where(squares == 0, 0.0, length)
