"""Kernels as a flow is given them: checked, by group as clipping needs them, and on its devices."""

from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ntkdp._backend import compiled, devices, memory, validate
from ntkdp._backend.precision import at_least_single
from ntkdp._backend.types import Array, ArrayLike, Float, is_traced
from ntkdp.clipping import ClippingRule
from ntkdp.ntk import FeatureKernel, LayerwiseKernel

#: A kernel as an argument.
KernelLike: TypeAlias = ArrayLike | LayerwiseKernel | FeatureKernel
#: Terms with a leading axis of groups if they are clipped apart, one term without it, or features.
Terms: TypeAlias = Array | FeatureKernel


def checked_terms(kernel: KernelLike, rule: ClippingRule, name: str, mesh: Mesh | None) -> Terms:
    """Terms as the scope needs them: layerwise with an axis of groups, flat their sum without.

    A head on features is one group, so that its kernel serves both scopes.
    """
    if isinstance(kernel, FeatureKernel):
        return _checked_features(kernel, name, mesh)
    layered = rule.scope == "layerwise"
    if isinstance(kernel, LayerwiseKernel):
        values = kernel.values if layered else kernel.total
    elif layered:
        raise ValueError(
            f"{name} must be a LayerwiseKernel with scope='layerwise', got an array without layer "
            "terms; use layerwise_ntk or layerwise_infinite_ntk"
        )
    else:
        values = validate.array(**{name: kernel})
    if values.ndim - layered not in (2, 4) or 0 in values.shape:
        raise ValueError(
            f"{name} must have shape (m, n, K, K), or (m, n) meaning (x) I_K, not empty, "
            f"got {values.shape[layered:]}"
        )
    _, rows, _, *blocks = shape_of(values, layered)
    if blocks and blocks[0] != blocks[1]:
        raise ValueError(f"{name} must have square K x K blocks, got {tuple(blocks)}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.result_type(float))
    values = at_least_single(values)
    devices.check_divides(mesh, **{name: rows})
    finite: Array = validate.finite(**{name: devices.spread(mesh, values, axis=int(layered))})
    return finite


def _checked_features(kernel: FeatureKernel, name: str, mesh: Mesh | None) -> FeatureKernel:
    parts = {"rows": kernel.rows, "columns": kernel.columns}
    for part, features in parts.items():
        devices.check_divides(mesh, **{f"{name}.{part}": features.shape[0]})
        parts[part] = at_least_single(devices.spread(mesh, features))
    if kernel.columns is kernel.rows:
        parts["columns"] = parts["rows"]
    placed: FeatureKernel = validate.finite(**{name: FeatureKernel(**parts)})
    return placed


def shape_of(terms: Terms, layered: bool) -> tuple[int, ...]:
    """``(R, m, n, K, K)`` or ``(R, m, n)``; flat, and for a head, R = 1."""
    if isinstance(terms, FeatureKernel):
        return (1, *terms.shape)
    return terms.shape if layered else (1, *terms.shape)


def diagonal(terms: Terms, layered: bool, mesh: Mesh | None) -> Float[Array, "R n ..."]:
    """Blocks of the samples with themselves, ``(R, n, K, K)`` or ``(R, n)``."""
    if isinstance(terms, FeatureKernel):
        return devices.everywhere(mesh, jnp.sum(terms.rows * terms.columns, axis=1)[None])
    return _diagonal(terms, layered, mesh)


# Compiled, so that no copy is made but the result.
@compiled.jit(static_argnums=(1, 2))
def _diagonal(terms: Array, layered: bool, mesh: Mesh | None) -> Array:
    return devices.diagonal(mesh, terms if layered else terms[None])


def total_of(terms: Terms, layered: bool) -> Terms:
    """The sum of the terms."""
    if layered and not isinstance(terms, FeatureKernel):
        return jnp.sum(terms, axis=0)
    return terms


def with_public(from_public: Terms, test: Terms | None, n: int, layered: bool) -> Terms:
    """Terms of public samples, then test points, against the n training samples."""
    if isinstance(from_public, FeatureKernel):
        assert test is None or isinstance(test, FeatureKernel)
        rows = [from_public.columns] if test is None else [from_public.columns, test.rows]
        return FeatureKernel(jnp.concatenate(rows), from_public.rows[:n])
    assert not isinstance(test, FeatureKernel)
    rows_axis, columns = int(layered), int(layered) + 1
    mirrored = lax.slice_in_dim(from_public, 0, n, axis=rows_axis).swapaxes(rows_axis, columns)
    if mirrored.ndim == layered + 4:
        mirrored = mirrored.swapaxes(-1, -2)
    return mirrored if test is None else jnp.concatenate([mirrored, test], axis=rows_axis)


def check_like(kernel: KernelLike, other: KernelLike, name: str) -> None:
    """Raise unless the other kernel has the groups of the first, and features if it has."""
    if isinstance(kernel, LayerwiseKernel) and isinstance(other, LayerwiseKernel):
        if kernel.names != other.names:
            raise ValueError(
                f"{name} must have the groups of kernel, {kernel.names}, got {other.names}"
            )
        return
    if isinstance(kernel, FeatureKernel) and isinstance(other, FeatureKernel):
        if kernel.rows.shape[1] != other.rows.shape[1]:
            raise ValueError(
                f"{name} must have the features of kernel, {kernel.rows.shape[1]}, got "
                f"{other.rows.shape[1]}"
            )
        return
    if isinstance(kernel, FeatureKernel) or isinstance(other, FeatureKernel):
        raise TypeError(
            f"{name} must be a FeatureKernel if kernel is one, and only then, got "
            f"{type(other).__name__} with {type(kernel).__name__}"
        )


def require_room(layered: bool, mesh: Mesh | None, *kernels: object) -> None:
    """Raise unless there is room for the kernels as matrices, besides those that are given."""
    if is_traced(kernels):
        return
    needed = 0
    for kernel in kernels:
        if isinstance(kernel, FeatureKernel):
            continue  # of which no copy is made
        n_summed = 1
        if isinstance(kernel, LayerwiseKernel) and not layered:
            n_summed = len(kernel.names)
        needed += compiled.bytes_of(kernel) // n_summed
    memory.require(
        devices.bytes_on_host(mesh, needed),
        "a KernelFlow, which keeps its kernels as matrices besides the given ones,",
        "use fewer samples, float32, a kernel (n, n) of infinite width, a mesh of devices, or "
        "LinearisedFlow, which needs no kernel",
    )
