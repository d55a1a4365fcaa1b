"""A higher precision for computations in which that of the given arrays is too low."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from ntkdp._backend.types import Array, PyTree, common_dtype

Result = TypeVar("Result")


def at_least_single(array: Array) -> Array:
    """The array, in float32 if in half precision, which LAPACK and netCDF do not support."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(common_dtype(array.dtype, jnp.float32))


def in_double(function: Callable[..., Result], *arrays: PyTree) -> Result:
    """``function(*arrays)``, computed in float64 and rounded once to the precision of ``arrays``.

    The result has the widest precision of the arrays, where integers count as JAX's default float
    type. JAX's 64-bit mode need not be on. Works under ``jit``, ``vmap``, ``shard_map`` and
    reverse-mode differentiation of any order; derivatives are computed in float64 as well. In
    forward mode only float64 arrays can be differentiated.
    """
    dtype = common_dtype(*jax.tree.leaves(arrays), float)
    arrays = _cast(arrays, dtype)
    if dtype == jnp.float64:
        return function(*arrays)

    # Batching and differentiation are traced after the 64-bit block has ended, and would mix
    # float32 into float64, so both get a block of their own.
    @custom_vmap
    def rounded(*arrays: PyTree) -> PyTree:
        with jax.enable_x64(True):
            return _cast(function(*_cast(arrays, jnp.float64)), dtype)

    @rounded.def_vmap
    def batched(axis_size: int, in_batched: PyTree, *arrays: PyTree) -> tuple[PyTree, PyTree]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
        results = in_double(jax.vmap(function, axes, axis_size=axis_size), *arrays)
        return results, jax.tree.map(lambda _: True, results)

    differentiable = jax.custom_vjp(rounded)

    def forward(*arrays: PyTree) -> PyTree:
        return differentiable(*arrays), arrays

    def backward(arrays: PyTree, cotangent: PyTree) -> PyTree:
        def pulled_back(cotangent: PyTree, *arrays: PyTree) -> PyTree:
            return jax.vjp(function, *arrays)[1](cotangent)

        return in_double(pulled_back, cotangent, *arrays)

    differentiable.defvjp(forward, backward)
    result: Result = differentiable(*arrays)
    return result


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), tree)


def enable_x64() -> None:
    """Make float64 JAX's default, for the whole process; call it before making arrays.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    """
    jax.config.update("jax_enable_x64", True)
