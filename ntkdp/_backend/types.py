"""Type aliases for arrays, numbers and functions as arguments."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree, Real

#: Parameters of a network: any pytree of floating-point arrays.
Params: TypeAlias = PyTree
#: ``apply_fn(params, x) -> outputs`` with ``x`` of shape ``(n, ...)`` and outputs ``(n, K)``.
ApplyFn: TypeAlias = Callable[[Any, Array], Array]
#: Called with the fraction of the work done, in [0, 1].
ProgressCallback: TypeAlias = Callable[[float], None]

Outputs: TypeAlias = Float[Array, "n K"]


@runtime_checkable
class SupportsArray(Protocol):
    """An object that NumPy can turn into an array: of JAX or NumPy, or a column of pandas."""

    def __array__(self) -> np.ndarray: ...


#: A number as an argument: of Python, NumPy or JAX, or traced.
ScalarLike: TypeAlias = float | np.number | np.bool_ | np.ndarray | Array
#: Numbers as an argument, before they are checked and made an array of JAX.
ArrayLike: TypeAlias = (
    ScalarLike | SupportsArray | Sequence[float] | Sequence[Sequence[float]] | Sequence[Array]
)
#: A learning rate: a number, or a schedule of optax, which maps the number of a step to one.
LearningRate: TypeAlias = ScalarLike | Callable[[Array], ScalarLike]
#: A random key of the old or the new style as an argument, or several.
KeyLike: TypeAlias = PRNGKeyArray | Array | np.ndarray
#: Whether to show a bar, or a function that is called with the fraction of the work done.
Progress: TypeAlias = bool | ProgressCallback


def is_traced(value: PyTree) -> bool:
    """Whether any leaf of ``value`` is only known inside a JAX transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def common_dtype(*values: object) -> np.dtype:
    """The dtype to which JAX promotes arrays or dtypes, also if implicit promotion is forbidden."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def as_constant(value: ArrayLike) -> Any:
    """Numbers as a NumPy array, which JIT traces, so that other numbers need no compilation."""
    is_array = isinstance(value, jax.Array | np.ndarray)
    return value if is_array or is_traced(value) else np.asarray(value, dtype=np.float64)


__all__ = [
    "ApplyFn",
    "Array",
    "ArrayLike",
    "Float",
    "Key",
    "KeyLike",
    "LearningRate",
    "Outputs",
    "PRNGKeyArray",
    "Params",
    "Progress",
    "ProgressCallback",
    "PyTree",
    "Real",
    "ScalarLike",
    "SupportsArray",
    "as_constant",
    "common_dtype",
    "is_traced",
]
