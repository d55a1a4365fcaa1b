"""``jax.jit`` that keeps the types of the function it compiles, and NaN that passes its checks."""

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp

from ntkdp._backend.types import Array

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result", covariant=True)


@runtime_checkable
class Compiled(Protocol[_Arguments, _Result]):
    """A function that ``jax.jit`` has compiled."""

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result: ...

    def lower(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> jax.stages.Lowered: ...


def jit(
    *,
    static_argnums: int | tuple[int, ...] | None = None,
    static_argnames: str | tuple[str, ...] | None = None,
) -> Callable[[Callable[_Arguments, _Result]], Compiled[_Arguments, _Result]]:
    """``jax.jit`` as a decorator whose result has the signature of what it decorates."""

    def compiled(function: Callable[_Arguments, _Result]) -> Compiled[_Arguments, _Result]:
        made = jax.jit(function, static_argnums=static_argnums, static_argnames=static_argnames)
        return cast(Compiled[_Arguments, _Result], made)

    return compiled


def nan_unless(present: Array, values: Array) -> Array:
    """The values that are present, and NaN in place of the others.

    With ``jax_debug_nans`` such a NaN is no error. That switch checks the results of compiled
    programs, so this function must be called outside of them.
    """
    with jax.debug_nans(False):
        return jnp.where(present, values, jnp.nan)
