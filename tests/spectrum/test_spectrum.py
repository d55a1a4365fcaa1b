"""Spectra against NumPy and SciPy, closed forms, and full Hessians of small models."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import Apply, linear
from hypothesis import given
from hypothesis import strategies as st
from jax.typing import DTypeLike

import ntkdp
from ntkdp import clipping, losses, spectrum
from ntkdp.losses import Reduction

Params = dict[str, jax.Array]
SEEDS = st.integers(0, 2**32 - 1)


def random_terms(
    seed: int, n_groups: int = 2, n: int = 4, n_outputs: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(n_groups, n, n_outputs, 2 * n * n_outputs))
    factors = rng.uniform(0.01, 1.0, size=(n_groups, n))
    return np.einsum("rikp,rjlp->rijkl", jacobian, jacobian), factors


def as_kernel(terms: np.ndarray) -> ntkdp.LayerwiseKernel:
    return ntkdp.LayerwiseKernel(tuple(map(str, range(len(terms)))), jnp.asarray(terms))


def operator(terms: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """sum_r H_r C_r, entry by entry."""
    n_groups, n, _, k, _ = terms.shape
    result = np.zeros((n * k, n * k))
    for r in range(n_groups):
        for i in range(n):
            for j in range(n):
                result[i * k : (i + 1) * k, j * k : (j + 1) * k] += terms[r, i, j] * factors[r, j]
    return result


# --- dense ---------------------------------------------------------------------------------------


@given(seed=SEEDS)
def test_layerwise_spectra_against_scipy(seed: Any) -> None:
    terms, factors = random_terms(seed)
    kernel, expected = as_kernel(terms), operator(terms, factors)
    np.testing.assert_allclose(spectrum.clipped_operator(kernel, factors), expected, rtol=1e-12)
    found = np.asarray(spectrum.eigenvalues(kernel, factors))
    reference = scipy.linalg.eigvals(expected)
    assert np.iscomplexobj(found)
    # Every eigenvalue has a partner, whatever the order of those that coincide.
    distance = np.abs(found[:, None] - reference[None])
    scale = np.abs(reference).max()
    assert max(distance.min(axis=0).max(), distance.min(axis=1).max()) < 1e-9 * scale
    assert np.all(np.diff(found.real) >= 0)
    symmetric = np.linalg.eigvalsh((expected + expected.T) / 2)
    np.testing.assert_allclose(
        spectrum.symmetric_eigenvalues(kernel, factors), symmetric, rtol=1e-9, atol=1e-12 * scale
    )
    assert bool(spectrum.has_positive_quadratic_form(kernel, factors)) == (symmetric[0] > 0)
    positive = reference.real.min() > 0
    assert bool(spectrum.has_positive_eigenvalues(kernel, factors)) == positive
    moduli = np.abs(reference)
    condition = float(spectrum.condition_number(kernel, factors))
    assert condition == pytest.approx(moduli.max() / moduli.min(), rel=1e-8)


@given(seed=SEEDS)
def test_flat_spectra_against_scipy(seed: Any) -> None:
    terms, factors = random_terms(seed)
    expected = operator(terms, np.stack([factors[0]] * 2))
    reference = np.sort(scipy.linalg.eigvals(expected).real)
    # Of a LayerwiseKernel, flat factors take the total.
    for kernel in (as_kernel(terms), terms.sum(axis=0)):
        found = spectrum.eigenvalues(kernel, factors[0])
        assert not jnp.iscomplexobj(found)
        np.testing.assert_allclose(found, reference, rtol=1e-8)
        assert np.all(found > 0)
        assert spectrum.has_positive_eigenvalues(kernel, factors[0])
        form = np.linalg.eigvalsh(expected + expected.T)[0] > 0
        assert bool(spectrum.has_positive_quadratic_form(kernel, factors[0])) == form


def test_two_samples_in_closed_form() -> None:
    """C2: {0.0019, 1.0081}; C3: HC + CH has {-0.334, 2.354}."""
    kernel, factors = np.array([[1.0, 0.9], [0.9, 1.0]]), np.array([1.0, 0.01])
    np.testing.assert_allclose(spectrum.eigenvalues(kernel, factors), [0.0019, 1.0081], atol=5e-5)
    form = 2 * spectrum.symmetric_eigenvalues(kernel, factors)
    np.testing.assert_allclose(form, [-0.334, 2.354], atol=5e-4)
    assert spectrum.has_positive_eigenvalues(kernel, factors)
    assert not spectrum.has_positive_quadratic_form(kernel, factors)
    assert float(spectrum.condition_number(kernel)) == pytest.approx(19, rel=1e-12)
    # C4: the critical ratio is 2.5454.
    for ratio, holds in ((2.5453, True), (2.5455, False)):
        unequal = np.array([1.0, 1 / ratio])
        assert bool(spectrum.has_positive_quadratic_form(kernel, unequal)) == holds


def test_layerwise_eigenvalues_with_negative_real_part() -> None:
    """C13 at a = 20 (1, 1, 1): both terms are positive, the operator is not."""
    P = np.array([[1, -0.9, -0.22], [-0.9, 1, -0.22], [-0.22, -0.22, 1]])
    Q = np.array([[1, -0.22, -0.22], [-0.22, 1, -0.9], [-0.22, -0.9, 1]])
    D1, D2 = np.diag([1, 1, 0.1]), np.diag([0.1, 1, 1])
    terms = np.stack([D1 @ P @ D1, D2 @ Q @ D2])
    a = 20.0
    factors = np.minimum(1, 1 / (a * np.sqrt(np.einsum("rii->ri", terms))))
    kernel = as_kernel(terms)
    # H_r C_r a = R_r applied to unit gradients: da/dt is -(0.064, 0.24, 0.064).
    drift = -np.asarray(spectrum.clipped_operator(kernel, factors)) @ np.full(3, a)
    np.testing.assert_allclose(drift, [0.064, 0.24, 0.064], atol=5e-4)
    assert not spectrum.has_positive_quadratic_form(kernel, factors)
    assert spectrum.has_positive_quadratic_form(kernel)


def test_a_kernel_times_identity_keeps_each_eigenvalue_once() -> None:
    terms, factors = random_terms(0, n_groups=2, n=3, n_outputs=1)
    small = terms[..., 0, 0]
    full = np.einsum("rij,kl->rijkl", small, np.eye(3))
    for weights in (factors[0], factors):
        once = np.asarray(spectrum.eigenvalues(as_kernel(small), weights))
        thrice = np.asarray(spectrum.eigenvalues(as_kernel(full), weights))
        np.testing.assert_allclose(np.repeat(once.real, 3), thrice.real, rtol=1e-9)


def test_singular_kernels() -> None:
    J = np.random.default_rng(0).normal(size=(5, 3))
    kernel = J @ J.T
    assert float(spectrum.condition_number(kernel)) == np.inf
    assert not spectrum.has_positive_quadratic_form(kernel)
    assert not spectrum.has_positive_eigenvalues(kernel)
    assert float(spectrum.condition_number(np.zeros((2, 2)))) == np.inf
    assert not spectrum.has_positive_quadratic_form(np.zeros((2, 2)))
    # Sizes that differ are not singularity: the diagonal is scaled first.
    assert spectrum.has_positive_quadratic_form(np.diag([1e-20, 1.0]))
    assert not spectrum.has_positive_quadratic_form(np.eye(2), np.array([1.0, 0.0]))


def test_under_jit_and_float32() -> None:
    terms, of_samples = random_terms(1)
    kernel, factors = as_kernel(terms), jnp.asarray(of_samples)
    for f in (
        spectrum.clipped_operator,
        spectrum.eigenvalues,
        spectrum.symmetric_eigenvalues,
        spectrum.condition_number,
        spectrum.has_positive_quadratic_form,
        spectrum.has_positive_eigenvalues,
    ):
        for given_factors in (factors, factors[0], None):
            eager, compiled = f(kernel, given_factors), jax.jit(f)(kernel, given_factors)
            np.testing.assert_allclose(eager, compiled, rtol=1e-9)
            single = f(jax.tree.map(jnp.float32, kernel), given_factors)
            assert single.dtype in (jnp.float32, jnp.complex64, jnp.bool_)
            np.testing.assert_allclose(single, eager, rtol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "factors", "message"),
    [
        (np.ones((2, 3)), None, r"kernel must have shape \(n, n, K, K\), or \(n, n\)"),
        (np.zeros((0, 0)), None, "not empty"),
        (np.ones((2, 2, 1, 2)), None, "kernel must have shape"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), None, "kernel must be finite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), None, "entries that differ by 0.5"),
        (np.eye(2), np.ones(3), r"factors must have shape \(2,\).* got \(3,\)"),
        (np.eye(2), np.array([1.0, -0.5]), "factors must be at least 0"),
        (np.eye(2), np.array([1.0, np.nan]), "factors must be at least 0"),
        (np.eye(2), np.ones((1, 2)), "LayerwiseKernel"),
        (as_kernel(np.ones((2, 3, 3))), np.ones((3, 3)), r"got \(3, 3\)"),
        (as_kernel(np.ones((2, 3, 3))), 1.0, r"got \(\)"),
    ],
)
def test_bad_kernels_and_factors_are_named(kernel: Any, factors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectrum.eigenvalues(kernel, factors)


# --- without the matrix --------------------------------------------------------------------------


def two_layers(params: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def network(
    n: int, n_outputs: int = 3, width: int = 6, d: int = 5, dtype: DTypeLike = np.float64
) -> tuple[Apply, Params, jax.Array]:
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(d, width)), dtype),
        "v": jnp.asarray(rng.normal(size=(width, n_outputs)), dtype),
    }
    return two_layers, params, jnp.asarray(rng.normal(size=(n, d)), dtype)


@pytest.mark.parametrize(("n", "batch_size"), [(4, None), (15, None), (15, 4), (15, 15), (15, 99)])
def test_extremes_of_a_kernel_against_the_dense_one(n: int, batch_size: int | None) -> None:
    apply_fn, params, x = network(n, width=12)
    factors = np.random.default_rng(1).uniform(0.01, 1.0, n)
    for given_factors in (None, factors):
        found = spectrum.extreme_eigenvalues(
            apply_fn, params, x, factors=given_factors, batch_size=batch_size
        )
        kernel = np.asarray(ntkdp.empirical_ntk(apply_fn, params, x))
        matrix = kernel.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)
        roots = np.sqrt(np.repeat(np.ones(n) if given_factors is None else factors, 3))
        dense = np.linalg.eigvalsh(matrix * roots[:, None] * roots)
        assert dense[0] > 1e-6 * dense[-1]
        assert found.largest == pytest.approx(dense[-1], rel=1e-10)
        assert found.smallest == pytest.approx(dense[0], abs=1e-10 * dense[-1])


def test_extremes_of_singular_equal_and_zero_kernels() -> None:
    apply_fn, params, x = network(30)  # 30 x 3 outputs, 48 parameters
    found = spectrum.extreme_eigenvalues(apply_fn, params, x)
    assert found.smallest == pytest.approx(0, abs=1e-9 * found.largest)
    equal = spectrum.extreme_eigenvalues(lambda w, x: x @ w, jnp.ones((25, 1)), 3 * jnp.eye(25))
    assert equal == pytest.approx((9, 9), rel=1e-9)
    dead = spectrum.extreme_eigenvalues(
        lambda w, x: 0 * (x @ w), jnp.ones((5, 1)), jnp.ones((25, 5))
    )
    assert dead == (0, 0)
    rank_one = spectrum.extreme_eigenvalues(lambda w, x: x @ w, jnp.ones((1, 1)), jnp.ones((30, 1)))
    assert rank_one == pytest.approx((0, 30), abs=1e-8)


def test_extremes_in_float32() -> None:
    apply_fn, params, x = network(15, width=12, dtype=np.float32)
    found = spectrum.extreme_eigenvalues(apply_fn, params, x)
    exact = spectrum.extreme_eigenvalues(apply_fn, jax.tree.map(jnp.float64, params), x)
    assert found.largest == pytest.approx(exact.largest, rel=1e-4)
    assert found.smallest == pytest.approx(exact.smallest, abs=1e-4 * exact.largest)


def test_trouble_of_the_iteration_is_told() -> None:
    apply_fn, params, x = network(60, width=12)
    with pytest.raises(RuntimeError, match=r"did not converge to tolerance=1e-15 in .*=1; raise"):
        spectrum.extreme_eigenvalues(apply_fn, params, x, tolerance=1e-15, max_iterations=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": np.ones(3)}, r"factors must have shape \(4,\)"),
        ({"factors": np.array([1.0, 1.0, 1.0, -1.0])}, "factors must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    apply_fn, params, x = network(4)
    with pytest.raises(ValueError, match=message):
        spectrum.extreme_eigenvalues(apply_fn, params, x, **options)


# --- sharpness -----------------------------------------------------------------------------------


def full_hessian(
    apply_fn: Apply,
    params: Params,
    x: jax.Array,
    targets: Any,
    loss: losses.Loss,
    reduction: Reduction,
) -> np.ndarray:
    weights, unravel = jax.flatten_util.ravel_pytree(params)
    reduce = jnp.mean if reduction == "mean" else jnp.sum
    hessian = jax.hessian(lambda w: reduce(loss(apply_fn(unravel(w), x), targets)))(weights)
    return np.linalg.eigvalsh(hessian)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        pytest.param(
            losses.SquaredError(),
            np.random.default_rng(2).normal(size=(11, 3)),
            marks=pytest.mark.slow,
        ),
        (losses.SoftmaxCrossEntropy(), np.arange(11) % 3),
    ],
)
def test_sharpness_against_full_matrices(loss: Any, targets: Any, reduction: Reduction) -> None:
    apply_fn, params, x = network(11)
    targets = jnp.asarray(targets)
    kernel = np.asarray(ntkdp.empirical_ntk(apply_fn, params, x))
    a = np.asarray(loss.output_gradient(apply_fn(params, x), targets))
    norms = np.sqrt(np.einsum("ik,iikl,il->i", a, kernel, a))
    R = float(np.median(norms))
    roots = np.sqrt(np.repeat(np.minimum(1, R / norms), 3))
    matrix = kernel.transpose(0, 2, 1, 3).reshape(33, 33) * roots[:, None] * roots
    divisor = 11 if reduction == "mean" else 1
    for batch_size in (None, 4):
        found = spectrum.sharpness(
            apply_fn, params, x, targets, loss, clipping.Abadi(R),
            reduction=reduction, batch_size=batch_size,
        )  # fmt: skip
        top = full_hessian(apply_fn, params, x, targets, loss, reduction)[-1]
        assert found.hessian == pytest.approx(top, rel=1e-9)
        expected = np.linalg.eigvalsh(matrix)[-1] / divisor
        assert found.clipped_kernel == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_linear_model_with_squared_loss_has_the_kernels_spectrum(reduction: Reduction) -> None:
    """J^T J and J J^T share their largest eigenvalue; batch clipping scales the kernel's."""
    rng = np.random.default_rng(0)
    x, w, y = (jnp.asarray(rng.normal(size=s)) for s in ((40, 30), (30, 1), (40, 1)))
    top = np.linalg.svd(np.asarray(x), compute_uv=False)[0] ** 2
    top = top / 40 if reduction == "mean" else top
    squared = losses.SquaredError()
    found = spectrum.sharpness(linear, w, x, y, squared, clipping.NoClipping(), reduction=reduction)
    assert found.hessian == pytest.approx(top, rel=1e-9)
    assert found.clipped_kernel == pytest.approx(top, rel=1e-9)
    total = np.linalg.norm(np.asarray(x.T @ (x @ w - y)))
    rule = clipping.Batch(0.1 * total)
    found = spectrum.sharpness(linear, w, x, y, squared, rule, reduction=reduction)
    assert found.clipped_kernel == pytest.approx(0.1 * top, rel=1e-9)


def test_two_over_the_learning_rate_is_where_descent_turns() -> None:
    """Gradient descent on a linear model contracts below 2 / sharpness, and only there."""
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(6, 8))), jnp.asarray(rng.normal(size=(6, 1)))
    rule, squared, w = clipping.NoClipping(), losses.SquaredError(), jnp.zeros((8, 1))
    edge = 2 / spectrum.sharpness(linear, w, x, y, squared, rule).hessian
    ends = [
        ntkdp.dp_sgd.run(linear, w, x, y, squared, rule, learning_rate=factor * edge, steps=200,
                         record_every=200, key=jax.random.key(0)).loss
        for factor in (0.95, 1.05)
    ]  # fmt: skip
    assert ends[0][-1] < ends[0][0] < ends[1][-1]


def test_along_a_run() -> None:
    apply_fn, params, x = network(7, n_outputs=1)
    targets, loss, rule = jnp.ones((7, 1)), losses.SquaredError(), clipping.Abadi(0.5)
    algorithm = ntkdp.dp_sgd.build(apply_fn, x, targets, loss, rule, learning_rate=0.5)
    step, state, visited = eqx.filter_jit(algorithm.step), algorithm.init(params), []
    for k in range(3):
        visited.append(state.params)
        state, _ = step(jax.random.key(k), state)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *visited)
    path = spectrum.sharpness_along(apply_fn, stacked, x, targets, loss, rule, reduction="sum")
    assert np.shape(path.hessian) == np.shape(path.clipped_kernel) == (3,)
    expected = [full_hessian(apply_fn, p, x, targets, loss, "sum")[-1] for p in visited]
    np.testing.assert_allclose(path.hessian, expected, rtol=1e-9)
    assert np.all(np.diff(path.clipped_kernel) != 0)


def test_a_negative_curvature_is_not_the_largest() -> None:
    """-w^2 / 2 of one weight: the Hessian is -1, and the kernel w^2."""
    apply_fn, x = (lambda w, x: x * w[0] ** 2), jnp.ones((1, 1))
    found = spectrum.sharpness(
        apply_fn, jnp.array([0.0]), x, jnp.array([[0.5]]), losses.SquaredError(),
        clipping.NoClipping(),
    )  # fmt: skip
    assert found.hessian == pytest.approx(-1, rel=1e-12)
    assert found.clipped_kernel == 0


def test_bad_sharpness_arguments_are_named() -> None:
    apply_fn, params, x = network(4)
    y, squared, rule = jnp.zeros((4, 3)), losses.SquaredError(), clipping.Abadi(1.0)
    layerwise = clipping.Abadi(1.0, scope="layerwise")
    with pytest.raises(ValueError, match="scope='flat' here, got 'layerwise'"):
        spectrum.sharpness(apply_fn, params, x, y, squared, layerwise)
    with pytest.raises(ValueError, match="targets must have the shape of the outputs"):
        spectrum.sharpness(apply_fn, params, x, y[:2], squared, rule)
    with pytest.raises(ValueError, match="leading time axis"):
        spectrum.sharpness_along(apply_fn, {**params, "w": 1.0}, x, y, squared, rule)

    def kinked(p: Params, x: jax.Array) -> jax.Array:
        return jnp.abs(x @ p["w"] @ p["v"]) ** 1.5

    flat = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match="derivatives of apply_fn must be finite"):
        spectrum.sharpness(kinked, flat, x, y, squared, rule)
