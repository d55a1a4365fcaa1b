"""Decompositions are those of NumPy and SciPy, and LAPACK gets one matrix at a time."""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax._src import test_util as jtu

from ntkdp._backend import decompositions

BATCHED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "eigh": lambda a, b: decompositions.eigh(a)[0],
    "eigvalsh": lambda a, b: decompositions.eigvalsh(a),
    "eigvals": lambda a, b: decompositions.eigvals(a),
    "cholesky": lambda a, b: decompositions.cholesky(a),
    "solve": decompositions.solve,
    "solve_lower": decompositions.solve_lower,
    "pinv": lambda a, b: decompositions.pinv(a, rtol=1e-8),
}


def matrices(*batch: int) -> tuple[jax.Array, jax.Array]:
    rows = jax.random.normal(jax.random.key(0), (*batch, 4, 6))
    return rows @ jnp.swapaxes(rows, -1, -2), jax.random.normal(jax.random.key(1), (*batch, 4, 2))


def peer(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    values: np.ndarray = {
        "eigh": lambda: np.linalg.eigh(a)[0],
        "eigvalsh": lambda: np.linalg.eigvalsh(a),
        "eigvals": lambda: np.linalg.eigvals(a),
        "cholesky": lambda: np.linalg.cholesky(a),
        "solve": lambda: np.linalg.solve(a, b),
        "solve_lower": lambda: scipy.linalg.solve_triangular(a, b, lower=True),
        "pinv": lambda: np.linalg.pinv(a),
    }[name]()
    return values


def operand_ranks(jaxpr: jax.extend.core.Jaxpr) -> list[int]:
    """Ranks of whatever LAPACK gets: the operands of each decomposition, at any depth."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("eigh", "eig", "cholesky", "lu", "svd", "triangular_solve"):
            found += [len(getattr(var.aval, "shape", ())) for var in eqn.invars]
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += operand_ranks(inner)
    return found


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_values_are_those_of_numpy_and_scipy(name: str, batch: tuple[int, ...]) -> None:
    a, b = matrices(*batch)
    values = np.asarray(BATCHED[name](a, b)).reshape(-1, *BATCHED[name](a, b).shape[len(batch) :])
    flat_a, flat_b = a.reshape(-1, 4, 4), b.reshape(-1, 4, 2)
    for one, a_one, b_one in zip(values, np.asarray(flat_a), np.asarray(flat_b), strict=True):
        expected = peer(name, a_one, b_one)
        if name == "eigvals":
            one, expected = np.sort_complex(one), np.sort_complex(expected)
        np.testing.assert_allclose(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices decompose in batches")
def test_lapack_never_gets_a_batch(name: str) -> None:
    a, b = matrices(5)
    for function in (BATCHED[name], jax.vmap(BATCHED[name])):
        ranks = operand_ranks(jax.make_jaxpr(function)(a, b).jaxpr)
        assert ranks, "no decomposition found"
        assert max(ranks) == 2


def test_derivatives_are_those_of_the_decomposition() -> None:
    a, _ = matrices()
    slope = jax.grad(lambda a: decompositions.eigvalsh(a)[-1])(a)
    top = np.linalg.eigh(a)[1][:, -1]
    np.testing.assert_allclose(slope, np.outer(top, top), atol=1e-10)
    pair = jnp.stack([a, 2 * a])
    both = jax.vmap(jax.grad(lambda a: decompositions.eigvalsh(a)[-1]))(pair)
    np.testing.assert_allclose(both, np.stack([np.outer(top, top)] * 2), atol=1e-10)


def test_a_batch_outside_of_programs_is_compiled_once() -> None:
    a, _ = matrices(7)
    decompositions.cholesky(a)
    with jtu.count_jit_and_pmap_lowerings() as count:
        decompositions.cholesky(2 * a)
    assert count() <= 1  # the product
