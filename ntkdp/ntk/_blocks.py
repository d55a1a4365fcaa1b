"""Assembly of a kernel from blocks, within planned memory.

Blocks are so large that the factors of one side, and the products, stay within a budget. Factors of
all columns are kept if they take no more than half of the result; otherwise they are computed anew
for each row of blocks. In a kernel of samples with themselves only the blocks on and above the
diagonal are computed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import memory
from ntkdp._backend.types import Array, PyTree
from ntkdp._gradients import per_sample as per_sample

Factors: TypeAlias = list[per_sample.Factor]
FactorsOf: TypeAlias = Callable[[Array], Factors]

#: Bytes that the products of a block may take.
_PRODUCT_BYTES = 2**25


class _Terms(NamedTuple):
    """The terms of a kernel: which leaf belongs to which, and the outputs of a sample."""

    leaf_to_group: tuple[int, ...]
    n_groups: int
    n_outputs: int

    def block(self, rows: Factors, columns: Factors | None, shape: tuple[int, int]) -> Array:
        """Terms ``(R, *shape, K, K)`` from factors; without columns, of rows with rows."""
        terms: list[Array | float] = [0.0] * self.n_groups
        for number, (group, row) in enumerate(zip(self.leaf_to_group, rows, strict=True)):
            column = None if columns is None else columns[number]
            terms[group] = terms[group] + per_sample.kernel(row, column)
        full = (shape[0], self.n_outputs, shape[1], self.n_outputs)
        stacked = jnp.stack([jnp.broadcast_to(term, full) for term in terms])
        return jnp.transpose(stacked, (0, 1, 3, 2, 4))


class _Plan(NamedTuple):
    """Samples along both sides of a block, and whether factors of all columns are kept."""

    height: int
    width: int
    keeps_columns: bool
    dtype: np.dtype


def assemble(
    factors: FactorsOf,
    leaf_to_group: tuple[int, ...],
    n_groups: int,
    n_outputs: int,
    x1: Array,
    x2: Array | None,
    batch_size: int | None,
    column_factors: FactorsOf | None = None,
) -> Array:
    """Terms of the kernel, ``(R, n1, n2, K, K)``; without ``x2``, of x1 with itself.

    Columns may have factors of their own, for a kernel between two networks.
    """
    terms = _Terms(leaf_to_group, n_groups, n_outputs)
    x_columns = x1 if x2 is None else x2
    n1, n2 = x1.shape[0], x_columns.shape[0]
    plan = _planned(factors, terms, x1, n2, batch_size)
    is_symmetric = x2 is None and column_factors is None
    of_columns = factors if column_factors is None else column_factors
    if (plan.height, plan.width) == (n1, n2):
        return terms.block(factors(x1), None if is_symmetric else of_columns(x_columns), (n1, n2))
    return _filled(factors, of_columns, terms, plan, x1, x_columns, is_symmetric=is_symmetric)


def _planned(
    factors: FactorsOf, terms: _Terms, x1: Array, n2: int, batch_size: int | None
) -> _Plan:
    n1 = x1.shape[0]
    one_sample = jax.eval_shape(factors, x1[:1])
    one_block = jax.eval_shape(lambda rows: terms.block(rows, None, (1, 1)), one_sample)
    if batch_size is None:
        # While a block is put together there is a product for each leaf, besides the terms.
        n_products = terms.n_groups + len(terms.leaf_to_group)
        products = _bytes(one_block) * n_products // terms.n_groups
        largest = _samples_within_budget(_bytes(one_sample), products)
        # Blocks of even size, so that none is computed twice to be full.
        batch_size = -(-max(n1, n2) // -(-max(n1, n2) // largest))
    return _Plan(
        height=min(batch_size, n1),
        width=min(batch_size, n2),
        keeps_columns=2 * n2 * _bytes(one_sample) <= n1 * n2 * _bytes(one_block),
        dtype=one_block.dtype,
    )


def _bytes(arrays: PyTree) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))


def _samples_within_budget(factors: int, products: int) -> int:
    """Samples along a side, from the bytes that a sample and a pair of samples take."""
    by_factors = memory.FACTOR_BYTES // max(factors, 1)
    by_products = math.isqrt(_PRODUCT_BYTES // products)
    return max(1, min(by_factors, by_products))


def _filled(
    factors: FactorsOf,
    of_columns: FactorsOf,
    terms: _Terms,
    plan: _Plan,
    x1: Array,
    x2: Array,
    *,
    is_symmetric: bool,
) -> Array:
    """The kernel, filled row by row of blocks; if it is symmetric, from the diagonal on."""
    n1, n2 = x1.shape[0], x2.shape[0]
    row_starts, column_starts = _starts(n1, plan.height), _starts(n2, plan.width)
    columns = _factors_of_columns(of_columns, plan, x2, column_starts)

    def fill_row(i: Array, result: Array) -> Array:
        if is_symmetric:
            rows = columns(i)
        else:
            rows = factors(lax.dynamic_slice_in_dim(x1, row_starts[i], plan.height))

        def fill_block(j: Array, result: Array) -> Array:
            block = terms.block(rows, columns(j), (plan.height, plan.width))
            start = (0, row_starts[i], column_starts[j], 0, 0)
            result = lax.dynamic_update_slice(result, block, start)
            if is_symmetric:
                mirrored = jnp.transpose(block, (0, 2, 1, 4, 3))
                start = (0, column_starts[j], row_starts[i], 0, 0)
                result = lax.dynamic_update_slice(result, mirrored, start)
            return result

        def fill_from_diagonal(j: Array, result: Array) -> Array:
            filled: Array = lax.cond(j >= i, fill_block, lambda j, result: result, j, result)
            return filled

        fill = fill_from_diagonal if is_symmetric else fill_block
        filled: Array = lax.fori_loop(0, column_starts.shape[0], fill, result)
        return filled

    result = jnp.zeros((terms.n_groups, n1, n2, terms.n_outputs, terms.n_outputs), plan.dtype)
    filled: Array = lax.fori_loop(0, row_starts.shape[0], fill_row, result)
    return filled


def _starts(n: int, size: int) -> Array:
    """Where blocks begin; the last begins early, so that every block has the same shape."""
    return jnp.minimum(jnp.arange(0, n, size), n - size)


def _factors_of_columns(
    factors: FactorsOf, plan: _Plan, x2: Array, starts: Array
) -> Callable[[Array], Factors]:
    """Factors of a block of columns by its number, kept or computed anew."""

    def computed(j: Array) -> Factors:
        return factors(lax.dynamic_slice_in_dim(x2, starts[j], plan.width))

    if not plan.keeps_columns:
        return computed
    kept = lax.map(computed, jnp.arange(starts.shape[0]))

    def looked_up(j: Array) -> Factors:
        chosen: Factors = jax.tree.map(lambda values: values[j], kept)
        return chosen

    return looked_up
