"""Memory that a compiled program will take, asked before it runs."""

import math
from collections.abc import Callable
from typing import Any

import jax

from ntkdp._backend import memory
from ntkdp._backend.types import is_traced

#: Bytes of arguments and results below which a program is not asked.
_SMALL = 2**22
#: Bytes of what is recorded at a time besides outputs: losses, accuracies, clip fraction and time.
_SCALARS = 48


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of what stands for them."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def bytes_of_record(n_times: int, measure: Callable[..., Any], state: Any, outputs: bool) -> int:
    """Bytes of what ``measure(state, outputs)`` records at so many times."""
    at_a_time = (
        bytes_of(jax.eval_shape(lambda state: measure(state, True), state)) if outputs else 0
    )
    return n_times * (_SCALARS + at_a_time)


def call(
    program: Any,
    *args: Any,
    what: str,
    ways_out: str,
    results: int = 0,
    work: int = 0,
    n_runs: int = 1,
) -> Any:
    """The program on these arguments, if there is room for its results and its work.

    ``program`` is one of ``equinox.filter_jit``; ``results`` are bytes that it makes for each of
    ``n_runs``, and ``work`` bytes that it may take besides. Results are asked for before the
    program is compiled. What the compiler plans is asked for then, unless all of this is small.

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


def _planned_bytes(program: Any, args: tuple[Any, ...]) -> int:
    """Bytes of results and of temporary arrays; zero if the platform does not say."""
    signature = _signature(program, args)
    if signature not in _PLANNED:
        planned = program.lower(*args).compile().compiled.memory_analysis()
        found = 0 if planned is None else planned.temp_size_in_bytes + planned.output_size_in_bytes
        if signature is None:
            return int(found)
        _PLANNED[signature] = int(found)
    return _PLANNED[signature]


#: Plans by what programs were called with: to look at one again would take milliseconds.
_PLANNED: dict[int | None, int] = {}


def _signature(program: Any, args: tuple[Any, ...]) -> int | None:
    """Equal for calls of one compiled program; None if an argument cannot be hashed."""
    leaves, structure = jax.tree.flatten(args)
    looks = [
        (leaf.shape, leaf.dtype, leaf.sharding) if isinstance(leaf, jax.Array) else leaf
        for leaf in leaves
    ]
    try:
        return hash((program, structure, tuple(looks)))
    except TypeError:
        return None


def _devices_that_share(args: Any) -> int:
    """How many devices of a program share the memory of this host."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    used = [leaf.sharding.addressable_devices for leaf in arrays]
    return max(map(len, used), default=1) if jax.default_backend() == "cpu" else 1
