"""Whether a sample's outputs and gradients change with the batch that it is in, by trying.

This is for programs in which it cannot be read. A sample's results in a batch are compared with
those that it has alone: for the given data, with neighbours drawn anew, with neighbours far away
and with entries from all over the data. The tolerance is the rounding inside the program: how far
the outputs of the sample alone move when parameters and inputs move by their rounding.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.types import ApplyFn, Array, Params, PRNGKeyArray
from ntkdp._gradients.equations import Atom, dtype_of, has_dtype

Tree = TypeVar("Tree")

#: Most samples in a batch of probes.
_MOST_SAMPLES = 1024
#: Most entries of such a batch.
_MOST_ENTRIES = 2**20
#: Differences up to this many times the effect of rounding are taken for rounding.
_ROUNDINGS = 100
#: How often parameters and inputs are moved by their rounding.
_MOVES = 3
#: How far away a neighbour is, over the size of the data.
_FAR = 100.0
#: Samples that are enough where only their number may matter.
_FEW = 3


def rounding_in(jaxpr: jex.ClosedJaxpr) -> float:
    """The unit of rounding of the coarsest floating-point type that a program uses."""
    roundings = (
        float(jnp.finfo(dtype_of(variable)).eps)
        for variable in _variables(jaxpr.jaxpr)
        if has_dtype(variable, jnp.floating)
    )
    return max(roundings, default=0.0)


def _variables(jaxpr: jex.Jaxpr) -> Iterator[Atom]:
    yield from jaxpr.invars
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        for param in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if _is_program(param):
                yield from _variables(param.jaxpr if isinstance(param, jex.ClosedJaxpr) else param)


def _is_program(value: object) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)


def changes_with_size(apply_fn: ApplyFn, params: Params, x: Array, rounding: float) -> Array:
    """Whether a few samples' outputs differ between many samples and alone, a truth value.

    That is enough for a program that certainly treats the samples one by one, but may count them.
    Many are as many as there are, up to the size of a batch of probes.
    """
    many = x[jnp.arange(_size(x)) % x.shape[0]]
    alone = _with_moves(partial(_alone, apply_fn), params, many[:_FEW], rounding)
    return _differ(apply_fn(params, many)[:_FEW], alone, rounding, (1,))


def changes_with_batch(apply_fn: ApplyFn, params: Params, x: Array, rounding: float) -> Array:
    """Whether any sample's outputs or gradients differ in a batch and alone, a truth value."""
    batches = _batches(x)
    outputs = lax.map(lambda batch: _outputs_differ(apply_fn, params, batch, rounding), batches)
    gradients = _gradients_differ(apply_fn, params, batches[1], rounding)
    return jnp.any(outputs) | gradients


def changes_with_place(apply_fn: ApplyFn, params: Params, x: Array, rounding: float) -> Array:
    """Whether equal samples in a batch have outputs that differ, a truth value."""
    alike = jnp.broadcast_to(x[:1], _batches(x).shape[1:])
    outputs = apply_fn(params, alike)
    tolerance = _ROUNDINGS * rounding * jnp.max(jnp.abs(outputs))
    # NaN has another reason, and compares false: a batch of equal samples has no spread.
    return jnp.any(jnp.abs(outputs - outputs[:1]) > tolerance)


def _size(x: Array) -> int:
    """Samples in a batch of probes."""
    return max(4, min(x.shape[0], _MOST_SAMPLES, _MOST_ENTRIES // max(1, x[0].size)))


def _batches(x: Array) -> Array:
    """Batches of probes, ``(batches, m, ...)``."""
    n, m = x.shape[0], _size(x)
    given = x[jnp.arange(m) % n]
    keys = jax.random.split(jax.random.key(0), 3)
    shuffled = jax.random.permutation(keys[0], given, independent=True)
    if x.size == 0:
        return jnp.stack([given, shuffled])
    anywhere = jax.random.randint(keys[1], given.shape, 0, x.size)
    pooled = x.reshape(-1)[anywhere]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.stack([given, shuffled, pooled])
    spread = jnp.std(given, axis=0) + jnp.sqrt(jnp.mean(given**2))
    drawn = jnp.mean(given, axis=0) + spread * jax.random.normal(keys[2], given.shape, x.dtype)
    rows = jnp.arange(m).reshape(-1, *[1] * (x.ndim - 1))
    mixed = jnp.where(rows % 2 == 0, shuffled, drawn)
    far = jnp.where(rows % 3 == 0, _FAR, 1.0).astype(x.dtype) * mixed
    return jnp.stack([given, mixed, far, pooled])


def _alone(apply_fn: ApplyFn, params: Params, batch: Array) -> Array:
    """Outputs of every sample in a batch of its own."""
    outputs: Array = jax.vmap(lambda x_i: apply_fn(params, x_i[None])[0])(batch)
    return outputs


def _moved(values: Tree, rounding: Array, key: PRNGKeyArray) -> Tree:
    """Floating-point numbers, each moved up or down by one rounding."""
    leaves, structure = jax.tree.flatten(values)

    def move(leaf: Array, k: PRNGKeyArray) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        signs = jax.random.rademacher(k, leaf.shape, leaf.dtype)
        return leaf * (1 + rounding.astype(leaf.dtype) * signs)

    keys = jax.random.split(key, len(leaves))
    moved: Tree = jax.tree.unflatten(
        structure, [move(*pair) for pair in zip(leaves, keys, strict=True)]
    )
    return moved


def _with_moves(
    function: Callable[[Params, Array], Tree], params: Params, batch: Array, rounding: float
) -> Tree:
    """``function(params, batch)`` as given, then several times a rounding away, stacked."""
    keys = jax.random.split(jax.random.key(1), 1 + _MOVES)
    roundings = jnp.asarray([0.0] + [rounding] * _MOVES, jnp.result_type(float))

    def moved(step: tuple[Array, PRNGKeyArray]) -> Tree:
        return function(*_moved((params, batch), *step))

    stacked: Tree = lax.map(moved, (roundings, keys))
    return stacked


def _differ(together: Array, alone: Array, rounding: float, axis: tuple[int, ...]) -> Array:
    """Whether two forms of a result differ by more than the rounding of entries along ``axis``.

    ``alone`` is stacked as by :func:`_with_moves`.
    """
    moved, alone = alone[1:], alone[0]
    effect = jnp.max(jnp.abs(moved - alone), axis=(0, *[a + 1 for a in axis]))
    scale = effect + rounding * jnp.max(jnp.abs(alone), axis=axis)
    tolerance = _ROUNDINGS * jnp.expand_dims(scale, axis)
    same = (together == alone) | (jnp.isnan(together) & jnp.isnan(alone))
    return ~jnp.all(same | (jnp.abs(together - alone) <= tolerance))


def _outputs_differ(apply_fn: ApplyFn, params: Params, batch: Array, rounding: float) -> Array:
    alone = _with_moves(partial(_alone, apply_fn), params, batch, rounding)
    return _differ(apply_fn(params, batch), alone, rounding, (1,))


def _gradients_differ(apply_fn: ApplyFn, params: Params, batch: Array, rounding: float) -> Array:
    """Whether the derivatives of a sum of outputs differ, each output with a weight of its own."""
    shape = jax.eval_shape(apply_fn, params, batch)
    weights = jax.random.normal(jax.random.key(2), shape.shape, shape.dtype)

    def gradient(function: ApplyFn, params: Params, batch: Array) -> list[Array]:
        pull = jax.vjp(lambda p: function(p, batch), params)[1]
        leaves: list[Array] = jax.tree.leaves(pull(weights))
        return leaves

    try:
        together = gradient(apply_fn, params, batch)
    except ValueError:  # a loop without reverse derivatives: whoever asks for one is told
        return jnp.array(False)
    alone = _with_moves(partial(gradient, partial(_alone, apply_fn)), params, batch, rounding)
    differ = [
        _differ(one, many, rounding, tuple(range(one.ndim)))
        for one, many in zip(together, alone, strict=True)
        if one.size
    ]
    return jnp.any(jnp.stack(differ)) if differ else jnp.array(False)
