"""Euclidean norms that neither overflow nor vanish on the way.

Numbers are scaled by powers of two before they are squared, and sums are formed in single precision
at least, whatever precision the numbers have.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend.types import Array, Float, PyTree, common_dtype


def wide(values: Array) -> Array:
    """The values in single precision at least."""
    return values.astype(common_dtype(values.dtype, jnp.float32))


def power_of_two(exponent: Array, dtype: np.dtype) -> Array:
    """``2 ** exponent`` without rounding."""
    return jnp.ldexp(jnp.ones((), dtype), exponent)


class Scaled(NamedTuple):
    """Numbers ``values * 2 ** exponent``, which may lie outside the range of the dtype."""

    values: Array
    exponent: Array

    def unscaled(self) -> Array:
        """The numbers in their dtype; one that is too small becomes the smallest normal number."""
        tiny = jnp.finfo(self.values.dtype).tiny
        # In two steps, because the power itself may be outside the range.
        half = self.exponent // 2
        numbers = self.values
        for exponent in (half, self.exponent - half):
            numbers = numbers * power_of_two(exponent, numbers.dtype)
        return jnp.where((self.values > 0) & (numbers < tiny), tiny, numbers)


def scaled(values: Array, axes: tuple[int, ...]) -> Scaled:
    """The values divided by a power of two near the largest along ``axes``, kept with length 1.

    No scaled value is above 4 in size, and the largest is at least 0.5 unless all are zero.
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(values)), axis=axes, keepdims=True, initial=0)
    _, exponent = jnp.frexp(largest)
    # The inverse of a larger power is below the smallest normal number.
    exponent = jnp.minimum(exponent, jnp.finfo(values.dtype).maxexp - 2)
    return Scaled(values * power_of_two(-exponent, values.dtype), exponent)


def from_squares(squares: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square roots, with zero for negative rounding errors and a derivative of zero at zero."""
    is_positive = squares > 0
    # NaN is not above zero either, but must stay NaN.
    safe = jnp.where(is_positive | jnp.isnan(squares), squares, 1.0)
    return jnp.where(is_positive | jnp.isnan(squares), jnp.sqrt(safe), 0.0)


def by_sample(values: Float[Array, "n ..."]) -> Scaled:
    """Norms of the values of each sample, ``(n,)``."""
    axes = tuple(range(1, values.ndim))
    values, exponent = scaled(wide(values), axes)
    return Scaled(from_squares(jnp.sum(values**2, axis=axes)), exponent.reshape(-1))


def combined(norms: list[Scaled], groups: tuple[int, ...], n_groups: int) -> Float[Array, "R n"]:
    """Norms by group of vectors whose parts have the given norms; each part is in one group."""
    segments = np.asarray(groups)
    exponents = jnp.stack([norm.exponent for norm in norms])
    values = jnp.stack([norm.values for norm in norms])
    # A part that is zero must not decide the scale of the others.
    lowest = jnp.iinfo(exponents.dtype).min // 2
    largest = jax.ops.segment_max(jnp.where(values == 0, lowest, exponents), segments, n_groups)
    largest = jnp.maximum(largest, lowest)
    below = jnp.clip(exponents - largest[segments], -jnp.finfo(values.dtype).maxexp, 0)
    parts = jnp.where(values == 0, 0, values * power_of_two(below, values.dtype))
    squares = jax.ops.segment_sum(parts**2, segments, n_groups)
    return Scaled(from_squares(squares), jnp.where(largest == lowest, 0, largest)).unscaled()


def of_all(tree: PyTree) -> Float[Array, ""]:
    """The norm of all numbers of a tree together."""
    norms = [by_sample(leaf[None]) for leaf in jax.tree.leaves(tree)]
    return combined(norms, (0,) * len(norms), 1)[0, 0]


def through_kernel(
    diagonal: Float[Array, "R n *blocks"], a: Float[Array, "n K"]
) -> Float[Array, "R n"]:
    r"""Norms of gradients by group, :math:`\|g_i\|^2 = a_i^\top H_{ii} a_i`.

    The kernel's diagonal is ``(R, n)`` or ``(R, n, K, K)``.
    """
    a, exponent = scaled(a, (1,))
    if diagonal.ndim > 2:
        # One pass over the diagonal; as a product of small matrices it is several times as slow.
        squares = jnp.sum(diagonal * (a[:, :, None] * a[:, None, :])[None], axis=(2, 3))
    else:
        squares = diagonal * jnp.sum(a**2, axis=1)[None]
    values = from_squares(squares)
    return Scaled(values, jnp.broadcast_to(exponent[:, 0], values.shape)).unscaled()


def through_blocks(
    blocks: Float[Array, "R n K K"], a: Float[Array, "n K S"]
) -> Float[Array, "R n S"]:
    """The same for S output gradients of each sample, by products of small matrices."""
    a, exponent = scaled(a, (1,))
    squares = jnp.stack(
        [jnp.sum(jnp.einsum("nkl,nls->nks", group, a) * a, axis=1) for group in blocks]
    )
    values = from_squares(squares)
    return Scaled(values, jnp.broadcast_to(exponent[:, 0], values.shape)).unscaled()
