"""The kernel of a linear head, in factored form: against Jacobians by JAX and products by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, known, normal

import ntkdp
from ntkdp import models, ntk

X, X2 = normal(0, 5, 2, 3), normal(1, 4, 2, 3)


@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
@pytest.mark.parametrize("b_std", [None, 0.3])
def test_it_is_the_product_of_jacobians(parameterization: Any, b_std: float | None) -> None:
    model = models.linear(2, W_std=1.5, b_std=b_std, parameterization=parameterization)
    params = model.init(KEY, X)
    jacobians = [
        np.concatenate(
            [
                np.asarray(leaf).reshape(len(x), 2, -1)
                for leaf in jax.tree.leaves(jax.jacobian(model.apply)(params, x))
            ],
            axis=2,
        )
        for x in (X, X2)
    ]
    expected = np.einsum("ikp,jlp->ijkl", *jacobians)
    found = ntkdp.linear_ntk(model, X, X2)
    assert found.shape == (5, 4)
    np.testing.assert_allclose(
        np.einsum("ij,kl->ijkl", found.written_out(), np.eye(2)), expected, atol=1e-12
    )


def test_a_head_is_x_w_plus_b() -> None:
    model = models.linear(3)
    params = model.init(KEY, X)
    W, b = jax.tree.leaves(params)
    assert W.shape == (6, 3)
    np.testing.assert_allclose(model.apply(params, X), X.reshape(5, 6) @ W + b, atol=1e-12)
    np.testing.assert_allclose(
        known(model.features)(X), np.column_stack([X.reshape(5, 6), np.ones(5)])
    )


def test_only_heads_have_features() -> None:
    assert models.mlp([], 1).features is not None
    hidden = models.mlp([4], 1)
    assert hidden.features is None
    with pytest.raises(ValueError, match="got one without features; use empirical_ntk"):
        ntkdp.linear_ntk(hidden, X)


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (np.ones(3), None, r"rows must have shape \(n, D\)"),
        (np.ones((3, 2)), np.ones((0, 2)), r"columns must have shape \(n, D\)"),
        (np.ones((3, 2)), np.ones((3, 1)), r"same number of features.* \(3, 2\) and \(3, 1\)"),
    ],
)
def test_features_that_do_not_fit(rows: Any, columns: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ntkdp.FeatureKernel(rows, columns)


def test_whole_numbers_become_real_ones() -> None:
    kernel = ntkdp.FeatureKernel(np.array([[1, 2], [3, 4]]))
    assert kernel.dtype == jnp.float64
    np.testing.assert_array_equal(kernel.written_out(), [[5.0, 11.0], [11.0, 25.0]])


def test_a_kernel_that_does_not_fit_is_not_written_out() -> None:
    x = jnp.zeros((10_000_000, 1), jnp.float32)
    with pytest.raises(MemoryError, match=r"10000000 x 10000000.*keep it in factored form"):
        ntkdp.FeatureKernel(x).written_out()


def test_fewer_features_keep_lengths_and_leading_directions() -> None:
    """Eight features of twenty: six eigenvectors by NumPy, and two for the rest."""
    x, other = (
        np.asarray(normal(seed, n, 20)) * 0.7 ** np.arange(20) for seed, n in ((2, 40), (3, 5))
    )
    few, few_other = ntk.fewer_features(x, other, n_features=8, key=KEY)
    assert few.shape == (40, 8)
    leading = np.linalg.eigh(x.T @ x)[1][:, -6:]
    for full, mapped in ((x, np.asarray(few)), (other, np.asarray(few_other))):
        np.testing.assert_allclose(
            np.linalg.norm(mapped, axis=1), np.linalg.norm(full, axis=1), rtol=1e-10
        )
        kept = full @ leading
        np.testing.assert_allclose(mapped[:, :6] @ mapped[:, :6].T, kept @ kept.T, atol=1e-10)


def test_what_is_left_out_is_off_at_random() -> None:
    """Between two orthogonal points in twelve dimensions: about zero, of variance near 1/s."""
    x = np.concatenate([10 * np.eye(18)[:6], np.eye(18)[6:]])

    def product(key: Any) -> Any:
        (few,) = ntk.fewer_features(x, n_features=8, key=key)
        return few[6] @ few[7]

    errors = np.asarray(jax.vmap(product)(jax.random.split(KEY, 400)))
    assert abs(errors.mean()) < 4 * errors.std() / 20
    # Two random directions in the plane: the mean of a squared cosine.
    assert abs((errors**2).mean() - 0.5) < 4 * (errors**2).std() / 20


def test_no_fewer_features_than_there_are() -> None:
    x = normal(4, 5, 3)
    (same,) = ntk.fewer_features(x, n_features=3, key=KEY)
    np.testing.assert_array_equal(same, x)
    with pytest.raises(ValueError, match=r"shapes \(n, D\) and \(m, D\), got \(5, 3\), \(4, 2\)"):
        ntk.fewer_features(x, np.ones((4, 2)), n_features=2, key=KEY)
