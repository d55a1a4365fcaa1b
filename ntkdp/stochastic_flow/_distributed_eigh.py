r"""Eigenvalues and vectors of a symmetric matrix whose rows are spread over the devices of a mesh.

This is block Jacobi: the coordinates lie in two blocks a device. Each device diagonalises the part
of the matrix within its two blocks, all devices apply each other's rotations, and the blocks move
on, as players of a tournament do, until every two have met. Such a sweep reduces the part off the
diagonal, quadratically in the end, so few are needed: six to eight, and up to twenty if eigenvalues
are equal, when the part falls only by a factor each sweep. A device holds its columns of the matrix
and of the rotations so far.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from ntkdp._backend import compiled, devices
from ntkdp._backend.types import Array, Float

#: Sweeps end when the norm off the diagonal is this many roundings of the whole norm,
_CONVERGED_ROUNDINGS = 8
#: or this many, if a sweep no longer halves it.
_STALLED_ROUNDINGS = 1000
#: Sweeps end after this many in any case.
_MOST_SWEEPS = 40


class _Columns(NamedTuple):
    """A device's columns ``(N, 2 w)`` of the matrix and of the rotations, and its blocks' numbers.

    The matrix's rows are in the order of the blocks over the devices; the rotations' rows stay.
    """

    matrix: Array
    vectors: Array
    left: Array
    right: Array


@compiled.jit(static_argnums=0)
def eigh(mesh: Mesh, matrix: Float[Array, "N N"]) -> tuple[Float[Array, " N"], Float[Array, "N N"]]:
    """Eigenvalues, ascending and whole, and columns of vectors whose rows are spread."""
    return devices.over_samples(partial(_eigh_of_rows, mesh), mesh, (0,), (None, 0))(matrix)


def _eigh_of_rows(mesh: Mesh, rows: Array) -> tuple[Array, Array]:
    n = rows.shape[1]
    # Scaled, so that squares neither overflow nor vanish.
    scale = devices.largest(mesh, jnp.max(jnp.abs(rows)))
    scale = jnp.where(scale == 0, 1.0, scale)
    not_finite = devices.total(mesh, jnp.sum(~jnp.isfinite(rows)))
    rows = rows / scale
    norm = jnp.sqrt(devices.total(mesh, jnp.sum(rows**2)))
    rows = _even(mesh, rows, norm)
    width = rows.shape[0]
    place = devices.own_part(mesh, rows.shape[1])
    own = jnp.arange(width)
    # The matrix is symmetric: a device's rows are also its columns.
    start = _Columns(
        rows.T,
        jnp.zeros_like(rows.T).at[place + own, own].set(1.0),
        2 * lax.axis_index(devices.AXIS),
        2 * lax.axis_index(devices.AXIS) + 1,
    )

    def off_diagonal(columns: _Columns) -> Array:
        off = columns.matrix.at[place + own, own].set(0.0)
        return jnp.sqrt(devices.total(mesh, jnp.sum(off**2)))

    def more(carry: tuple[_Columns, Array, Array, Array]) -> Array:
        _, sweeps, left, before = carry
        # In the end rounding keeps the norm from falling.
        falls = (left < before / 2) | (left > _STALLED_ROUNDINGS * eps * norm)
        return (left > _CONVERGED_ROUNDINGS * eps * norm) & falls & (sweeps < _MOST_SWEEPS)

    def sweep(
        carry: tuple[_Columns, Array, Array, Array],
    ) -> tuple[_Columns, Array, Array, Array]:
        columns, sweeps, left, _ = carry
        rounds = 2 * mesh.size - 1
        columns = lax.fori_loop(0, rounds, lambda _, now: _move(mesh, _rotate(mesh, now)), columns)
        return columns, sweeps + 1, off_diagonal(columns), left

    eps = jnp.finfo(rows.dtype).eps
    none = jnp.zeros((), int)
    columns, *_ = lax.while_loop(more, sweep, (start, none, off_diagonal(start), jnp.inf * norm))
    values = lax.all_gather(columns.matrix[place + own, own], devices.AXIS, tiled=True)
    # The coordinates that were padded have the largest values, which are cut off.
    order = jnp.argsort(values)[:n]
    vectors = devices.transposed(mesh, columns.vectors.T)
    scale = jnp.where(not_finite == 0, scale, jnp.nan)
    return scale * values[order], vectors[: n // mesh.size, order]


def _even(mesh: Mesh, rows: Array, norm: Array) -> Array:
    """Rows of the matrix, padded to an even number of coordinates a device.

    A padded coordinate is an eigenvector by itself, with an eigenvalue above all others.
    """
    width, n = rows.shape
    if width % 2 == 0:
        return rows
    padded = jnp.pad(rows.reshape(width, mesh.size, width), ((0, 1), (0, 0), (0, 1)))
    padded = padded.reshape(width + 1, n + mesh.size)
    own = devices.own_part(mesh, n + mesh.size) + width
    return padded.at[width, own].set(2 * norm + 1)


def _rotate(mesh: Mesh, columns: _Columns) -> _Columns:
    """Diagonalise within each device's two blocks: the lower block takes the larger values."""
    matrix, vectors, left, right = columns
    width = matrix.shape[1]
    within = lax.dynamic_slice_in_dim(matrix, devices.own_part(mesh, len(matrix)), width)
    _, turn = jnp.linalg.eigh((within + within.T) / 2)
    turn = jnp.where(left < right, turn[:, ::-1], turn)
    turns = lax.all_gather(turn, devices.AXIS)
    split = (matrix @ turn).reshape(mesh.size, width, width)
    turned = jnp.einsum("dij,dik->djk", turns, split).reshape(matrix.shape)
    return _Columns(turned, vectors @ turn, left, right)


def _move(mesh: Mesh, columns: _Columns) -> _Columns:
    """Move the blocks to their next places: the first stays, all others rotate."""
    if mesh.size == 1:
        return columns
    matrix, vectors, left, right = columns
    half = matrix.shape[1] // 2
    lefts = matrix[:, :half], vectors[:, :half], left
    rights = matrix[:, half:], vectors[:, half:], right
    last, own = mesh.size - 1, lax.axis_index(devices.AXIS)
    up = [(device, device + 1) for device in range(last)]
    down = [(device + 1, device) for device in range(last)]

    def places(left: Array, right: Array) -> tuple[Array, Array]:
        leaving = jnp.where(own == 0, right, left)
        from_below = lax.ppermute(leaving, devices.AXIS, up)
        from_above = lax.ppermute(right, devices.AXIS, down)
        return jnp.where(own == 0, left, from_below), jnp.where(own == last, left, from_above)

    moved = [places(left, right) for left, right in zip(lefts, rights, strict=True)]
    matrix, vectors = (jnp.concatenate(pair, axis=1) for pair in moved[:2])
    blocks = matrix.reshape(2 * mesh.size, half, 2 * half)
    return _Columns(blocks[_next_places(mesh.size)].reshape(matrix.shape), vectors, *moved[2])


def _next_places(size: int) -> np.ndarray:
    """Where the next block of each place is now; a device has an even and an odd place."""
    lefts, rights = 2 * np.arange(size), 2 * np.arange(size) + 1
    next_lefts = np.concatenate([lefts[:1], rights[:1], lefts[1:-1]])
    next_rights = np.concatenate([rights[1:], lefts[-1:]])
    return np.stack([next_lefts, next_rights], axis=1).ravel()
