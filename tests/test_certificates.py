"""Safe clipping norms against dense scans in NumPy, closed forms, and decay of solved flows."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples, known
from hypothesis import given
from hypothesis import strategies as st
from jax.typing import ArrayLike

import ntkdp
from ntkdp import clipping, losses
from ntkdp.certificates import Certificates, certify, safe_clip_norm, safe_clip_norm_bound
from ntkdp.clipping import Scope
from ntkdp.plotting._certificates import certificate

H7, Y7 = np.ones((3, 3)) + 0.1 * np.eye(3), np.array([-3.0, 1.0, 1.0])
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([(2, 1), (4, 1), (3, 2)])


def random_state(
    seed: int, n: int, n_outputs: int, n_groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """A layerwise kernel and output gradients of widely spread size."""
    rng = np.random.default_rng(seed)
    # At times barely more parameters than outputs, for kernels that are hard to certify.
    n_params = n * n_outputs * rng.integers(1, 4) + 1
    jacobian = rng.normal(size=(n_groups, n, n_outputs, n_params)) * np.exp(
        rng.normal(size=(n_groups, n, 1, 1))
    )
    terms = np.einsum("rikp,rjlp->rijkl", jacobian, jacobian)
    a = rng.normal(size=(n, n_outputs)) * np.exp(2 * rng.normal(size=(n, 1)))
    return terms, a


def smallest_eigenvalue(terms: np.ndarray, a: np.ndarray, R: float) -> float:
    """In NumPy: that of the symmetric part with the rule min(1, R/s), relative to the largest."""
    _, n, _, k, _ = terms.shape
    norms = np.sqrt([[a[i] @ term[i, i] @ a[i] for i in range(n)] for term in terms])
    matrix = sum(
        term.transpose(0, 2, 1, 3).reshape(n * k, n * k) @ np.diag(np.repeat(c, k))
        for term, c in zip(terms, np.minimum(1, R / norms), strict=True)
    )
    scale = 1 / np.sqrt(np.diag(matrix))
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2 * scale[:, None] * scale)
    return values[0] / values[-1]


def as_kernel(terms: np.ndarray) -> ntkdp.LayerwiseKernel:
    names = tuple(map(str, range(len(terms))))
    return ntkdp.LayerwiseKernel(names, jnp.asarray(terms))


def all_norms(terms: np.ndarray, a: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ik,riikl,il->ri", a, terms, a))


# --- safe clipping norms -------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
@examples(12, 40)
@given(seed=SEEDS, size=SIZES)
def test_positive_above_and_not_just_below(scope: Scope, seed: int, size: tuple[int, int]) -> None:
    terms, a = random_state(seed, *size, 1 if scope == "flat" else 2)
    safe = float(safe_clip_norm(as_kernel(terms), a, scope=scope))
    top, low = all_norms(terms, a).max(), all_norms(terms, a).min()
    assert 0 <= safe < top
    start = safe * (1 + 1e-9) if safe else low / 10
    # Everywhere above, the norms at which samples leave the clipped zone among it.
    grid = np.concatenate([np.geomspace(start, 1.1 * top, 100), all_norms(terms, a).ravel()])
    assert all(smallest_eigenvalue(terms, a, R) > -1e-13 for R in grid[grid >= start])
    if safe:
        assert smallest_eigenvalue(terms, a, safe) == pytest.approx(0, abs=1e-12)
        assert smallest_eigenvalue(terms, a, safe * (1 - 1e-6)) < 0


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
@examples(12, 40)
@given(seed=SEEDS, size=SIZES)
def test_the_bound_is_never_below(scope: Scope, seed: int, size: tuple[int, int]) -> None:
    terms, a = random_state(seed, *size, 1 if scope == "flat" else 2)
    kernel = as_kernel(terms)
    safe = float(safe_clip_norm(kernel, a, scope=scope))
    bound = float(safe_clip_norm_bound(kernel, a, scope=scope))
    assert safe * (1 - 1e-9) <= bound <= all_norms(terms, a).max()


def test_two_samples_in_closed_form() -> None:
    """C4: |rho| < 2 sqrt(c1 c2) / (c1 + c2); the critical ratio is 2.5454 at rho = 0.9."""
    kernel, a = jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.array([[5.0], [1.0]])
    for rule in (safe_clip_norm, safe_clip_norm_bound):
        assert 5.0 / float(rule(kernel, a)) == pytest.approx(2.5454, abs=5e-5)
    # The ratio of the norms stays below the critical one: no R can spoil it.
    assert float(safe_clip_norm(kernel, jnp.array([[2.5], [1.0]]))) == 0
    assert float(safe_clip_norm_bound(kernel, jnp.array([[2.5], [1.0]]))) == 0


@given(seed=SEEDS, size=st.sampled_from([(2, 1), (2, 2)]))
def test_with_two_samples_the_bound_is_exact(seed: Any, size: Any) -> None:
    terms, a = random_state(seed, *size)
    exact, bound = (float(f(terms[0], a)) for f in (safe_clip_norm, safe_clip_norm_bound))
    assert bound == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_positivity_is_not_monotone_and_the_scan_sees_it() -> None:
    """Three samples: safe at large R, unsafe below, and safe again at R smaller still."""
    kernel = np.array([[1.0, -0.46, -0.89], [-0.46, 1.0, 0.68], [-0.89, 0.68, 1.0]])
    a = np.array([[0.4], [4.0], [0.7]])
    terms = kernel[None, :, :, None, None]
    assert [smallest_eigenvalue(terms, a, R) > 0 for R in (0.4, 0.7, 4.0)] == [True, False, True]
    grid = np.geomspace(0.4, 4.0, 2000)
    fails = np.array([smallest_eigenvalue(terms, a, R) <= 0 for R in grid])
    assert float(safe_clip_norm(kernel, a)) == pytest.approx(grid[fails][-1], rel=2e-3)


def test_an_uncoupled_kernel_is_safe_at_every_norm() -> None:
    a = jnp.array([[1e-8], [3.0], [0.0]])
    for f in (safe_clip_norm, safe_clip_norm_bound):
        assert float(f(jnp.diag(jnp.array([1e-6, 2.0, 1e3])), a)) == 0


def test_samples_without_gradient() -> None:
    """C = 1 for one sample, R/s -> 0 for the other: |rho| < 2 sqrt(c)/(1 + c) in closed form."""
    rho, s = 0.6, 5.0
    kernel = jnp.array([[1.0, rho], [rho, 1.0]])
    root = (1 - np.sqrt(1 - rho**2)) / rho
    safe = float(safe_clip_norm(kernel, jnp.array([[s], [0.0]])))
    assert safe == pytest.approx(s * root**2, rel=1e-12)
    assert float(safe_clip_norm(kernel, jnp.zeros((2, 1)))) == 0


@pytest.mark.parametrize("f", [safe_clip_norm, safe_clip_norm_bound])
def test_a_singular_kernel_has_no_safe_norm(f: Any) -> None:
    rng = np.random.default_rng(0)
    J = rng.normal(size=(5, 3))
    a = rng.normal(size=(5, 1))
    assert float(f(J @ J.T, a)) == np.inf
    # And indeed a clipped sample makes the loss rise in some direction.
    terms = (J @ J.T)[None, :, :, None, None]
    norms = np.sort(all_norms(terms, a).ravel())
    assert smallest_eigenvalue(terms, a, 0.9 * norms[-1]) < -1e-6
    blocks = np.zeros((2, 2, 2, 2))
    blocks[0, 0] = np.eye(2)
    assert float(f(blocks, rng.normal(size=(2, 2)))) == np.inf


@pytest.mark.parametrize("f", [safe_clip_norm, safe_clip_norm_bound])
def test_units_and_invariances(f: Any) -> None:
    kernel, a = np.ones((4, 4)) + 0.2 * np.eye(4), np.array([[5.0], [-1.0], [1.0], [0.5]])
    safe = float(f(kernel, a))
    assert safe > 0
    # R scales with the gradients: with a, and with the root of the kernel.
    assert float(f(kernel, 7 * a)) == pytest.approx(7 * safe, rel=1e-9)
    assert float(f(9 * kernel, a)) == pytest.approx(3 * safe, rel=1e-9)
    # The (n, n) form means (x) I_K, with the norms of the whole rows of a.
    wide = np.concatenate([0.6 * a, 0.8 * a], axis=1)
    full = np.einsum("ij,kl->ijkl", kernel, np.eye(2))
    assert float(f(kernel, wide)) == pytest.approx(safe, rel=1e-9)
    assert float(f(full, wide)) == pytest.approx(safe, rel=1e-9)
    # One scale a sample, taken from the kernel and given to a, changes no norm.
    d = np.array([1.0, 10.0, 0.1, 3.0])
    assert float(f(kernel * d[:, None] * d, a / d[:, None])) == pytest.approx(safe, rel=1e-9)
    jitted = jax.jit(lambda kernel, a: f(kernel, a))
    assert float(jitted(jnp.asarray(kernel), jnp.asarray(a))) == pytest.approx(safe, rel=1e-12)
    mapped = jax.vmap(lambda a: f(jnp.asarray(kernel), a))(jnp.stack([a, 2 * a]))
    np.testing.assert_allclose(mapped, [safe, 2 * safe], rtol=1e-9)


def test_float32() -> None:
    kernel = jnp.array([[1.0, 0.9], [0.9, 1.0]], jnp.float32)
    a = jnp.array([[5.0], [1.0]], jnp.float32)
    safe = safe_clip_norm(kernel, a)
    assert safe.dtype == jnp.float32
    assert 5 / float(safe) == pytest.approx(2.5454, rel=1e-4)


@pytest.mark.parametrize(
    ("kernel", "a", "scope", "message"),
    [
        (np.eye(3), np.ones((2, 1)), "flat", r"\(2, 2\) or .* for outputs of shape \(2, 1\)"),
        (np.ones((2, 3)), np.ones((2, 1)), "flat", r"kernel must have shape"),
        (np.eye(4), np.ones((2, 2)), "flat", r"got \(4, 4\)"),
        (np.eye(2), np.ones(2), "flat", r"output_gradient must have shape \(n, K\)"),
        (np.eye(2), np.array([[1.0], [np.nan]]), "flat", "output_gradient must be finite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), np.ones((2, 1)), "flat", "symmetric"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), np.ones((2, 1)), "flat", "kernel must be finite"),
        (np.eye(2), np.ones((2, 1)), "layerwise", "LayerwiseKernel"),
    ],
)
@pytest.mark.parametrize("f", [safe_clip_norm, safe_clip_norm_bound])
def test_bad_states_are_named(f: Any, kernel: Any, a: Any, scope: Scope, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        f(kernel, a, scope=scope)


# --- along a trajectory --------------------------------------------------------------------------


@cache
def solved(scope: Scope, n_groups: int, n: int, n_outputs: int) -> Callable[..., Any]:
    """A compiled solve of the kernel flow, reused for instances of one shape."""
    times = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, 3.0, 12)])

    @jax.jit
    def solve(
        terms: jax.Array, targets: jax.Array, start: jax.Array, R: jax.Array
    ) -> tuple[ntkdp.Trajectory, jax.Array]:
        kernel = ntkdp.LayerwiseKernel(tuple(map(str, range(n_groups))), terms)
        rule = clipping.Abadi(R, scope=scope)
        flow = ntkdp.KernelFlow(kernel, targets, losses.SquaredError(), rule, reduction="sum")
        path = ntkdp.solve(flow, start, times, outputs=True, rtol=1e-6)

        def slope(outputs: jax.Array) -> jax.Array:
            a = outputs - targets
            return jnp.sum(a * flow.velocity((outputs, None))[0])

        return path, jax.vmap(slope)(known(path.outputs))

    return solve


@pytest.mark.parametrize("scope", ["flat", "layerwise"])
@examples(8, 25)
@given(seed=SEEDS)
def test_the_loss_decays_wherever_certified(scope: Scope, seed: Any) -> None:
    terms, start = random_state(seed, 3, 1, n_groups=2)
    targets = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(3, 1)))
    R = float(np.median(all_norms(terms, start - np.asarray(targets))))
    path, slopes = solved(scope, 2, 3, 1)(jnp.asarray(terms), targets, jnp.asarray(start), R)
    rule, loss = clipping.Abadi(R, scope=scope), losses.SquaredError()
    found = certify(as_kernel(terms), path, targets, loss, rule)
    certified, slopes = np.asarray(found.certified), np.asarray(slopes)
    assert np.all(slopes[certified] < 0)
    # dL/dt = -a^T sym(..) a <= -lambda_min |a|^2, the sum form.
    a = np.sum((np.asarray(path.outputs) - np.asarray(targets)) ** 2, axis=(1, 2))
    smallest = np.asarray(found.smallest_eigenvalue)
    assert np.all(slopes <= -smallest * a + 1e-9 * np.abs(slopes).max())
    above = np.asarray(found.safe_clip_norm) * (1 + 1e-9) < R
    assert np.all(certified[above])
    assert np.all(np.asarray(found.safe_clip_norm_bound) >= found.safe_clip_norm * (1 - 1e-9))


def c7(
    times: tuple[float, ...] = (0.0, 0.4, 2.0, 10.0, 30.0, 100.0),
) -> tuple[ntkdp.Trajectory, Certificates]:
    rule, loss = clipping.Abadi(1.0), losses.SquaredError()
    flow = ntkdp.KernelFlow(jnp.asarray(H7), Y7, loss, rule, reduction="sum")
    path = ntkdp.solve(flow, np.zeros((3, 1)), times, outputs=True)
    return path, certify(H7, path, Y7, loss, rule)


def test_c7_is_not_certified_where_its_loss_rises_and_is_at_the_end() -> None:
    path, found = c7()
    assert path.loss[1] > path.loss[0]
    assert not found.certified[0]
    assert not found.certified[1]
    assert float(found.smallest_eigenvalue[0]) < 0
    assert float(found.safe_clip_norm[0]) > 1
    assert found.certified[-1]
    assert float(found.clip_norm) == 1
    # Nothing is clipped there: the symmetric part is H, whose smallest eigenvalue is 0.1.
    assert float(found.smallest_eigenvalue[-1]) == pytest.approx(0.1, rel=1e-9)
    np.testing.assert_array_equal(found.times, path.times)
    np.testing.assert_array_equal(found.loss, path.loss)
    a = np.asarray(known(path.outputs)[0]) - Y7[:, None]
    assert float(found.safe_clip_norm[0]) == pytest.approx(float(safe_clip_norm(H7, a)), rel=1e-12)


def path_of(outputs: ArrayLike) -> ntkdp.Trajectory:
    outputs = jnp.asarray(outputs)
    blank = jnp.zeros(outputs.shape[:-2])
    return ntkdp.Trajectory(jnp.arange(outputs.shape[-3]) * 1.0, blank, blank, outputs=outputs)


@pytest.mark.parametrize(
    ("rule", "certified"),
    [
        (clipping.NoClipping(), True),
        (clipping.Batch(0.01), True),
        (clipping.Abadi(100.0), True),
        (clipping.Abadi(0.5), False),
        (clipping.Automatic(1.0), False),
        (clipping.Global(0.5), False),
    ],
)
def test_every_rule_is_judged_by_its_own_factors(rule: Any, certified: bool) -> None:
    kernel, outputs = np.array([[1.0, 0.9], [0.9, 1.0]]), np.array([[[4.0], [1.0]]])
    targets, loss = np.zeros((2, 1)), losses.SquaredError()
    found = certify(kernel, path_of(outputs), targets, loss, rule)
    assert found.certified.tolist() == [certified]
    assert (float(found.clip_norm) == np.inf) == isinstance(rule, clipping.NoClipping)
    s = np.abs(outputs[0, :, 0])
    total = np.sqrt(s @ kernel @ s)
    of_rules: dict[Any, np.ndarray] = {
        clipping.NoClipping: np.ones(2),
        clipping.Batch: np.full(2, min(1, 0.01 / total)),
        clipping.Abadi: np.minimum(1, float(rule.R) / s),
        clipping.Automatic: 1 / (s + 0.01),
        clipping.Global: (s <= 0.5).astype(float),
    }
    product = kernel * of_rules[type(rule)]
    expected = np.linalg.eigvalsh((product + product.T) / 2)[0]
    assert float(found.smallest_eigenvalue[0]) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_layerwise_batch_clipping_uses_the_summed_gradient_of_each_group() -> None:
    terms, a = random_state(1, 3, 2, n_groups=2)
    rule = clipping.Batch(0.5, scope="layerwise")
    found = certify(
        as_kernel(terms), path_of(a[None]), np.zeros((3, 2)), losses.SquaredError(), rule
    )
    matrices = terms.transpose(0, 1, 3, 2, 4).reshape(2, 6, 6)
    totals = [np.sqrt(a.ravel() @ m @ a.ravel()) for m in matrices]
    expected = sum(min(1, 0.5 / t) * m for t, m in zip(totals, matrices, strict=True))
    smallest = np.linalg.eigvalsh(expected)[0]
    assert float(found.smallest_eigenvalue[0]) == pytest.approx(smallest, rel=1e-6)
    assert found.certified[0]


def test_seeds_softmax_and_states_that_were_not_reached() -> None:
    rng = np.random.default_rng(0)
    J = rng.normal(size=(4, 3, 20))
    kernel = np.einsum("ikp,jlp->ijkl", J, J)
    outputs = rng.normal(size=(2, 5, 4, 3))
    outputs[1, 3:] = np.nan
    labels, loss, rule = jnp.array([0, 1, 2, 1]), losses.SoftmaxCrossEntropy(), clipping.Abadi(1.0)
    found = certify(kernel, path_of(outputs), labels, loss, rule)
    assert found.certified.shape == found.safe_clip_norm.shape == (2, 5)
    alone = certify(kernel, path_of(outputs[0]), labels, loss, rule)
    np.testing.assert_allclose(found.safe_clip_norm[0], alone.safe_clip_norm, rtol=1e-12)
    assert not np.any(found.certified[1, 3:])
    for field in (found.safe_clip_norm, found.safe_clip_norm_bound, found.smallest_eigenvalue):
        assert np.all(np.isnan(field[1, 3:]))
        assert np.all(np.isfinite(field[0]))


def test_bad_trajectories_are_named() -> None:
    path, rule, loss = path_of(np.ones((1, 2, 1))), clipping.Abadi(1.0), losses.SquaredError()
    y = np.zeros(2)
    with pytest.raises(TypeError, match="trajectory"):
        certify(np.eye(2), np.ones((1, 2, 1)), y, loss, rule)  # type: ignore[arg-type]
    blind = ntkdp.Trajectory(path.times, path.loss, path.clip_fraction)
    with pytest.raises(ValueError, match="records no outputs; pass outputs=True"):
        certify(np.eye(2), blind, y, loss, rule)
    with pytest.raises(TypeError, match="clipping"):
        certify(np.eye(2), path, y, loss, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss"):
        certify(np.eye(2), path, y, "squared", rule)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets must have the shape of the outputs"):
        certify(np.eye(2), path, np.zeros(3), loss, rule)
    with pytest.raises(ValueError, match=r"got \(3, 3\)"):
        certify(np.eye(3), path, y, loss, rule)
    several = clipping.Abadi(jnp.ones(2), scope="layerwise")
    with pytest.raises(ValueError, match="one R for all groups"):
        certify(as_kernel(random_state(0, 2, 1, 2)[0]), path, y, loss, several)


# --- the picture ---------------------------------------------------------------------------------


def test_the_picture_holds_the_norms_and_shades_what_is_certified() -> None:
    path, found = c7()
    figure = certificate(found, title="C7")
    above, below = figure.axes
    np.testing.assert_array_equal(above.lines[0].get_ydata(), path.loss)
    run, safe, bound = below.lines
    assert run.get_label() == "R = 1 of the run"
    assert set(np.asarray(run.get_ydata())) == {1.0}
    for line, norms in ((safe, found.safe_clip_norm), (bound, found.safe_clip_norm_bound)):
        shown = np.asarray(line.get_ydata())
        positive = np.asarray(norms) > 0
        np.testing.assert_array_equal(shown[positive], np.asarray(norms)[positive])
        # Zero runs inside the frame, below all others.
        low = below.get_ylim()[0]
        assert np.all((shown[~positive] > low) & (shown[~positive] < shown[positive].min()))
        assert str(line.get_label()).endswith("(bottom: 0)")
    certified = np.asarray(found.certified)
    for ax in (above, below):
        (shade,) = ax.collections
        corners = np.concatenate([np.asarray(p.vertices)[:, 0] for p in shade.get_paths()])
        assert (corners.min(), corners.max()) == (path.times[certified][0], path.times[-1])
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text() == f"decay certified ({certified.sum()} of 6 times)"
    figure.draw_without_rendering()
    box, frame = legend.get_window_extent(), figure.bbox
    assert frame.x0 <= box.x0 < box.x1 <= frame.x1
    assert box.y1 <= known(below.get_tightbbox()).y0 + 1


def test_a_picture_without_any_safe_norm() -> None:
    outputs = np.array([[[1.0], [2.0]], [[0.5], [1.0]]])
    loss, y = losses.SquaredError(), np.zeros(2)
    found = certify(np.ones((2, 2)), path_of(outputs), y, loss, clipping.NoClipping())
    assert not np.any(found.certified)
    _, below = certificate(found).axes
    assert [line.get_label() for line in below.lines] == [
        "safe R (top: infinite)",
        "its upper bound (top: infinite)",
    ]
    low, high = below.get_ylim()
    drawn = np.concatenate([np.asarray(line.get_ydata()) for line in below.lines])
    assert np.all((low < drawn) & (drawn < high))


def test_what_cannot_be_drawn_is_named() -> None:
    outputs = np.ones((2, 3, 2, 1))
    rule, loss = clipping.Abadi(1.0), losses.SquaredError()
    seeds = certify(np.eye(2), path_of(outputs), np.zeros(2), loss, rule)
    with pytest.raises(ValueError, match=r"of one run, got a loss of shape \(2, 3\)"):
        certificate(seeds)
    single = certify(np.eye(2), path_of(outputs[0, :1]), np.zeros(2), loss, rule)
    with pytest.raises(ValueError, match="at least two recorded times, got 1"):
        certificate(single)
    with pytest.raises(TypeError, match="certificates"):
        certificate("c7")  # type: ignore[arg-type]
