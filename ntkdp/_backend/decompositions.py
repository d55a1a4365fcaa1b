"""Matrix decompositions that stay one matrix at a time where a batch of them could wait for ever.

On CPUs, JAX divides a batch of decompositions over the threads that its programs run on, and waits
on one of these threads until all parts are done. If as many batches begin at once as there are
threads, in one program or in programs of several Python threads, every thread waits and none works.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.scipy.linalg import solve_triangular

from ntkdp._backend.types import Array

_Result = TypeVar("_Result", Array, tuple[Array, Array])


def _one_at_a_time(decompose: Callable[..., _Result], signature: str) -> Callable[..., _Result]:
    """The function over leading axes in sequence, on CPUs; derivatives are the function's own."""

    @jax.custom_jvp
    def one(*matrices: Array) -> _Result:
        in_sequence: _Result = sequential_vmap(decompose)(*matrices)
        return in_sequence

    @one.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[_Result, _Result]:
        value, derivative = jax.jvp(decompose, primals, tangents)
        return value, derivative

    # Outside of a program, a loop over matrices would be compiled anew at each call.
    batched = jax.jit(jnp.vectorize(one, signature=signature))

    def apply(*matrices: Array) -> _Result:
        result: _Result = (batched if jax.default_backend() == "cpu" else decompose)(*matrices)
        return result

    return apply


def _eigh(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


eigh = _one_at_a_time(_eigh, "(n,n)->(n),(n,n)")
eigvalsh = _one_at_a_time(lambda matrix: jnp.linalg.eigvalsh(matrix), "(n,n)->(n)")
eigvals = _one_at_a_time(lambda matrix: jnp.linalg.eigvals(matrix), "(n,n)->(n)")
cholesky = _one_at_a_time(lambda matrix: jnp.linalg.cholesky(matrix), "(n,n)->(n,n)")
solve = _one_at_a_time(lambda matrix, right: jnp.linalg.solve(matrix, right), "(n,n),(n,m)->(n,m)")
#: Solutions X of L X = B with L lower triangular.
solve_lower = _one_at_a_time(
    lambda matrix, right: solve_triangular(matrix, right, lower=True), "(n,n),(n,m)->(n,m)"
)


def pinv(matrix: Array, rtol: float) -> Array:
    """The pseudoinverse without singular values below this part of the largest one."""
    return _pinv(rtol)(matrix)


@lru_cache
def _pinv(rtol: float) -> Callable[..., Array]:
    return _one_at_a_time(lambda matrix: jnp.linalg.pinv(matrix, rtol=rtol), "(n,m)->(m,n)")
