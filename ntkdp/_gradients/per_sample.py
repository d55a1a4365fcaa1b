"""Per-sample gradients of a model in factored form: inputs of products, and cotangents."""

import math
from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.types import Array, Params
from ntkdp._gradients.equations import Operand
from ntkdp._gradients.factors import (
    Dense,
    Factor,
    Lookup,
    Outer,
    Part,
    for_kernel,
    for_norms,
    is_formed_for_kernel,
    is_formed_for_norms,
    keep,
    kernel,
)
from ntkdp._gradients.norms_from_factors import grouped_norms
from ntkdp._gradients.primitive_rules import Contraction
from ntkdp._gradients.tracing import (
    LeafUse,
    LeafView,
    Path,
    Place,
    Scaled,
    Structure,
    Value,
    Visitor,
    interpret,
    trace,
)
from ntkdp._gradients.weighted_sum import loses_precision, weighted_sum

#: Samples whose windows of a convolution are held at once.
_SAMPLES_AT_A_TIME = 32
#: Bytes of cotangents that may be held at once, on the way to gradients that take less.
_BYTES_AT_A_TIME = 2**21

#: The data of a contraction and the scale of its leaf's view, None for one.
_Input: TypeAlias = tuple[Array, Array | None]
#: Inputs of each use of a leaf, and scales of the biases.
_Seen: TypeAlias = tuple[list[_Input], list[Array]]
#: Outputs, what was seen on the way, cotangents of each use, and gradients of the dense leaves.
_Pass: TypeAlias = tuple[Array, _Seen, list[Array], list[Array]]

__all__ = [
    "Dense",
    "Factor",
    "Lookup",
    "Outer",
    "Structure",
    "factored",
    "factored_for_kernel",
    "for_norms",
    "grouped_norms",
    "keep",
    "kernel",
    "loses_precision",
    "trace",
    "weighted_sum",
]


def factored(
    structure: Structure,
    params: Params,
    x: Array,
    cotangent: Callable[..., Array],
    *args: Array,
) -> tuple[Array, list[Factor]]:
    """Outputs ``(n, K)`` and per-sample gradients of every leaf, in factored form.

    ``cotangent(f_i, *args_i)`` maps one sample's outputs ``(K,)`` to ``(b, K)`` cotangents: the
    output gradient (b = 1) or a basis of the outputs (b = K).
    """
    leaves = jax.tree.leaves(params)
    uses = list(structure.uses.values())
    leaf_dtype = jnp.result_type(*leaves)
    f_one = jax.ShapeDtypeStruct((structure.n_outputs,), leaf_dtype)
    many_cotangents = jax.eval_shape(cotangent, f_one, *[a[0] for a in args]).shape[0] > 1

    def pass_one(x_i: Array, *args_i: Array) -> _Pass:
        def tapped(taps: list[Array], dense: list[Array]) -> tuple[Array, _Seen]:
            return _tapped_outputs(structure, leaves, x_i, taps, dense, many_cotangents)

        taps = [jnp.zeros(use.tap_shape, use.tap_dtype) for use in uses]
        dense = [leaves[index] for index in structure.dense]
        f_i, pull, inputs = jax.vjp(tapped, taps, dense, has_aux=True)
        deltas, gradients = jax.vmap(pull)(cotangent(f_i, *args_i))
        read = [
            jax.vmap(use.contraction.read_cotangent)(delta)
            for use, delta in zip(uses, deltas, strict=True)
        ]
        return f_i, inputs, read, gradients

    outputs, (data, scales), deltas, gradients = jax.vmap(pass_one)(x, *args)
    factors = _factors(structure, data, deltas)
    numbers = {path: number for number, path in enumerate(structure.uses)}
    for bias, scale in zip(structure.biases.values(), scales, strict=True):
        delta = deltas[numbers[bias.product]]
        ones = scale.astype(delta.dtype).reshape(-1, 1, 1, 1)
        factors[bias.leaf] = (Outer(ones, delta, bias.layout),)
    for index, gradient in zip(structure.dense, gradients, strict=True):
        factors[index] = (Dense(gradient),)
    return outputs, factors


def _tapped_outputs(
    structure: Structure,
    leaves: list[Operand],
    x_i: Array,
    taps: list[Array],
    dense: list[Array],
    many_cotangents: bool,
) -> tuple[Array, _Seen]:
    """One sample's outputs, with a tap added to the output of each contraction, and all inputs.

    The derivative in a tap is the cotangent of that output. The scale of a bias is that of its own
    cotangent, relative to the one of the product that it is added to.
    """
    numbers = {path: number for number, path in enumerate(structure.uses)}
    inputs: dict[int, _Input] = {}
    scales: dict[Path, Array] = {}

    def tap(
        path: Path,
        view: LeafView,
        contraction: Contraction,
        data: Operand,
        weight: Operand,
        out: Array,
    ) -> Array:
        if path not in numbers:
            return out
        number = numbers[path]
        if many_cotangents and contraction.evaluate_for_many is not None:
            out = contraction.evaluate_for_many(cast(Array, data), cast(Array, weight))
        inputs[number] = (cast(Array, data), _scale(view.scale))
        return out + taps[number]

    def tap_sum(path: Path, view: LeafView, product: Scaled, out: Array) -> Array:
        if path in structure.biases:
            scales[path] = jnp.asarray(view.scale / product.scale)
        return out

    flat = list(leaves)
    for index, leaf in zip(structure.dense, dense, strict=True):
        flat[index] = leaf
    values = [Value(leaf, LeafView(i)) for i, leaf in enumerate(flat)]
    (out,) = interpret(
        structure.jaxpr.jaxpr,
        structure.jaxpr.consts,
        [*values, Value(x_i)],
        Visitor(tap, tap_sum, lambda leaf, reason: None),
    )
    seen = [inputs[number] for number in range(len(numbers))]
    return cast(Array, out.array), (seen, [scales[path] for path in structure.biases])


def _factors(structure: Structure, data: list[_Input], deltas: list[Array]) -> list[Factor]:
    """Factors of each leaf: uses in one place are one sum over all their positions."""
    uses = list(structure.uses.values())
    factors: list[Factor] = [()] * structure.n_leaves
    places: dict[tuple[int, Place], list[int]] = {}
    for number, use in enumerate(uses):
        places.setdefault((use.leaf, use.place), []).append(number)
    for (leaf, _), together in places.items():
        part = _part(
            [uses[i] for i in together], [data[i] for i in together], [deltas[i] for i in together]
        )
        factors[leaf] = (*factors[leaf], part)
    return factors


def factored_for_kernel(structure: Structure, params: Params, x: Array) -> list[Factor]:
    """Gradients of every output, b = K, in the form for inner products.

    If gradients are formed from cotangents at many positions, as for a convolution, that is done
    for some samples at a time, because the cotangents would take many times the memory.
    """
    n_outputs = structure.n_outputs

    def factors_of(x: Array) -> list[Factor]:
        _, factors = factored(structure, params, x, lambda f: jnp.eye(n_outputs, dtype=f.dtype))
        return [for_kernel(factor) for factor in factors]

    passing = 0
    for use in structure.uses.values():
        g, p, q = use.contraction.extents
        size = math.prod(use.tap_shape)
        if is_formed_for_kernel(size // (g * q), p, q):
            passing += n_outputs * size * use.tap_dtype.itemsize
    if passing == 0:
        return factors_of(x)

    def factors_of_one(x_i: Array) -> list[Factor]:
        first: list[Factor] = jax.tree.map(lambda values: values[0], factors_of(x_i[None]))
        return first

    factors: list[Factor] = lax.map(
        factors_of_one, x, batch_size=max(1, _BYTES_AT_A_TIME // passing)
    )
    return factors


def _scale(scale: float | Array) -> Array | None:
    unscaled = isinstance(scale, float) and scale == 1.0
    return None if unscaled else jnp.asarray(scale)


def _part(uses: list[LeafUse], data: list[_Input], deltas: list[Array]) -> Part:
    """The sum over uses in one place, each with its data and scale."""
    layout, contraction = uses[0].layout, uses[0].contraction
    if len(uses) == 1 and _is_worth_forming(uses[0], deltas[0]):
        return Dense(_formed_by_samples(contraction, *data[0], deltas[0]), layout)
    # Uses in one place may still differ in how their data lies.
    read = [use.contraction.read_input(x) for use, (x, _) in zip(uses, data, strict=True)]
    scales = [scale for _, scale in data]
    if contraction.kind == "lookup":
        # Row numbers cannot carry a scale.
        scaled = [_times(delta, scale) for delta, scale in zip(deltas, scales, strict=True)]
        rows = jnp.concatenate(read, axis=-1)
        exists = (rows >= 0)[:, None, :, None]
        cotangents = jnp.where(exists, jnp.concatenate(scaled, axis=-2), 0)
        _, n_rows, _ = contraction.extents
        return Lookup(jnp.maximum(rows, 0), cotangents, n_rows, layout)
    inputs = [_times(values, scale) for values, scale in zip(read, scales, strict=True)]
    return Outer(jnp.concatenate(inputs, axis=-2), jnp.concatenate(deltas, axis=-2), layout)


def _is_worth_forming(use: LeafUse, delta: Array) -> bool:
    if use.contraction.kind != "convolution" or delta.shape[1] > 1:
        return False
    _, p, q = use.contraction.extents
    return is_formed_for_norms(delta.shape[3], p, q)


def _formed_by_samples(
    contraction: Contraction, data: Array, scale: Array | None, deltas: Array
) -> Array:
    """Gradients ``(n, 1, g, q, p)``, some samples at a time: all windows take much memory."""

    def gradient(sample: tuple[Array, Array]) -> Array:
        x, delta = sample
        (windows,) = contraction.read_input(x[None])
        return jnp.einsum("bgtq,gtp->bgqp", delta, windows)

    return _times(lax.map(gradient, (data, deltas), batch_size=_SAMPLES_AT_A_TIME), scale)


def _times(values: Array, scale: Array | None) -> Array:
    """Each sample's values times its scale."""
    if scale is None:
        return values
    return values * scale.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
