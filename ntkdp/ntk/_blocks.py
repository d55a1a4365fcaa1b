"""Assembly of a kernel from blocks, within planned memory.

Blocks are so large that the factors of one side, and the products, stay within a budget; factors of
all columns are kept when they take no more than half of the result, and computed anew for each row
of blocks otherwise. Of a kernel of samples with themselves only blocks on and above the diagonal
are computed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import memory
from ntkdp._backend.types import Array
from ntkdp._gradients import per_sample as per_sample

Factors = list[per_sample.Factor]
FactorsOf = Callable[[Array], Factors]

#: Bytes that the products of a block may take.
_PRODUCT_BYTES = 2**25


def assemble(
    factors: FactorsOf,
    leaf_to_group: tuple[int, ...],
    n_groups: int,
    n_outputs: int,
    x1: Array,
    x2: Array | None,
    batch_size: int | None,
) -> Array:
    """Terms of the kernel, ``(R, n1, n2, K, K)``; without ``x2``, of x1 with itself."""

    def block(rows: Factors, columns: Factors | None, shape: tuple[int, int]) -> Array:
        terms: list[Any] = [0.0] * n_groups
        for number, (group, row) in enumerate(zip(leaf_to_group, rows, strict=True)):
            column = None if columns is None else columns[number]
            terms[group] = terms[group] + per_sample.kernel(row, column)
        full = (shape[0], n_outputs, shape[1], n_outputs)
        stacked = jnp.stack([jnp.broadcast_to(term, full) for term in terms])
        return jnp.transpose(stacked, (0, 1, 3, 2, 4))

    columns_of_x2 = x1 if x2 is None else x2
    n1, n2 = x1.shape[0], columns_of_x2.shape[0]
    one_sample = jax.eval_shape(factors, x1[:1])
    one_term = jax.eval_shape(lambda rows: block(rows, None, (1, 1)), one_sample)
    if batch_size is None:
        # While a block is put together there is a product for each leaf, besides the terms.
        products = _bytes(one_term) * (n_groups + len(leaf_to_group)) // n_groups
        largest = _samples_within_budget(_bytes(one_sample), products)
        # Blocks of even size, so that none is computed twice to be full.
        batch_size = -(-max(n1, n2) // -(-max(n1, n2) // largest))
    if batch_size >= max(n1, n2):
        return block(factors(x1), None if x2 is None else factors(x2), (n1, n2))

    # The last block starts earlier rather than ends late: every block has the same shape.
    height, width = min(batch_size, n1), min(batch_size, n2)
    row_starts = jnp.minimum(jnp.arange(0, n1, height), n1 - height)
    column_starts = jnp.minimum(jnp.arange(0, n2, width), n2 - width)

    def columns_at(j: Any) -> Factors:
        return factors(lax.dynamic_slice_in_dim(columns_of_x2, column_starts[j], width))

    n_columns = column_starts.shape[0]
    if 2 * n2 * _bytes(one_sample) <= n1 * n2 * _bytes(one_term):
        kept = lax.map(columns_at, jnp.arange(n_columns))

        def columns(j: Any) -> Factors:
            return jax.tree.map(lambda values: values[j], kept)
    else:
        columns = columns_at

    def fill_row(i: Any, result: Array) -> Array:
        rows = (
            columns(i)
            if x2 is None
            else factors(lax.dynamic_slice_in_dim(x1, row_starts[i], height))
        )

        def fill_block(j: Any, result: Array) -> Array:
            found = block(rows, columns(j), (height, width))
            start = (0, row_starts[i], column_starts[j], 0, 0)
            result = lax.dynamic_update_slice(result, found, start)
            if x2 is None:
                mirrored = jnp.transpose(found, (0, 2, 1, 4, 3))
                start = (0, column_starts[j], row_starts[i], 0, 0)
                result = lax.dynamic_update_slice(result, mirrored, start)
            return result

        if x2 is not None:
            return lax.fori_loop(0, n_columns, fill_block, result)
        return lax.fori_loop(
            0,
            n_columns,
            lambda j, result: lax.cond(j >= i, fill_block, lambda j, result: result, j, result),
            result,
        )

    result = jnp.zeros((n_groups, n1, n2, n_outputs, n_outputs), one_term.dtype)
    return lax.fori_loop(0, row_starts.shape[0], fill_row, result)


def _bytes(arrays: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _samples_within_budget(factors: int, products: int) -> int:
    """Samples a side, from the bytes that one takes and that a pair takes."""
    by_factors = memory.FACTOR_BYTES // max(factors, 1)
    by_products = math.isqrt(_PRODUCT_BYTES // products)
    return max(1, min(by_factors, by_products))
