"""The truth that kernels, norms and sums are held to: plain Jacobians of the whole batch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import Apply

from ntkdp._gradients import per_sample as per_sample
from ntkdp.ntk import layerwise_ntk, per_sample_gradient_norms


class Numbers:
    """Normal arrays, a new one at each call."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.random.normal(size=shape))

    def weight(self, *shape: int) -> jax.Array:
        """So small that deep networks stay of the order of one."""
        return self(*shape) / np.sqrt(math.prod(shape[:-1]))


def jacobians(apply: Apply, params: Any, x: jax.Array) -> list[np.ndarray]:
    """``(n, K, size)`` for each leaf, by plain reverse mode over the batch at once."""
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(apply))(params, x))
    return [np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in leaves]


def assert_close(got: Any, expected: list[np.ndarray], what: str) -> None:
    """Of each leaf, to its own scale; a leaf whose gradient cancels is only known to rounding."""
    whole = max(np.max(np.abs(e), initial=0.0) for e in expected)
    assert len(got) == len(expected)
    for number, (g, e) in enumerate(zip(got, expected, strict=True)):
        scale = max(np.max(np.abs(e), initial=0.0), 1e-12 * whole)
        np.testing.assert_allclose(
            g, e, rtol=0, atol=1e-8 * scale, err_msg=f"{what}, leaf {number}"
        )


def products(first: list[np.ndarray], second: list[np.ndarray]) -> list[np.ndarray]:
    return [np.einsum("ikp,jlp->ijkl", a, b) for a, b in zip(first, second, strict=True)]


def numbered(params: Any) -> Any:
    """Every leaf a group of its own."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [str(i) for i in range(len(leaves))])


def check(
    apply: Apply,
    params: Any,
    x: jax.Array,
    x2: jax.Array | None = None,
    batch_size: int | None = None,
    sums: bool = True,
) -> None:
    """Kernel and norms of every leaf, with weighted sums or as a caller gets them."""
    groups = numbered(params)
    J1 = jacobians(apply, params, x)
    H = products(J1, J1 if x2 is None else jacobians(apply, params, x2))
    kernel = layerwise_ntk(apply, params, x, x2, groups=groups, batch_size=batch_size)
    assert kernel.names == tuple(str(i) for i in range(len(J1)))
    assert_close(np.asarray(kernel.values), H, "kernel")

    n, n_outputs = J1[0].shape[:2]
    random = np.random.default_rng(0)
    a, weights = random.normal(size=(n, n_outputs)), random.normal(size=n)
    gradients = [np.einsum("nkp,nk->np", J, a) for J in J1]
    # Squares: a norm of a sum that cancels is known to the root of the rounding error only.
    squares = [np.sum(g**2, 1) for g in gradients]
    if not sums:
        norms = per_sample_gradient_norms(apply, params, x, jnp.asarray(a), groups=groups)
        assert_close(np.asarray(norms) ** 2, squares, "squared norms")
        return

    @jax.jit
    def norms_and_sums(params: Any, x: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        structure = per_sample.trace(apply, params, x)
        factors = per_sample.factored(structure, params, x, lambda f, b: b[None], jnp.asarray(a))[1]
        factors = [per_sample.for_norms(factor) for factor in factors]
        norms = per_sample.grouped_norms(factors, tuple(range(len(factors))), len(factors), n)
        return list(norms**2), [
            jnp.ravel(per_sample.weighted_sum(factor, jnp.asarray(weights), leaf))
            for factor, leaf in zip(factors, jax.tree.leaves(params), strict=True)
        ]

    got_squares, got_sums = norms_and_sums(params, x)
    assert_close(got_squares, squares, "squared norms")
    assert_close(got_sums, [weights @ g for g in gradients], "weighted sum")
