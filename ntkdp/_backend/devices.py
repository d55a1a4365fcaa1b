"""Samples spread over the devices of a mesh.

An array that has a row for each training sample lies on the devices in equal parts; everything
else, such as parameters and outputs, lies whole on every device.
"""

import math
from collections.abc import Callable
from typing import ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntkdp._backend.types import Array, Float, PyTree

#: The axis along which samples are spread.
AXIS = "samples"
#: The axes of samples of what a function returns, as for ``jax.vmap``.
OutAxes: TypeAlias = PyTree[int | None]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Tree = TypeVar("_Tree")


def as_mesh(mesh: object) -> Mesh | None:
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


def spread(mesh: Mesh | None, array: Array | np.ndarray, axis: int = 0) -> Array:
    """Lay an array on the devices in equal parts of its rows."""
    if mesh is None:
        return jnp.asarray(array)
    return _put(array, NamedSharding(mesh, _rows(axis)))


def everywhere(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """Lay all arrays of a tree whole on every device."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    placed: _Tree = jax.tree.map(lambda leaf: _put(leaf, whole) if _is_array(leaf) else leaf, tree)
    return placed


def over_samples(
    function: Callable[_Arguments, _Result],
    mesh: Mesh | None,
    in_axes: tuple[int | None, ...],
    out_axes: OutAxes,
) -> Callable[_Arguments, _Result]:
    """Run ``function`` on each device's samples; their axes are given as for ``jax.vmap``.

    An argument without an axis of samples goes in whole; a result without one must come out alike
    on all devices.
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


def total(mesh: Mesh | None, tree: _Tree) -> _Tree:
    """Sum over the devices, inside :func:`over_samples`."""
    if mesh is None:
        return tree
    summed: _Tree = lax.psum(tree, AXIS)
    return summed


def largest(mesh: Mesh | None, array: Array) -> Array:
    """The largest entries over the devices, inside :func:`over_samples`."""
    if mesh is None:
        return array
    greatest: Array = lax.pmax(array, AXIS)
    return greatest


def own_part(mesh: Mesh | None, n: int) -> int | Array:
    """Number of this device's first sample among all n, inside :func:`over_samples`."""
    return 0 if mesh is None else lax.axis_index(AXIS) * (n // mesh.size)


def product(mesh: Mesh | None, rows: Array, other: Array) -> Array:
    """This device's rows of A B, inside :func:`over_samples`, where A and B are both spread.

    B's parts are passed from device to device, so that no device ever holds the whole.
    """
    if mesh is None:
        return rows @ other
    width = other.shape[0]

    def add(product: Array, part: Array, source: Array) -> Array:
        return product + lax.dynamic_slice_in_dim(rows, source * width, width, axis=1) @ part

    start = jnp.zeros((rows.shape[0], other.shape[1]), jnp.result_type(rows, other))
    return _pass_around(mesh, add, start, other)


def outer(mesh: Mesh | None, rows: Array, other: Array) -> Array:
    """This device's rows of A B^T, inside :func:`over_samples`, where A and B are both spread."""
    if mesh is None:
        return rows @ other.T
    width = other.shape[0]

    def put(product: Array, part: Array, source: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(product, rows @ part.T, source * width, axis=1)

    shape = (rows.shape[0], width * mesh.size)
    return _pass_around(mesh, put, jnp.zeros(shape, jnp.result_type(rows, other)), other)


def transposed(mesh: Mesh | None, rows: Array) -> Array:
    """This device's rows of a square matrix transposed, inside :func:`over_samples`."""
    return columns(mesh, rows, axis=1).T


def columns(mesh: Mesh | None, rows: Array, axis: int) -> Array:
    """All rows of an array for this device's share of ``axis``, inside :func:`over_samples`."""
    if mesh is None:
        return rows
    share: Array = lax.all_to_all(rows, AXIS, split_axis=axis, concat_axis=0, tiled=True)
    return share


def _pass_around(
    mesh: Mesh, combine: Callable[[Array, Array, Array], Array], start: Array, part: Array
) -> Array:
    """Combine the parts of all devices with ``start``, one after the other, a device's own first.

    ``combine`` takes the result so far, a part, and the number of the device that it belongs to.
    """
    towards = [(device, (device - 1) % mesh.size) for device in range(mesh.size)]
    own = lax.axis_index(AXIS)

    def turn(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        combined, part = carry
        combined = combine(combined, part, (own + k) % mesh.size)
        return combined, lax.ppermute(part, AXIS, towards)

    combined, part = lax.fori_loop(0, mesh.size - 1, turn, (start, part))
    return combine(combined, part, (own + mesh.size - 1) % mesh.size)


def gathered(mesh: Mesh | None, rows: Array, axis: int = 0) -> Array:
    """The rows of all devices, on each of them, inside :func:`over_samples`."""
    # The compiler cannot gather arrays without entries.
    if mesh is None or rows.shape[axis] == 0:
        return rows
    all_rows: Array = lax.all_gather(rows, AXIS, axis=axis, tiled=True)
    return all_rows


def diagonal(mesh: Mesh | None, terms: Float[Array, "R m n ..."]) -> Float[Array, "R n ..."]:
    """Blocks of samples with themselves, whole on each device, of terms whose rows are spread.

    The rows begin with the n samples of the columns.
    """
    n_rows, n = terms.shape[1:3]

    def diagonal_of_rows(rows: Array) -> Array:
        own = jnp.arange(rows.shape[1])
        # Rows beyond the columns have no diagonal: entries taken in its place are cut off below.
        blocks = rows[:, own, jnp.minimum(own_part(mesh, n_rows) + own, n - 1)]
        return gathered(mesh, blocks, axis=1)[:, :n]

    return over_samples(diagonal_of_rows, mesh, (1,), None)(terms)


def whole(tree: _Tree) -> _Tree:
    """Arrays that are spread over the devices of several processes, whole on all of them."""

    def gathered(leaf: object) -> object:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        assert isinstance(leaf.sharding, NamedSharding)
        on_all = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.jit(lambda array: array, out_shardings=on_all)(leaf)

    gathered_tree: _Tree = jax.tree.map(gathered, tree)
    return gathered_tree


def on_host(array: Array | np.ndarray) -> np.ndarray:
    """A whole array in the memory of each process."""
    if isinstance(array, np.ndarray):
        return array
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def bytes_on_host(mesh: Mesh | None, needed: int) -> int:
    """Share of ``needed`` bytes that falls on the default device, or on a host of several."""
    if mesh is None:
        return needed
    sharing = len(mesh.local_devices) if mesh.devices.flat[0].platform == "cpu" else 1
    return math.ceil(needed * sharing / mesh.size)


def _put(array: Array | np.ndarray, sharding: NamedSharding) -> Array:
    whole_here = (
        isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.is_fully_addressable
    )
    if not whole_here or sharding.is_fully_addressable:
        placed: Array = jax.device_put(array, sharding)
        return placed
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(array), sharding)
        key: Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        return key
    # Each process has the whole array and hands its own devices their parts.
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _rows(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
