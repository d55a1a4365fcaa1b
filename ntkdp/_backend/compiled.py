"""``jax.jit`` that keeps the types of the function it compiles."""

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import jax

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
