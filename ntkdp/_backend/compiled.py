"""Compiled programs: typed, called only if their work fits into memory, with NaN on purpose."""

import math
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp

from ntkdp._backend import memory
from ntkdp._backend.types import Array, PyTree, is_traced

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result", covariant=True)
Result = TypeVar("Result")

#: Bytes of arguments and results below which the compiler's plan is not checked.
_SMALL = 2**22
#: Bytes of one record without outputs: losses, accuracies, clip fraction and time.
_SCALARS = 48


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


def bytes_of(tree: PyTree) -> int:
    """Bytes of all arrays of a tree; a leaf may be just the shape and dtype of an array."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def bytes_of_record(
    n_times: int, measure: Callable[[PyTree, bool], PyTree], state: PyTree, outputs: bool
) -> int:
    """Bytes of the records that ``measure(state, outputs)`` makes at so many times."""
    at_a_time = (
        bytes_of(jax.eval_shape(lambda state: measure(state, True), state)) if outputs else 0
    )
    return n_times * (_SCALARS + at_a_time)


def call(
    program: Callable[..., Result],
    *args: object,
    what: str,
    ways_out: str,
    results: int = 0,
    work: int = 0,
    n_runs: int = 1,
) -> Result:
    """Call the program on these arguments if its results and its work fit into memory.

    ``program`` was made by ``equinox.filter_jit``. ``results`` are the bytes of its results for
    each of ``n_runs``, and ``work`` the bytes that it may need besides; an error calls the work
    ``what``. The results are checked before compilation and, unless all of this is small, the
    memory that the compiler plans after it.

    Raises
    ------
    MemoryError
        With the bytes needed, the bytes available and the ways out.
    """
    memory.require(results * n_runs, what, ways_out)
    if n_runs * (bytes_of(args) + results + work) >= _SMALL and not is_traced(args):
        planned = _planned_bytes(program, args)
        memory.require(planned * _devices_that_share(args), what, ways_out)
    return program(*args)


def _planned_bytes(program: object, args: tuple[object, ...]) -> int:
    """Bytes of results and of temporary arrays, or zero if the platform does not tell."""
    signature = _signature(program, args)
    if signature is None:
        return _compiler_plan(program, args)
    if signature not in _PLANNED:
        _PLANNED[signature] = _compiler_plan(program, args)
    return _PLANNED[signature]


def _compiler_plan(program: Any, args: tuple[object, ...]) -> int:
    plan = program.lower(*args).compile().compiled.memory_analysis()
    return 0 if plan is None else int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


#: Planned bytes by signature of a call, because asking the compiler again takes milliseconds.
_PLANNED: dict[int, int] = {}


def _signature(program: object, args: tuple[object, ...]) -> int | None:
    """A number that is equal for calls of one compiled program; None if it cannot be hashed."""
    leaves, structure = jax.tree.flatten(args)
    kinds = [
        (leaf.shape, leaf.dtype, leaf.sharding) if isinstance(leaf, jax.Array) else leaf
        for leaf in leaves
    ]
    try:
        return hash((program, structure, tuple(kinds)))
    except TypeError:
        return None


def _devices_that_share(args: PyTree) -> int:
    """The number of devices of a program that share the memory of this host."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    used = [leaf.sharding.addressable_devices for leaf in arrays]
    return max(map(len, used), default=1) if jax.default_backend() == "cpu" else 1
