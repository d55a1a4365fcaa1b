"""Per-sample gradients of a model in factored form: what entered each product, and cotangents."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.types import Array, Params
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
from ntkdp._gradients.primitive_rules import Meeting
from ntkdp._gradients.tracing import Path, Site, Structure, Value, View, Visitor, interpret, trace
from ntkdp._gradients.weighted_sum import weighted_sum

#: Samples whose windows of a convolution are held at once.
_SAMPLES_AT_A_TIME = 32
#: Bytes of cotangents that may be held at once, on the way to gradients that take less.
_BYTES_AT_A_TIME = 2**21

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
    sites = list(structure.sites.values())
    numbers = {path: number for number, path in enumerate(structure.sites)}

    leaf_dtype = jnp.result_type(*leaves)
    f_one = jax.ShapeDtypeStruct((structure.n_outputs,), leaf_dtype)
    many_cotangents = jax.eval_shape(cotangent, f_one, *[a[0] for a in args]).shape[0] > 1

    def one_sample(x_i: Array, *args_i: Array) -> Any:
        def tapped(taps: list[Array], loose: list[Array]) -> Any:
            flat = list(leaves)
            for index, leaf in zip(structure.loose, loose, strict=True):
                flat[index] = leaf
            inputs: list[Any] = [None] * len(sites)

            def meet(
                path: Path, view: View, meeting: Meeting, data: Any, weight: Any, out: Any
            ) -> Any:
                if path not in numbers:
                    return out
                number = numbers[path]
                if many_cotangents and meeting.evaluate_for_many is not None:
                    out = meeting.evaluate_for_many(data, weight)
                inputs[number] = (data, _scale(view))
                return out + taps[number]

            values = [Value(leaf, View(i)) for i, leaf in enumerate(flat)]
            (out,) = interpret(
                structure.jaxpr.jaxpr,
                structure.jaxpr.consts,
                [*values, Value(x_i)],
                Visitor(meet, lambda leaf, reason: None),
            )
            return out.array, inputs

        taps = [jnp.zeros(site.tap_shape, site.tap_dtype) for site in sites]
        loose = [leaves[index] for index in structure.loose]
        f_i, pull, inputs = jax.vjp(tapped, taps, loose, has_aux=True)
        deltas, gradients = jax.vmap(pull)(cotangent(f_i, *args_i))
        read = [
            jax.vmap(site.meeting.read_cotangent)(delta)
            for site, delta in zip(sites, deltas, strict=True)
        ]
        return f_i, inputs, read, gradients

    outputs, data, deltas, gradients = jax.vmap(one_sample)(x, *args)
    factors: list[Factor] = [()] * structure.n_leaves
    # Several meetings in one place are one sum over all their positions.
    places: dict[Any, list[int]] = {}
    for number, site in enumerate(sites):
        places.setdefault((site.leaf, site.place), []).append(number)
    for together in places.values():
        met = [sites[i] for i in together]
        part = _part(met, [data[i] for i in together], [deltas[i] for i in together])
        leaf = met[0].leaf
        factors[leaf] = (*factors[leaf], part)
    for index, gradient in zip(structure.loose, gradients, strict=True):
        factors[index] = (Dense(gradient),)
    return outputs, factors


def factored_for_kernel(structure: Structure, params: Params, x: Array) -> list[Factor]:
    """Gradients of every output, b = K, in the form for inner products.

    Where gradients are formed from cotangents at many positions, as of a convolution, that is done
    for some samples at a time: their cotangents would take many times the memory.
    """
    n_outputs = structure.n_outputs

    def of(x: Array) -> list[Factor]:
        factors = factored(structure, params, x, lambda f: jnp.eye(n_outputs, dtype=f.dtype))[1]
        return [for_kernel(factor) for factor in factors]

    passing = 0
    for site in structure.sites.values():
        g, p, q = site.meeting.extents
        size = math.prod(site.tap_shape)
        if is_formed_for_kernel(size // (g * q), p, q):
            passing += n_outputs * size * site.tap_dtype.itemsize
    if passing == 0:
        return of(x)

    def of_one(x_i: Array) -> list[Factor]:
        return jax.tree.map(lambda values: values[0], of(x_i[None]))

    return lax.map(of_one, x, batch_size=max(1, _BYTES_AT_A_TIME // passing))


def _scale(view: View) -> Array | None:
    unscaled = isinstance(view.scale, float) and view.scale == 1.0
    return None if unscaled else jnp.asarray(view.scale)


def _part(sites: list[Site], data: list[tuple[Array, Array | None]], deltas: list[Array]) -> Part:
    """The sum over meetings in one place, each with its data and scale."""
    layout, meeting = sites[0].layout, sites[0].meeting
    if len(sites) == 1 and _is_worth_forming(sites[0], deltas[0]):
        return Dense(_formed_by_samples(meeting, *data[0], deltas[0]), layout)
    # Meetings in one place may still differ in how their data lies.
    read = [site.meeting.read_input(values) for site, (values, _) in zip(sites, data, strict=True)]
    scales = [scale for _, scale in data]
    if meeting.kind == "lookup":
        # Row numbers cannot carry a scale.
        scaled = [_times(delta, scale) for delta, scale in zip(deltas, scales, strict=True)]
        rows = jnp.concatenate(read, axis=-1)
        exists = (rows >= 0)[:, None, :, None]
        cotangents = jnp.where(exists, jnp.concatenate(scaled, axis=-2), 0)
        _, n_rows, _ = meeting.extents
        return Lookup(jnp.maximum(rows, 0), cotangents, n_rows, layout)
    inputs = [_times(values, scale) for values, scale in zip(read, scales, strict=True)]
    return Outer(jnp.concatenate(inputs, axis=-2), jnp.concatenate(deltas, axis=-2), layout)


def _is_worth_forming(site: Site, delta: Array) -> bool:
    if site.meeting.kind != "convolution" or delta.shape[1] > 1:
        return False
    _, p, q = site.meeting.extents
    return is_formed_for_norms(delta.shape[3], p, q)


def _formed_by_samples(meeting: Meeting, data: Array, scale: Array | None, deltas: Array) -> Array:
    """Gradients ``(n, 1, g, q, p)``, some samples at a time: all windows take much memory."""

    def one(sample: tuple[Array, Array]) -> Array:
        x, delta = sample
        (windows,) = meeting.read_input(x[None])
        return jnp.einsum("bgtq,gtp->bgqp", delta, windows)

    return _times(lax.map(one, (data, deltas), batch_size=_SAMPLES_AT_A_TIME), scale)


def _times(values: Array, scale: Array | None) -> Array:
    """Each sample's values times its scale."""
    return values if scale is None else values * scale.reshape(-1, *[1] * (values.ndim - 1))
