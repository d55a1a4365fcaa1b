"""Equations of a jaxpr, and what it takes to read or to run them."""

from collections.abc import Sequence
from typing import TypeAlias, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ntkdp._backend.types import Array

#: An operand or a result of an equation.
Atom: TypeAlias = jex.Var | jex.Literal
#: The value of an operand: a number or an array, which may be traced.
Operand: TypeAlias = ArrayLike

#: Primitives that call another program and do nothing else.
CALLS = {"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of an operand or a result."""
    shape: tuple[int, ...] = cast(jax.core.ShapedArray, atom.aval).shape
    return shape


def dtype_of(atom: Atom) -> object:
    """The dtype of an operand or a result, NumPy's or one of PRNG keys."""
    return cast(jax.core.ShapedArray, atom.aval).dtype


def has_dtype(atom: Atom, kind: DTypeLike) -> bool:
    """Whether the dtype of an operand or a result is of a kind, such as ``jnp.inexact``."""
    return bool(jnp.issubdtype(cast(jax.core.ShapedArray, atom.aval).dtype, kind))


def called_program(eqn: jex.JaxprEqn) -> tuple[jex.Jaxpr, Sequence[Operand]]:
    """The program that an equation calls, and its constants."""
    called = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return (called.jaxpr, called.consts) if isinstance(called, jex.ClosedJaxpr) else (called, ())


def evaluate(eqn: jex.JaxprEqn, operands: Sequence[Operand]) -> list[Array]:
    """The results of an equation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]
