"""Whether a program computes the same for a batch of n samples as for a batch of one."""

import itertools
from collections.abc import Hashable, Iterator
from typing import Any

import jax.extend.core as jex
import numpy as np

#: Operations that change shapes alone, which a batch of one needs fewer of.
_SHAPES = {"reshape", "squeeze", "broadcast_in_dim", "expand_dims", "copy"}
#: Calls that are looked through.
_CALLS = {"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
#: Constants up to so many entries are compared by value.
_LARGEST_COMPARED = 2**12

_Names = dict[Any, Hashable]


def same_program(many: jex.ClosedJaxpr, one: jex.ClosedJaxpr, n: int) -> bool:
    """Whether the same operations follow each other on the same operands, n times as large or as
    large, and none makes of an operand with n parts a result without.

    If so, a program that treats the samples of a batch one by one is the same function of each for
    n samples and for one. Programs that differ may still compute the same.
    """
    return _alike(many, one, n, itertools.count())


def _alike(many: jex.ClosedJaxpr, one: jex.ClosedJaxpr, n: int, fresh: Iterator[int]) -> bool:
    names: tuple[_Names, _Names] = ({}, {})
    if len(many.jaxpr.invars) != len(one.jaxpr.invars):
        return False
    for pair in zip(many.jaxpr.invars, one.jaxpr.invars, strict=True):
        _bind(names, pair, next(fresh))
    left = _operations(many.jaxpr, many.consts, names[0])
    right = _operations(one.jaxpr, one.consts, names[1])
    for a, b in itertools.zip_longest(left, right):
        if a is None or b is None or not _same_step(a, b, names, n, fresh):
            return False
    ends = zip(many.jaxpr.outvars, one.jaxpr.outvars, strict=True)
    return all(_name(a, names[0]) == _name(b, names[1]) for a, b in ends)


def _bind(names: tuple[_Names, _Names], pair: tuple[Any, Any], name: Hashable) -> None:
    for env, var in zip(names, pair, strict=True):
        env[var] = name


def _operations(jaxpr: Any, consts: Any, names: _Names) -> Iterator[Any]:
    """Equations that do more than change shapes, with calls looked through.

    A generator, so that the names of the results of one are known when the next is asked for.
    """
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        names[var] = _name_of_constant(const)
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        permutes = kind == "reshape" and eqn.params.get("dimensions") is not None
        if kind in _SHAPES and not permutes:
            names[eqn.outvars[0]] = _name(eqn.invars[0], names)
        elif kind in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            body = getattr(inner, "jaxpr", inner)
            # The same jaxpr may be called again: its variables then have other names.
            names.update(zip(body.invars, [_name(atom, names) for atom in eqn.invars], strict=True))
            yield from _operations(body, getattr(inner, "consts", ()), names)
            names.update(
                zip(eqn.outvars, [_name(atom, names) for atom in body.outvars], strict=True)
            )
        else:
            yield eqn


def _name(atom: Any, names: _Names) -> Hashable:
    return _name_of_constant(atom.val) if isinstance(atom, jex.Literal) else names[atom]


def _name_of_constant(const: Any) -> Hashable:
    """Numbers and small NumPy arrays, which each trace makes anew, by value; others by identity."""
    if not isinstance(const, bool | int | float | complex | np.ndarray | np.generic):
        return id(const)
    entries = np.asarray(const)
    if entries.size > _LARGEST_COMPARED:
        return id(const)
    uniform = entries.size > 0 and bool(np.all(entries == entries.flat[0]))
    named = entries.flat[0] if uniform else entries
    return (str(entries.dtype), named.shape, named.tobytes())


def _same_step(a: Any, b: Any, names: tuple[_Names, _Names], n: int, fresh: Iterator[int]) -> bool:
    if a.primitive is not b.primitive or len(a.outvars) != len(b.outvars):
        return False
    if [_name(v, names[0]) for v in a.invars] != [_name(v, names[1]) for v in b.invars]:
        return False
    times = [_times(v, w, n) for v, w in zip(a.invars, b.invars, strict=True)]
    out_times = [_times(v, w, n) for v, w in zip(a.outvars, b.outvars, strict=True)]
    if None in times or None in out_times:
        return False
    is_simple = not any(_programs(param) for param in a.params.values())  # else seen inside
    if is_simple and times and any(out != max(times) for out in out_times):  # type: ignore[type-var]
        return False
    if not _same_params(a.params, b.params, n, fresh):
        return False
    for pair in zip(a.outvars, b.outvars, strict=True):
        _bind(names, pair, next(fresh))
    return True


def _times(a: Any, b: Any, n: int) -> int | None:
    """How many times as large the first is, 1 or n; None for anything else."""
    large, small = a.aval.size, b.aval.size
    if large == small:
        return 1
    return n if large == n * small else None


def _same_params(a: dict[str, Any], b: dict[str, Any], n: int, fresh: Iterator[int]) -> bool:
    """Whether numbers and names are the same, and programs within are alike.

    Shapes are compared through the operands.
    """
    for key in a:
        left, right = a[key], b[key]
        if isinstance(left, bool | int | float | str) and repr(left) != repr(right):
            return False
        if key == "start_indices" and left != right:  # of a slice, whose size may be the same
            return False
        inner, other = _programs(left), _programs(right)
        if len(inner) != len(other):
            return False
        if not all(_alike(p, q, n, fresh) for p, q in zip(inner, other, strict=True)):
            return False
    return True


def _programs(param: Any) -> list[jex.ClosedJaxpr]:
    """What a loop, a branch or a function with its own derivative consists of."""
    parts = param if isinstance(param, tuple) else (param,)
    return [part for part in parts if isinstance(part, jex.ClosedJaxpr)]
