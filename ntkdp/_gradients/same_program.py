"""Whether a program computes the same for a batch of n samples as for a batch of one."""

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import jax.extend.core as jex
import numpy as np

from ntkdp._gradients.equations import CALLS, Atom, Operand, called_program, shape_of

#: Operations that only change shapes; a batch of one needs fewer of them.
_SHAPES = {"reshape", "squeeze", "broadcast_in_dim", "expand_dims", "copy"}
#: Constants of at most this many entries are compared by value.
_LARGEST_COMPARED = 2**12

#: Names under which the variables of two programs are compared.
_Names: TypeAlias = dict[Atom, Hashable]


def same_program(many: jex.ClosedJaxpr, one: jex.ClosedJaxpr, n: int) -> bool:
    """Whether two programs are the same operations, for n samples and for one.

    The operations must follow each other on the same operands, which are as large or n times as
    large, and none may turn an operand with n parts into a result without them. A program that
    treats the samples of a batch one by one is then the same function of each for n samples and for
    one. Programs that differ may still compute the same.
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


def _bind(names: tuple[_Names, _Names], pair: tuple[Atom, Atom], name: Hashable) -> None:
    for env, var in zip(names, pair, strict=True):
        env[var] = name


def _operations(
    jaxpr: jex.Jaxpr, consts: Sequence[Operand], names: _Names
) -> Iterator[jex.JaxprEqn]:
    """Equations that do more than change shapes, with calls looked through.

    This is a generator, so that the results of one equation have names before the next is read.
    """
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        names[var] = _name_of_constant(const)
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        permutes = kind == "reshape" and eqn.params.get("dimensions") is not None
        if kind in _SHAPES and not permutes:
            names[eqn.outvars[0]] = _name(eqn.invars[0], names)
        elif kind in CALLS:
            body, body_consts = called_program(eqn)
            # The same jaxpr may be called again: its variables then have other names.
            names.update(zip(body.invars, [_name(atom, names) for atom in eqn.invars], strict=True))
            yield from _operations(body, body_consts, names)
            names.update(
                zip(eqn.outvars, [_name(atom, names) for atom in body.outvars], strict=True)
            )
        else:
            yield eqn


def _name(atom: Atom, names: _Names) -> Hashable:
    return _name_of_constant(atom.val) if isinstance(atom, jex.Literal) else names[atom]


def _name_of_constant(const: Operand) -> Hashable:
    """A name by value for numbers and small NumPy arrays, which each trace makes anew.

    Any other constant has a name by identity.
    """
    if not isinstance(const, bool | int | float | complex | np.ndarray | np.generic):
        return id(const)
    entries = np.asarray(const)
    if entries.size > _LARGEST_COMPARED:
        return id(const)
    uniform = entries.size > 0 and bool(np.all(entries == entries.flat[0]))
    named = entries.flat[0] if uniform else entries
    return (str(entries.dtype), named.shape, named.tobytes())


def _same_step(
    a: jex.JaxprEqn,
    b: jex.JaxprEqn,
    names: tuple[_Names, _Names],
    n: int,
    fresh: Iterator[int],
) -> bool:
    if a.primitive is not b.primitive or len(a.outvars) != len(b.outvars):
        return False
    if [_name(v, names[0]) for v in a.invars] != [_name(v, names[1]) for v in b.invars]:
        return False
    times = [_times(v, w, n) for v, w in zip(a.invars, b.invars, strict=True)]
    out_times = [_times(v, w, n) for v, w in zip(a.outvars, b.outvars, strict=True)]
    if 0 in times or 0 in out_times:
        return False
    is_simple = not any(_programs(param) for param in a.params.values())  # else seen inside
    if is_simple and times and any(out != max(times) for out in out_times):
        return False
    if not _same_params(a.params, b.params, n, fresh):
        return False
    for pair in zip(a.outvars, b.outvars, strict=True):
        _bind(names, pair, next(fresh))
    return True


def _times(a: Atom, b: Atom, n: int) -> int:
    """1 if both are of one size, n if the first is n times as large, 0 for any other sizes."""
    large, small = math.prod(shape_of(a)), math.prod(shape_of(b))
    if large == small:
        return 1
    return n if large == n * small else 0


def _same_params(a: dict[str, Any], b: dict[str, Any], n: int, fresh: Iterator[int]) -> bool:
    """Whether numbers and names are the same, and the programs inside are alike.

    Shapes are compared through the operands.
    """
    for key in a:
        left, right = a[key], b[key]
        if isinstance(left, bool | int | float | str) and repr(left) != repr(right):
            return False
        if key == "start_indices" and left != right:  # slices of one size may begin elsewhere
            return False
        inner, other = _programs(left), _programs(right)
        if len(inner) != len(other):
            return False
        if not all(_alike(p, q, n, fresh) for p, q in zip(inner, other, strict=True)):
            return False
    return True


def _programs(param: object) -> list[jex.ClosedJaxpr]:
    """The programs of a loop, a branch or a function with its own derivative."""
    parts = param if isinstance(param, tuple) else (param,)
    return [part for part in parts if isinstance(part, jex.ClosedJaxpr)]
