r"""Per-sample gradients in factored form, and their inner products without the gradients.

The gradient of sample i in a weight is :math:`g_i = \sum_t x_{it} \otimes \delta_{it}`, with the
input x of a product and the cotangent :math:`\delta` of its output at position t. Norms, weighted
sums and inner products are contracted in the order that takes the fewest operations.

Axes: n samples; b cotangents of a sample, one (the output gradient) or K (a basis of the outputs);
g blocks of a block-diagonal product, mostly one; t positions; p inputs; q outputs.
"""

from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from ntkdp._backend.types import Array
from ntkdp._gradients.leaf_layout import Layout

#: An operation in many small products takes about as long as this many in one large product.
_COST_OF_SMALL_PRODUCTS = 3
#: Entries of a sample's gradient that are formed at a time, so that they stay near the processor.
_SLAB = 10_000
#: Least rows of a band when only the upper half of a matrix times its own transpose is computed.
_BAND = 160
#: Most bands of such a matrix.
_MOST_BANDS = 8


class Outer(eqx.Module):
    """Gradients ``sum_t inputs[n, g, t, p] cotangents[n, b, g, t, q]``."""

    inputs: Array
    cotangents: Array
    layout: Layout = eqx.field(static=True)


class Lookup(eqx.Module):
    """Gradients in the rows of a table: row ``rows[n, t]`` gets ``cotangents[n, b, t, q]``."""

    rows: Array
    cotangents: Array
    n_rows: int = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)


class Dense(eqx.Module):
    """Gradients themselves: ``(n, b, *leaf)``, or ``(n, b, g, q, p)`` if there is a layout."""

    gradients: Array
    layout: Layout | None = eqx.field(static=True, default=None)


Part: TypeAlias = Outer | Lookup | Dense
#: The gradients in a leaf: parts that hold different entries of it, or none if it is unused.
Factor: TypeAlias = tuple[Part, ...]


def _materialised(part: Part) -> Dense:
    if isinstance(part, Outer):

        def gradients_of(delta: Array) -> Array:
            return jnp.einsum("ngtq,ngtp->ngqp", delta, part.inputs)

        if part.cotangents.shape[1] == 1:
            return Dense(gradients_of(part.cotangents[:, 0])[:, None], part.layout)
        # For one cotangent at a time the operands of the product need no rearrangement.
        gradients = lax.map(gradients_of, jnp.moveaxis(part.cotangents, 1, 0))
        return Dense(jnp.moveaxis(gradients, 0, 1), part.layout)
    if isinstance(part, Lookup):
        n, b, _, q = part.cotangents.shape
        table = jnp.zeros((n, b, part.n_rows, q), part.cotangents.dtype)
        # NumPy moves the axes of separated advanced indices to the front: (n, t, b, q).
        moved = jnp.moveaxis(part.cotangents, 2, 1)
        gradients = table.at[jnp.arange(n)[:, None], :, part.rows].add(moved)
        return Dense(jnp.swapaxes(gradients, 2, 3)[:, :, None], part.layout)
    return part


def _extents(part: Outer | Lookup) -> tuple[int, int, int, int, int]:
    if isinstance(part, Lookup):
        _, b, t, q = part.cotangents.shape
        return b, 1, t, part.n_rows, q
    _, b, g, t, q = part.cotangents.shape
    return b, g, t, part.inputs.shape[-1], q


def for_norms(factor: Factor) -> Factor:
    """The factor in the form in which norms and a weighted sum take the fewest operations (b = 1).

    Gradients are formed where that takes little more memory than the factors do.
    """

    def settle(part: Part) -> Part:
        if isinstance(part, Dense):
            return part
        _, _, t, p, q = _extents(part)
        if isinstance(part, Lookup):
            return _materialised(part) if p <= t else part
        return _materialised(part) if is_formed_for_norms(t, p, q) else part

    return tuple(settle(part) for part in factor)


def is_formed_for_norms(t: int, p: int, q: int) -> bool:
    """Whether a gradient takes little more memory than its factors."""
    return t > 1 and p * q <= 2 * t * (p + q)


def for_kernel(factor: Factor) -> Factor:
    """The factor for inner products: gradients are formed if they take little more memory."""

    def settle(part: Part) -> Part:
        if isinstance(part, Outer):
            _, _, t, p, q = _extents(part)
            if is_formed_for_kernel(t, p, q):
                return _materialised(part)
        return part

    return tuple(settle(part) for part in factor)


def is_formed_for_kernel(t: int, p: int, q: int) -> bool:
    """Whether a gradient takes little more memory than its cotangents."""
    return t > 1 and p * q <= 2 * t * q


def keep(factor: Factor, usable: Array) -> Factor:
    """The factor with zeros in place of the samples that are not usable."""

    def zeroed(values: Array) -> Array:
        return jnp.where(usable.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    def without(part: Part) -> Part:
        if isinstance(part, Dense):
            return Dense(zeroed(part.gradients), part.layout)
        if isinstance(part, Lookup):
            return Lookup(part.rows, zeroed(part.cotangents), part.n_rows, part.layout)
        return Outer(zeroed(part.inputs), zeroed(part.cotangents), part.layout)

    return tuple(without(part) for part in factor)


def kernel(rows: Factor, columns: Factor | None = None) -> Array | float:
    """Inner products of all gradients, ``(n1, b1, n2, b2)``; without columns, of rows with rows."""
    total: Array | float = 0.0
    for row, column in zip(rows, [None] * len(rows) if columns is None else columns, strict=True):
        total = total + _kernel_of_part(row, column)
    return total


def _kernel_of_part(row: Part, column: Part | None) -> Array:
    """Inner products in one part of a leaf; without a column, of the row with itself."""
    other = row if column is None else column
    if isinstance(row, Dense) or isinstance(other, Dense):
        return _dense_kernel(row, column)
    if _is_cheaper_through_positions(row):
        return _kernel_through_positions(row, other)
    if isinstance(row, Lookup) or isinstance(column, Lookup | Dense):
        return _dense_kernel(row, column)
    if row.inputs.shape[1:3] == (1, 1):
        return _product_kernel(row, column)
    return _slab_kernel(row, column)


def _is_cheaper_through_positions(part: Outer | Lookup) -> bool:
    b, g, t, p, q = _extents(part)
    if t == 1 and isinstance(part, Outer):
        return False
    # Operations for a pair of samples: how many samples there are may differ by side.
    gram = 0 if isinstance(part, Lookup) else t * t * p
    middle = g * (gram + b * t * t * q + b * b * t * q)
    return _COST_OF_SMALL_PRODUCTS * middle < b * b * g * p * q


def _dense_kernel(row: Part, column: Part | None) -> Array:
    parts = [row] if column is None else [row, column]
    return _inner_products(*[_materialised(part).gradients for part in parts])


def _product_kernel(row: Outer, column: Outer | None) -> Array:
    parts = [row] if column is None else [row, column]
    gram = _inner_products(*[part.inputs for part in parts])
    return _inner_products(*[part.cotangents for part in parts]) * gram


def _slab_kernel(row: Outer, column: Outer | None) -> Array:
    """Inner products of gradients that are formed a slab of inputs or of outputs at a time."""
    parts = [row] if column is None else [row, column]
    _, g, _, p, q = _extents(row)
    cut_axis = 0 if p >= q else 1
    n_slabs = min(-(-g * p * q // _SLAB), max(p, q))

    both = [_positions_last(part) for part in parts]
    if n_slabs == 1:
        return _inner_products(*[_formed(*pair) for pair in both])
    cuts = [_cut_into_slabs(pair[cut_axis], n_slabs) for pair in both]

    def add(total: Array, slabs: list[Array]) -> tuple[Array, None]:
        formed = []
        for slab, pair in zip(slabs, both, strict=True):
            formed.append(_formed(slab, pair[1]) if cut_axis == 0 else _formed(pair[0], slab))
        return total + _inner_products(*formed), None

    sizes = [extent for part in parts for extent in part.cotangents.shape[:2]]
    n, b, m, c = (sizes * 2)[:4]
    total, _ = lax.scan(add, jnp.zeros((n, b, m, c), row.cotangents.dtype), cuts)
    return total


def _positions_last(part: Outer) -> tuple[Array, Array]:
    """Inputs ``(n, g, p, t)`` and cotangents ``(n, g, b, q, t)``, to be summed over t."""
    return jnp.swapaxes(part.inputs, 2, 3), jnp.transpose(part.cotangents, (0, 2, 1, 4, 3))


def _formed(x: Array, delta: Array) -> Array:
    """Gradients ``(n, b, g, q, p)`` from ``(n, g, p, t)`` and ``(n, g, b, q, t)``."""
    n, g, b, q, t = delta.shape
    batched = (((3,), (3,)), ((0, 1), (0, 1)))
    gradients = lax.dot_general(delta.reshape(n, g, b * q, t), x, batched)
    return jnp.moveaxis(gradients.reshape(n, g, b, q, -1), 1, 2)


def _cut_into_slabs(values: Array, n_slabs: int) -> Array:
    """Slabs along the axis before the last, padded by zeros, on a new first axis."""
    size = -(-values.shape[-2] // n_slabs)
    width = [(0, 0)] * values.ndim
    width[-2] = (0, n_slabs * size - values.shape[-2])
    padded = jnp.pad(values, width)
    cut = padded.reshape(*padded.shape[:-2], n_slabs, size, padded.shape[-1])
    return jnp.moveaxis(cut, -3, 0)


def _inner_products(first: Array, second: Array | None = None) -> Array:
    """Inner products of arrays ``(n, b, ...)`` over all but the first two axes."""
    n, b = first.shape[:2]
    left = first.reshape(n * b, -1)
    if second is None:
        return _times_own_transpose(left).reshape(n, b, n, b)
    m, c = second.shape[:2]
    return (left @ second.reshape(m * c, -1).T).reshape(n, b, m, c)


def _times_own_transpose(matrix: Array) -> Array:
    rows, columns = matrix.shape
    bands = min(rows // _BAND, _MOST_BANDS)
    # To copy a long matrix in bands costs more than the half of the product that is saved.
    if bands < 2 or columns > max(_SLAB, 4 * rows):
        return matrix @ matrix.T
    height = -(-rows // bands)
    result = jnp.zeros((rows, rows), matrix.dtype)
    for start in range(0, rows, height):
        end = min(start + height, rows)
        band = matrix[start:end] @ matrix[start:].T
        result = lax.dynamic_update_slice(result, band, (start, start))
        if end < rows:
            result = lax.dynamic_update_slice(result, band[:, end - start :].T, (end, start))
    return result


def _kernel_through_positions(row: Outer | Lookup, column: Outer | Lookup) -> Array:
    """Cotangents contracted through the inner products of the inputs at all pairs of positions."""
    is_lookup = isinstance(column, Lookup)
    others = column.rows if isinstance(column, Lookup) else column.inputs
    deltas = column.cotangents[:, :, None] if is_lookup else column.cotangents

    def kernel_row(sample: tuple[Array, Array]) -> Array:
        x, delta = sample
        if is_lookup:
            delta = delta[:, None]
            gram = (others[:, None, :, None] == x).astype(delta.dtype)
        else:
            gram = jnp.einsum("mgsp,gtp->mgst", others, x)
        through = jnp.einsum("mgst,bgtq->mbgsq", gram, delta)
        return jnp.einsum("mbgsq,mcgsq->bmc", through, deltas)

    inputs = row.rows if isinstance(row, Lookup) else row.inputs
    rows: Array = lax.map(kernel_row, (inputs, row.cotangents))
    return rows
