"""Samples spread over the devices of a mesh.

Whatever has a row for each training sample lies on the devices in equal parts; all else, such as
parameters and outputs, on every one of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntkdp._backend.types import Array, Float

#: The axis along which samples are spread.
AXIS = "samples"


def as_mesh(mesh: Any) -> Mesh | None:
    """The devices of a mesh along one axis; None means the default device."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "mesh must be a jax.sharding.Mesh, e.g. jax.make_mesh((jax.device_count(),), "
            f"('samples',)), got {mesh!r}"
        )
    return Mesh(mesh.devices.reshape(-1), (AXIS,))


def check_divides(mesh: Mesh | None, **counts: int) -> None:
    """Raise unless each number of samples falls into equal parts."""
    for name, n in counts.items():
        if mesh is not None and n % mesh.size:
            raise ValueError(
                f"{name} must have a number of samples that divides over the {mesh.size} devices "
                f"of mesh, e.g. {n - n % mesh.size or mesh.size}, got {n}"
            )


def spread(mesh: Mesh | None, array: Any, axis: int = 0) -> Any:
    """Rows of an array in equal parts over the devices."""
    if mesh is None:
        return array
    return _put(array, NamedSharding(mesh, _rows(axis)))


def everywhere(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays whole on every device."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, whole) if _is_array(leaf) else leaf, tree)


def over_samples(
    function: Callable[..., Any],
    mesh: Mesh | None,
    in_axes: tuple[int | None, ...],
    out_axes: Any,
) -> Callable[..., Any]:
    """``function`` on each device's samples; axes of them as for ``jax.vmap``.

    What has no axis of samples goes in whole, and must come out alike on all devices.
    """
    if mesh is None:
        return function
    context = jax.sharding.get_abstract_mesh()
    if not context.empty:
        raise ValueError(
            "mesh must be used outside of jax.set_mesh, which would spread arrays by itself, got "
            f"one within {context}; leave the context"
        )
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(_rows(axis) for axis in in_axes),
        out_specs=jax.tree.map(_rows, out_axes, is_leaf=lambda axis: axis is None),
        check_vma=False,
    )


def total(mesh: Mesh | None, tree: Any) -> Any:
    """Sum over the devices, inside :func:`over_samples`."""
    return tree if mesh is None else lax.psum(tree, AXIS)


def largest(mesh: Mesh | None, array: Any) -> Any:
    """The largest over the devices, inside :func:`over_samples`."""
    return array if mesh is None else lax.pmax(array, AXIS)


def own_part(mesh: Mesh | None, n: int) -> Any:
    """Number of the first of n samples that this device has, inside :func:`over_samples`."""
    return 0 if mesh is None else lax.axis_index(AXIS) * (n // mesh.size)


def product(mesh: Mesh | None, rows: Array, other: Array) -> Array:
    """A's rows of A B, inside :func:`over_samples`, where B too is spread over the devices.

    B's parts go round, so that no device ever holds the whole.
    """
    if mesh is None:
        return rows @ other
    width = other.shape[0]

    def add(found: Array, part: Array, source: Array) -> Array:
        return found + lax.dynamic_slice_in_dim(rows, source * width, width, axis=1) @ part

    start = jnp.zeros((rows.shape[0], other.shape[1]), jnp.result_type(rows, other))
    return _round(mesh, add, start, other)


def outer(mesh: Mesh | None, rows: Array, other: Array) -> Array:
    """A's rows of A B^T, inside :func:`over_samples`, where B too is spread over the devices."""
    if mesh is None:
        return rows @ other.T
    width = other.shape[0]

    def put(found: Array, part: Array, source: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(found, rows @ part.T, source * width, axis=1)

    shape = (rows.shape[0], width * mesh.size)
    return _round(mesh, put, jnp.zeros(shape, jnp.result_type(rows, other)), other)


def transposed(mesh: Mesh | None, rows: Array) -> Array:
    """Rows of the transposed of a square matrix in parts, inside :func:`over_samples`."""
    return columns(mesh, rows, axis=1).T


def columns(mesh: Mesh | None, rows: Array, axis: int) -> Array:
    """A device's share of ``axis`` with all rows of an array, inside :func:`over_samples`."""
    if mesh is None:
        return rows
    return lax.all_to_all(rows, AXIS, split_axis=axis, concat_axis=0, tiled=True)


def _round(
    mesh: Mesh, meet: Callable[[Array, Array, Array], Array], start: Array, part: Array
) -> Array:
    """What ``meet`` makes of the parts of all devices, one after the other, its own first."""
    towards = [(device, (device - 1) % mesh.size) for device in range(mesh.size)]
    own = lax.axis_index(AXIS)

    def turn(k: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        found, part = carry
        found = meet(found, part, (own + k) % mesh.size)
        return found, lax.ppermute(part, AXIS, towards)

    found, part = lax.fori_loop(0, mesh.size - 1, turn, (start, part))
    return meet(found, part, (own + mesh.size - 1) % mesh.size)


def gathered(mesh: Mesh | None, rows: Array, axis: int = 0) -> Array:
    """The rows of all devices, on each of them, inside :func:`over_samples`."""
    # The compiler refuses to gather nothing.
    if mesh is None or rows.shape[axis] == 0:
        return rows
    return lax.all_gather(rows, AXIS, axis=axis, tiled=True)


def diagonal(mesh: Mesh | None, terms: Float[Array, "R m n ..."]) -> Float[Array, "R n ..."]:
    """Blocks of samples with themselves, whole, of terms whose rows are spread.

    The rows begin with the n samples of the columns.
    """
    n_rows, n = terms.shape[1:3]

    def of_rows(rows: Array) -> Array:
        own = jnp.arange(rows.shape[1])
        # Rows beyond the columns have no diagonal: what is taken for it is cut off below.
        blocks = rows[:, own, jnp.minimum(own_part(mesh, n_rows) + own, n - 1)]
        return gathered(mesh, blocks, axis=1)[:, :n]

    blocks: Array = over_samples(of_rows, mesh, (1,), None)(terms)
    return blocks


def whole(tree: Any) -> Any:
    """Arrays that are spread over the devices of several processes, whole on all of them."""

    def gathered(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)
        on_all = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.jit(lambda array: array, out_shardings=on_all)(leaf)

    return jax.tree.map(gathered, tree)


def on_host(array: Any) -> np.ndarray:
    """A whole array in the memory of each process."""
    if isinstance(array, np.ndarray):
        return array
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def bytes_on_host(mesh: Mesh | None, needed: int) -> int:
    """Bytes of ``needed`` on the default device, or on this host if its devices share memory."""
    if mesh is None:
        return needed
    sharing = len(mesh.local_devices) if mesh.devices.flat[0].platform == "cpu" else 1
    return math.ceil(needed * sharing / mesh.size)


def _put(array: Any, sharding: NamedSharding) -> Array:
    traced = isinstance(array, jax.core.Tracer)
    if traced or not isinstance(array, jax.Array) or not array.is_fully_addressable:
        return jax.device_put(array, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    # Each process has the whole array and hands its own devices their parts.
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _rows(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
