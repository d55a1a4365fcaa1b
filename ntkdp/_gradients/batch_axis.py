"""Whether a program treats the samples of a batch one by one, read from its jaxpr.

A value has the batch at a *place* if its i-th part there is the same function of the parameters and
of sample i alone, for every i. A value that does not depend on the samples has it at every place
along which it is uniform, so that its numbers do not differ from part to part. The places are
followed through every equation by the rules of :mod:`ntkdp._gradients.batch_axis_rules`; a
primitive without a rule keeps none. So a proof holds for all inputs, and a program without a proof
may still treat its samples one by one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array
from ntkdp._gradients.batch_axis_rules import RULES, Place, Value, every_place
from ntkdp._gradients.equations import (
    CALLS,
    Atom,
    Operand,
    called_program,
    dtype_of,
    evaluate,
    has_dtype,
    shape_of,
)

_CUSTOM = {"custom_jvp_call", "custom_vjp_call"}
#: Constants of at most this many entries are inspected.
_LARGEST_CONSTANT = 2**20
_PACKAGE, _JAX = Path(__file__).parent.parent, Path(jax.__file__).parent


class Program(NamedTuple):
    """The setting in which every equation of a jaxpr is read."""

    n: int
    differentiated: bool
    line: str | None = None


def trouble_with(jaxpr: jex.ClosedJaxpr, n: int, n_leaves: int) -> str | None:
    """Where samples first meet or are told apart by their place, or None if they certainly do not.

    ``jaxpr`` maps ``n_leaves`` arrays of parameters and a batch of n >= 2 samples to outputs.
    """
    program = Program(n, differentiated=True)
    shapes = [shape_of(var) for var in jaxpr.jaxpr.invars]
    args = [Value(shape, False) for shape in shapes[:n_leaves]]
    args.append(Value(shapes[n_leaves], True, frozenset({Place(0, 1)})))
    (out,) = _follow(jaxpr.jaxpr, jaxpr.consts, args, program)
    if Place(0, 1) in out.places:
        return None
    return out.trouble or "the outputs"


def _follow(
    jaxpr: jex.Jaxpr, consts: Sequence[Operand], args: Sequence[Value], program: Program
) -> list[Value]:
    env: dict[Atom, Value] = {}

    def read(atom: Atom) -> Value:
        return _constant(atom.val, program.n) if isinstance(atom, jex.Literal) else env[atom]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = _constant(const, program.n)
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        outs = _through(eqn, [read(atom) for atom in eqn.invars], program)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _constant(array: Operand, n: int) -> Value:
    """A number or an array from outside, at the places along which all its parts are equal."""
    shape = np.shape(array)
    if not shape or not _is_known(array):
        return Value(shape, False)
    entries = np.asarray(array)

    def is_uniform(place: Place) -> bool:
        split = (*shape[: place.axis], -1, n, place.inner, *shape[place.axis + 1 :])
        parts = entries.reshape(split) if entries.size else np.zeros(0)
        first = np.take(parts, [0], axis=place.axis + 1) if entries.size else parts
        return bool(np.all(parts == first))

    places = {place for axis in range(len(shape)) for place in every_place(shape, axis, n)}
    return Value(shape, False, frozenset(place for place in places if is_uniform(place)))


def _is_known(array: Operand) -> bool:
    """Whether the entries can be inspected, and are not so many that it would take long."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(array.dtype, jax.dtypes.extended) or array.size > _LARGEST_CONSTANT:
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _through(eqn: jex.JaxprEqn, values: list[Value], program: Program) -> list[Value]:
    name = eqn.primitive.name
    if name in CALLS:
        return _called(eqn, values, program)
    if name in _CUSTOM:
        return _with_derivative_of_its_own(eqn, values, program)
    if name == "scan":
        return _scan(eqn, values, program)
    if name == "while":
        return _while(eqn, values, program)
    if name == "cond":
        return _cond(eqn, values, program)
    rule = RULES.get(name)
    places = [frozenset()] * len(eqn.outvars) if rule is None else rule(eqn, values, program.n)
    depends = any(value.depends for value in values)
    return [
        _checked(Value(shape_of(var), depends, where), eqn, values, program)
        for var, where in zip(eqn.outvars, places, strict=True)
    ]


def _checked(out: Value, eqn: jex.JaxprEqn, values: Sequence[Value], program: Program) -> Value:
    """The value with the first trouble on the way to it, if it has lost the batch."""
    if out.trouble is not None or not out.depends or out.places:
        return out
    earlier = [value.trouble for value in values if value.trouble is not None]
    return out._replace(trouble=earlier[0] if earlier else _where(eqn, program))


def _where(eqn: jex.JaxprEqn, program: Program) -> str:
    """An equation in words: its primitive, the layer and the line that it comes from."""
    layer = str(eqn.source_info.name_stack)
    line = program.line or _line(eqn)
    words = f"`{eqn.primitive.name}`" + (f" in {layer}" if layer else "")
    return f"{words} ({line})" if line else words


def _line(eqn: jex.JaxprEqn) -> str | None:
    """The innermost line of the model, which ntkdp called, that is not JAX's own."""
    traceback = eqn.source_info.traceback
    if traceback is None:
        return None
    for frame in traceback.frames:
        path = Path(frame.file_name)
        if _PACKAGE in path.parents:
            return None
        if _JAX not in path.parents:
            return f"{path.name}:{frame.line_num}"
    return None


def _called(eqn: jex.JaxprEqn, values: Sequence[Value], program: Program) -> list[Value]:
    # JAX keeps what it traced: lines inside may be those of an earlier caller.
    program = program._replace(line=program.line or _line(eqn))
    return _follow(*called_program(eqn), values, program)


def _with_derivative_of_its_own(
    eqn: jex.JaxprEqn, values: Sequence[Value], program: Program
) -> list[Value]:
    """A function with a rule for its derivative, which must keep the samples apart as well."""
    undifferentiated = program._replace(differentiated=False)
    outs = _called(eqn, values, undifferentiated)
    if not program.differentiated or not any(value.depends for value in values):
        return outs
    forward = eqn.primitive.name == "custom_jvp_call"
    try:
        pairs = (_tangents if forward else _cotangents)(eqn, values, outs, undifferentiated)
    except Exception:  # whatever error the rule fails with, nothing is proven
        pairs = [(Value((), True), Value((), True))]
    if all(not moved.depends or moved.places & value.places for value, moved in pairs):
        return outs
    where = f"the derivative of {_where(eqn, program)}"
    return [out._replace(places=frozenset(), trouble=out.trouble or where) for out in outs]


def _shapes(variables: Sequence[Atom]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in variables]


def _inexact(variables: Sequence[Atom]) -> list[int]:
    """Positions of the variables that can be differentiated."""
    return [i for i, var in enumerate(variables) if has_dtype(var, jnp.inexact)]


def _tangents(
    eqn: jex.JaxprEqn, values: Sequence[Value], outs: Sequence[Value], program: Program
) -> list[tuple[Value, Value]]:
    """Each output and its derivative along the arguments."""
    shapes = _shapes(eqn.invars)
    moved = _inexact(eqn.invars)

    def push(args: list[Array], tangents: list[Array]) -> list[Array]:
        def function(*chosen: Array) -> list[Array]:
            whole = list(args)
            for i, value in zip(moved, chosen, strict=True):
                whole[i] = value
            return [out for out in evaluate(eqn, whole) if jnp.issubdtype(out.dtype, jnp.inexact)]

        return list(jax.jvp(function, [args[i] for i in moved], tangents)[1])

    jaxpr = jax.make_jaxpr(push)(shapes, [shapes[i] for i in moved])
    args = [*values, *[values[i] for i in moved]]
    out_tangents = _follow(jaxpr.jaxpr, jaxpr.consts, args, program)
    return [
        (outs[i], tangent) for i, tangent in zip(_inexact(eqn.outvars), out_tangents, strict=True)
    ]


def _cotangents(
    eqn: jex.JaxprEqn, values: Sequence[Value], outs: Sequence[Value], program: Program
) -> list[tuple[Value, Value]]:
    """Each argument and its cotangent, for any cotangents of the outputs.

    An argument that all samples share gets a sum over them, for which nothing is proven.
    """
    shapes = _shapes(eqn.invars)
    moved, given = _inexact(eqn.invars), _inexact(eqn.outvars)

    def pull(args: list[Array], cotangents: list[Array]) -> list[Array]:
        def function(*chosen: Array) -> list[Array]:
            whole = list(args)
            for i, value in zip(moved, chosen, strict=True):
                whole[i] = value
            return [evaluate(eqn, whole)[i] for i in given]

        return list(jax.vjp(function, *[args[i] for i in moved])[1](cotangents))

    jaxpr = jax.make_jaxpr(pull)(shapes, _shapes([eqn.outvars[i] for i in given]))
    # The cotangent of any value differs from sample to sample.
    cotangents = [outs[i]._replace(depends=True) for i in given]
    in_cotangents = _follow(jaxpr.jaxpr, jaxpr.consts, [*values, *cotangents], program)
    return [(values[i], cotangent) for i, cotangent in zip(moved, in_cotangents, strict=True)]


def _joined(one: Value, other: Value) -> Value:
    return Value(
        one.shape,
        one.depends or other.depends,
        one.places & other.places,
        one.trouble or other.trouble,
    )


def _cond(eqn: jex.JaxprEqn, values: list[Value], program: Program) -> list[Value]:
    which, *args = values
    branches = [
        _follow(branch.jaxpr, branch.consts, args, program) for branch in eqn.params["branches"]
    ]
    outs = []
    for first, *others in zip(*branches, strict=True):
        for other in others:
            first = _joined(first, other)
        if which.depends:  # one number that chooses for all samples
            first = Value(first.shape, True)
        outs.append(_checked(first, eqn, values, program))
    return outs


def _settled(
    turn: Callable[[list[Value]], list[Value]], carry: list[Value]
) -> tuple[list[Value], list[Value]]:
    """Values carried through a loop, after any number of turns, and results of the last turn."""
    while True:
        after = turn(carry)
        joined = [
            _joined(before, new) for before, new in zip(carry, after[: len(carry)], strict=True)
        ]
        if joined == carry:
            return carry, after[len(carry) :]
        carry = joined


def _while(eqn: jex.JaxprEqn, values: list[Value], program: Program) -> list[Value]:
    params = eqn.params
    n_tests = params["cond_nconsts"]
    n_consts = n_tests + params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    consts = values[n_tests:n_consts]
    carry, _ = _settled(
        lambda carry: _follow(body.jaxpr, body.consts, [*consts, *carry], program),
        values[n_consts:],
    )
    (goes_on,) = _follow(test.jaxpr, test.consts, [*values[:n_tests], *carry], program)
    if goes_on.depends:  # one number of turns for all samples
        carry = [Value(value.shape, True, trouble=goes_on.trouble) for value in carry]
    return [_checked(value, eqn, values, program) for value in carry]


def _scan(eqn: jex.JaxprEqn, values: list[Value], program: Program) -> list[Value]:
    params = eqn.params
    n_consts, n_carry = params["num_consts"], params["num_carry"]
    consts, stepped = values[:n_consts], values[n_consts + n_carry :]
    if n_carry == 0 and _steps_over_samples(consts, stepped):
        return [Value(shape_of(var), True, frozenset({Place(0, 1)})) for var in eqn.outvars]
    body = params["jaxpr"]
    here = [_checked(_slice(value), eqn, [value], program) for value in stepped]
    carry, turns = _settled(
        lambda carry: _follow(body.jaxpr, body.consts, [*consts, *carry, *here], program),
        values[n_consts : n_consts + n_carry],
    )
    shapes = [shape_of(var) for var in eqn.outvars[n_carry:]]
    stacked = [
        value._replace(shape=shape, places=frozenset(Place(a + 1, i) for a, i in value.places))
        for value, shape in zip(turns, shapes, strict=True)
    ]
    return [_checked(value, eqn, values, program) for value in [*carry, *stacked]]


def _steps_over_samples(consts: Sequence[Value], stepped: Sequence[Value]) -> bool:
    """Whether every turn of a loop without memory sees one sample and none of the others."""
    alone = not any(value.depends for value in consts)
    some = any(value.depends for value in stepped)
    return alone and some and all(Place(0, 1) in value.places for value in stepped)


def _slice(value: Value) -> Value:
    """One entry along the first axis."""
    places = frozenset(Place(axis - 1, inner) for axis, inner in value.places if axis > 0)
    return value._replace(shape=value.shape[1:], places=places)
