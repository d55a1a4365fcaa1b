"""Precision to compute in, where that of the given arrays is too low."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ntkdp._backend.types import Array, PyTree, common_dtype

Result = TypeVar("Result")


def at_least_single(array: Array) -> Array:
    """The array, in float32 if it is in half precision, which neither LAPACK nor netCDF knows."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array.astype(common_dtype(array.dtype, jnp.float32))


def in_double(function: Callable[..., Result], *arrays: PyTree) -> Result:
    """``function(*arrays)``, computed in float64 and rounded once to the precision of ``arrays``.

    Precision is the widest of the arrays, whole numbers counting as JAX's default float type. JAX's
    64-bit mode need not be on. Works under ``jit``, ``vmap``, ``shard_map`` and reverse-mode
    differentiation, of any order; derivatives are computed in float64 as well. In forward mode only
    float64 arrays can be differentiated.
    """
    dtype = common_dtype(*jax.tree.leaves(arrays), float)
    arrays = _cast(arrays, dtype)
    if dtype == jnp.float64:
        return function(*arrays)

    # What is batched or differentiated later is traced after the 64-bit block has ended, and would
    # mix float32 into float64: both get a block of their own.
    @custom_vmap
    def rounded(*arrays: PyTree) -> Any:
        with jax.enable_x64(True):
            return _cast(function(*_cast(arrays, jnp.float64)), dtype)

    @rounded.def_vmap
    def batched(axis_size: int, in_batched: Any, *arrays: PyTree) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
        found = in_double(jax.vmap(function, axes, axis_size=axis_size), *arrays)
        return found, jax.tree.map(lambda _: True, found)

    differentiable = jax.custom_vjp(rounded)

    def forward(*arrays: PyTree) -> Any:
        return differentiable(*arrays), arrays

    def backward(arrays: Any, cotangent: Any) -> Any:
        def pulled_back(cotangent: Any, *arrays: PyTree) -> Any:
            return jax.vjp(function, *arrays)[1](cotangent)

        return in_double(pulled_back, cotangent, *arrays)

    differentiable.defvjp(forward, backward)
    found: Result = differentiable(*arrays)
    return found


def _cast(tree: PyTree, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), tree)


def enable_x64() -> None:
    """Make float64 JAX's default, for the whole process; call it before making arrays.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.enable_x64()
    """
    jax.config.update("jax_enable_x64", True)
