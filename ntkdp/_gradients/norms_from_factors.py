r"""Norms of per-sample gradients in factored form, which never come out too small.

The squared norm of :math:`\sum_t x_t \otimes \delta_t` is the sum over pairs of positions of
:math:`(x_t \cdot x_s)(\delta_t \cdot \delta_s)`. If the positions cancel, its rounding error may
be larger than the sum: the error is about :math:`u A^2` with :math:`A = \sum_t |x_t| |\delta_t|`
and the rounding u of one operation, while the gradient itself, once it is formed, is off by about
u A. So the norm comes with a bound of its rounding error. If that is too large, the gradient is
formed, one sample at a time, and the bound of its own rounding error is added to its norm.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from ntkdp._backend.norms import (
    Scaled,
    by_sample,
    combined,
    from_squares,
    power_of_two,
    scaled,
    wide,
)
from ntkdp._backend.types import Array, Float
from ntkdp._gradients.factors import Dense, Factor, Lookup, Part

#: The sum over pairs is taken to be off by up to this many times u A^2.
_ROUNDINGS_OF_PAIRS = 4
#: A gradient, and its part in the clipped sum, by up to this many times u A sqrt(positions).
_ROUNDINGS_OF_SUM = 4
#: The share of a squared norm that rounding may hide, by the bits of the dtype.
_HIDDEN = {32: 1e-4, 64: 1e-9}


def grouped_norms(
    factors: list[Factor], leaf_to_group: tuple[int, ...], n_groups: int, n: int
) -> Float[Array, "groups n"]:
    """Norms of the gradients of n samples (b = 1) by group, from the factors of each leaf."""
    parts = [
        (_norms(part), group)
        for factor, group in zip(factors, leaf_to_group, strict=True)
        for part in factor
    ]
    # A leaf that no sample uses has no parts, but its group has a norm.
    zero = Scaled(jnp.full(n, 0.0), jnp.zeros(n, jnp.int32))  # weakly typed
    norms = [zero] * n_groups + [norm for norm, _ in parts]
    groups = (*range(n_groups), *[group for _, group in parts])
    return combined(norms, groups, n_groups)


def _norms(part: Part) -> Scaled:
    if isinstance(part, Dense):
        return by_sample(part.gradients)
    delta = wide(part.cotangents[:, 0])
    if isinstance(part, Lookup):
        return _norms_of_lookup(part.rows, delta)
    x = wide(part.inputs)
    if x.shape[2] > 1:
        return _norms_through_positions(x, delta)
    sides = [scaled(side, (2, 3)) for side in (x, delta)]
    lengths = [from_squares(jnp.sum(side.values**2, axis=(2, 3))) for side in sides]
    exponent = sides[0].exponent + sides[1].exponent
    return _over_blocks(Scaled(lengths[0] * lengths[1], exponent[:, :, 0, 0]))


def _over_blocks(blocks: Scaled) -> Scaled:
    """Norms over the second axis."""
    if blocks.values.shape[1] == 1:
        return Scaled(blocks.values[:, 0], blocks.exponent[:, 0])
    weights, exponent = _relative(blocks.exponent, blocks.values)
    values = from_squares(jnp.sum((blocks.values * weights) ** 2, axis=1))
    return Scaled(values, exponent)


def _relative(exponent: Array, values: Array) -> tuple[Array, Array]:
    """Powers of two over the largest of each sample whose value is not zero, and its exponent."""
    axes = tuple(range(1, exponent.ndim))
    limit = jnp.finfo(values.dtype).maxexp
    counted = jnp.where(values == 0, -4 * limit, exponent)
    largest = jnp.max(counted, axis=axes, keepdims=True)
    below = jnp.clip(exponent - largest, -limit, 0)
    return power_of_two(below, values.dtype), largest.reshape(-1)


def _norms_of_lookup(rows: Array, delta: Array) -> Scaled:
    """Norms of lookups: the cotangents that a row gets are summed before they are squared."""
    delta, exponent = scaled(delta, (1, 2))
    same = (rows[:, :, None] == rows[:, None, :]).astype(delta.dtype)
    by_position = jnp.einsum("nts,nsq->ntq", same, delta, precision="highest")
    # Each row occurs as often as it has positions.
    squares = jnp.sum(by_position**2, axis=2) / jnp.sum(same, axis=2)
    return Scaled(from_squares(jnp.sum(squares, axis=1)), exponent.reshape(-1))


def _norms_through_positions(x: Array, delta: Array) -> Scaled:
    """Norms for ``x (n, g, t, p)`` and ``delta (n, g, t, q)``, with t > 1."""
    sides = [scaled(side, (3,)) for side in (x, delta)]
    # Positions differ in size: small inputs may meet large cotangents, and the other way round.
    largest = [jnp.max(jnp.abs(lax.stop_gradient(side.values)), axis=3) for side in sides]
    exponents = (sides[0].exponent + sides[1].exponent)[..., 0]
    weights, exponent = _relative(exponents, largest[0] * largest[1])
    x, delta = sides[0].values, sides[1].values * weights[..., None]

    grams = [jnp.einsum("ngtp,ngsp->ngts", v, v, precision="highest") for v in (x, delta)]
    squares = jnp.sum(grams[0] * grams[1], axis=(1, 2, 3))
    lengths = [jnp.sqrt(jnp.diagonal(lax.stop_gradient(v), axis1=2, axis2=3)) for v in grams]
    size = jnp.sum(jnp.sum(lengths[0] * lengths[1], axis=2) ** 2, axis=1)
    unit = jnp.finfo(x.dtype).eps / 2
    hidden = _ROUNDINGS_OF_PAIRS * unit * size
    is_certain = hidden <= _HIDDEN[jnp.finfo(x.dtype).bits] * lax.stop_gradient(squares)
    # More precision does not help where the norm is NaN or infinite.
    is_certain |= ~jnp.isfinite(squares)

    def formed() -> Array:
        norms = _formed(lax.stop_gradient(x), lax.stop_gradient(delta), is_certain)
        return norms + _ROUNDINGS_OF_SUM * unit * jnp.sqrt(x.shape[2] * size)

    exact = _unless_all(is_certain, jnp.zeros_like(hidden), formed)
    safe = jnp.where(is_certain, squares + hidden, 1.0)
    # The derivative is that of the sum over pairs, which divides by no small difference.
    moved = (squares - lax.stop_gradient(squares)) / (2 * jnp.where(exact > 0, exact, 1.0))
    return Scaled(jnp.where(is_certain, from_squares(safe), exact + moved), exponent)


def _unless_all(is_certain: Array, otherwise: Array, compute: Callable[[], Array]) -> Array:
    """The result of ``compute``, or ``otherwise`` without the computation if all is certain.

    This is a loop of at most one turn, because a condition under ``vmap`` computes both sides.
    """

    def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return compute(), jnp.ones((), bool)

    result: Array
    result, _ = lax.while_loop(lambda state: ~state[1], turn, (otherwise, jnp.all(is_certain)))
    return result


def _formed(x: Array, delta: Array, is_certain: Array) -> Array:
    """Norms of gradients that are formed, one sample at a time; zero if they are certain anyway."""

    def norm(sample: tuple[Array, Array, Array]) -> Array:
        x_i, delta_i, certain = sample

        def form() -> Array:
            gradient = jnp.einsum("gtq,gtp->gqp", delta_i, x_i, precision="highest")
            return by_sample(gradient[None]).unscaled()[0]

        result: Array = lax.cond(certain, lambda: jnp.zeros((), x.dtype), form)
        return result

    norms: Array = lax.map(norm, (x, delta, is_certain))
    return norms
