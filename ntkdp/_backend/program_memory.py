"""The memory that a compiled program needs, checked before it runs."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from ntkdp._backend import memory
from ntkdp._backend.types import PyTree, is_traced

Result = TypeVar("Result")

#: Bytes of arguments and results below which the compiler's plan is not checked.
_SMALL = 2**22
#: Bytes of one record without outputs: losses, accuracies, clip fraction and time.
_SCALARS = 48


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
