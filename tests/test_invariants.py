"""Invariants of the public functions."""

import random
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ntkdp import (
    KernelFlow,
    LayerwiseKernel,
    Trajectory,
    calibration,
    certificates,
    compare,
    comparison,
    dp_sgd,
    experiment,
    losses,
    models,
    ntk,
    privacy,
    recursion,
    solve,
    spectrum,
)
from ntkdp.clipping import PSAC, Abadi, Automatic, Batch, ClippingRule, Global, NoClipping
from ntkdp.trajectory import from_measurements, recorded_steps, times_of_steps

# ---------------------------------------------------------------------------- clipping and losses

NORMS = npst.arrays(
    np.float64, st.integers(1, 6), elements=st.floats(0, 1e6, allow_subnormal=False)
)
RULES = st.sampled_from(
    [
        lambda R: Abadi(R),
        lambda R: Global(R),
        lambda R: Global(R, Z=3.0),
        lambda R: Automatic(R),
        lambda R: Automatic(R, gamma=0.0),
        lambda R: PSAC(R, r=0.1),
    ]
)


@given(make=RULES, R=st.floats(1e-3, 1e3), norms=NORMS, layerwise=st.booleans())
def test_factors_bound_the_gradient_and_fall_with_its_norm(
    make: Any, R: float, norms: np.ndarray, layerwise: bool
) -> None:
    rule: ClippingRule = make(R)
    s = np.sort(norms)
    factors = np.asarray(rule.factors(jnp.asarray(s)))
    assert np.all(factors >= 0)
    assert np.all(factors * s <= R * (1 + 1e-12))
    # Not PSAC, whose factor rises from R to its largest and then falls.
    if not isinstance(rule, PSAC):
        positive = s > 0
        assert np.all(np.diff(factors[positive]) <= 1e-12 * factors[positive][:-1])
    # Order and company are nothing to a factor; a rule scales with its norms, as far as R is all.
    np.testing.assert_array_equal(rule.factors(jnp.asarray(s[::-1].copy())), factors[::-1])
    np.testing.assert_array_equal(rule.factors(jnp.asarray(s[:1])), factors[:1])
    if isinstance(rule, Abadi):
        np.testing.assert_allclose(Abadi(4 * R).factors(jnp.asarray(4 * s)), factors, rtol=1e-12)
    np.testing.assert_array_equal(NoClipping().factors(jnp.asarray(s)), 1.0)
    # With layers, sums of squares of what is left stay below the square of the sensitivity.
    if layerwise:
        by_layer = type(rule)(R, scope="layerwise")
        two = jnp.stack([jnp.asarray(s), jnp.asarray(s[::-1].copy())])
        left = np.asarray(by_layer.factors(two) * two)
        most = by_layer.sensitivity(2)
        assert np.all(np.sqrt(np.sum(left**2, axis=0)) <= most * (1 + 1e-12))
        np.testing.assert_allclose(most, np.sqrt(2) * R, rtol=1e-12)


@given(R=st.floats(1e-3, 1e3), norms=NORMS, total=st.floats(0, 1e6))
def test_batch_clipping_is_one_factor_that_bounds_the_sum(
    R: float, norms: np.ndarray, total: float
) -> None:
    factors = np.asarray(Batch(R).factors(jnp.asarray(norms), jnp.asarray(total)))
    assert np.ptp(factors) == 0
    np.testing.assert_allclose(factors[0] * total, min(total, R), rtol=1e-12)


@given(factors=npst.arrays(np.float64, st.integers(1, 9), elements=st.floats(0, 2)))
def test_a_share_is_that_of_factors_below_one(factors: np.ndarray) -> None:
    from ntkdp.clipping import clip_fraction

    share = float(clip_fraction(jnp.asarray(factors)))
    np.testing.assert_allclose(share, np.count_nonzero(factors < 1) / len(factors), rtol=1e-12)
    twice = clip_fraction(jnp.asarray(np.repeat(factors, 2)))
    np.testing.assert_allclose(share, twice, rtol=1e-12)


N, K = 5, 3
OUTPUTS = npst.arrays(np.float64, (N, K), elements=st.floats(-20, 20, allow_subnormal=False))
LABELS = npst.arrays(np.int64, N, elements=st.integers(0, K - 1))


@examples(10, 30)
@given(f=OUTPUTS, y=OUTPUTS, labels=LABELS, delta=st.floats(0.1, 5))
def test_output_gradients_are_those_of_autodiff(
    f: np.ndarray, y: np.ndarray, labels: np.ndarray, delta: float
) -> None:
    hot = np.eye(K)[labels]
    cases: list[tuple[losses.Loss, Any, Any]] = [
        (losses.SquaredError(), f, y),
        (losses.Huber(delta), f, y),
        (losses.SoftmaxCrossEntropy(), f, labels),
        (losses.SoftmaxCrossEntropy(), f, hot),
        (losses.Logistic(), f[:, :1], labels % 2),
        (losses.Custom(lambda f, y: jnp.sum(jnp.cosh((f - y) / 9))), f, y),
    ]
    order = np.array([3, 1, 4, 0, 2])
    for loss, outputs, targets in cases:
        outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
        plain = jax.grad(lambda f: jnp.sum(loss(f, targets)))(outputs)  # noqa: B023
        given_by = loss.output_gradient(outputs, targets)
        np.testing.assert_allclose(given_by, plain, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(
            loss(outputs[order], targets[order]), loss(outputs, targets)[order]
        )
        if isinstance(loss, losses.SoftmaxCrossEntropy):
            np.testing.assert_allclose(jnp.sum(given_by, axis=1), 0.0, atol=1e-12)
            np.testing.assert_allclose(
                loss(outputs + 7.0, targets), loss(outputs, targets), rtol=1e-9, atol=1e-9
            )
        if isinstance(loss, losses.Huber):
            assert float(jnp.max(jnp.linalg.norm(given_by, axis=1))) <= delta * (1 + 1e-12)
        if not isinstance(loss, losses.Custom):
            assert bool(jnp.all(loss(outputs, targets) >= -1e-15))


@given(f=OUTPUTS, y=OUTPUTS)
def test_the_mean_is_the_sum_over_n(f: np.ndarray, y: np.ndarray) -> None:
    loss = losses.SquaredError()
    mean, total = (
        losses.mean_or_sum(loss, jnp.asarray(f), jnp.asarray(y), how)[0] for how in ("mean", "sum")
    )
    np.testing.assert_allclose(total, N * mean, rtol=1e-12)


# ---------------------------------------------------------------------------- kernels

MODEL = models.mlp([12, 8], K, activation="erf")
X = np.random.default_rng(0).standard_normal((N, 4))
PARAMS = MODEL.init(jax.random.key(0), jnp.asarray(X))
SEEDS = st.integers(0, 2**31 - 1)


def as_matrix(kernel: Any) -> np.ndarray:
    array = np.asarray(kernel)
    if array.ndim == 2:
        return array
    return array.transpose(0, 2, 1, 3).reshape(len(array) * array.shape[2], -1)


@examples(4, 10)
@given(seed=SEEDS)
def test_kernels_are_positive_and_follow_the_order_of_the_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, order = jnp.asarray(rng.standard_normal((N, 4))), rng.permutation(N)
    by_layer = ntk.layerwise_ntk(MODEL.apply, PARAMS, x)
    limit = ntk.layerwise_infinite_ntk(MODEL, x)
    whole, infinite = ntk.empirical_ntk(MODEL.apply, PARAMS, x), ntk.infinite_ntk(MODEL, x)
    np.testing.assert_allclose(by_layer.total, whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(limit.total, infinite, rtol=1e-9, atol=1e-12)
    for kernel in (whole, infinite, *by_layer.values, *limit.values):
        matrix = as_matrix(kernel)
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-10, atol=1e-13)
        values = np.linalg.eigvalsh(matrix)
        assert values[0] >= -1e-10 * values[-1]
    moved = ntk.empirical_ntk(MODEL.apply, PARAMS, x[order])
    np.testing.assert_allclose(moved, whole[order][:, order], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        ntk.infinite_ntk(MODEL, x[order]), infinite[order][:, order], rtol=1e-9
    )
    # Between two sets the kernel is a corner of that of both.
    np.testing.assert_allclose(
        ntk.empirical_ntk(MODEL.apply, PARAMS, x[:2], x[2:]), whole[:2, 2:], rtol=1e-9, atol=1e-12
    )
    assert by_layer.select(by_layer.names[:1]).values.shape[0] == 1


@examples(6, 20)
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
def test_norms_are_those_of_the_diagonal_and_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.standard_normal((N, K)))
    norms = ntk.per_sample_gradient_norms(MODEL.apply, PARAMS, jnp.asarray(X), a)
    scaled = ntk.per_sample_gradient_norms(MODEL.apply, PARAMS, jnp.asarray(X), scale * a)
    np.testing.assert_allclose(scaled, scale * norms, rtol=1e-10)
    # A norm of the sum is no longer than the sum of the norms.
    b = jnp.asarray(rng.standard_normal((N, K)))
    other = ntk.per_sample_gradient_norms(MODEL.apply, PARAMS, jnp.asarray(X), b)
    both = ntk.per_sample_gradient_norms(MODEL.apply, PARAMS, jnp.asarray(X), a + b)
    assert bool(jnp.all(both <= (norms + other) * (1 + 1e-12)))


@examples(4, 10)
@given(scale=st.floats(1e-3, 1e3))
def test_a_preconditioner_of_one_number_divides(scale: float) -> None:
    whole = ntk.empirical_ntk(MODEL.apply, PARAMS, jnp.asarray(X))
    flat = jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), PARAMS)
    divided = ntk.preconditioned_ntk(MODEL.apply, PARAMS, flat, jnp.asarray(X))
    np.testing.assert_allclose(divided, whole / scale, rtol=1e-9, atol=1e-12 / scale)


@examples(4, 10)
@given(seed=SEEDS)
def test_quantiles_of_norms_do_not_know_the_order(seed: int) -> None:
    from ntkdp import advisor

    order = np.random.default_rng(seed).permutation(N)
    y = np.arange(N * K, dtype=float).reshape(N, K)
    found = [
        advisor.gradient_norms(
            MODEL.apply, PARAMS, jnp.asarray(X[rows]), y[rows], losses.SquaredError()
        ).norms
        for rows in (slice(None), order)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)
    assert np.all(np.diff(found[0]) >= 0)


@examples(10, 30)
@given(seed=SEEDS, scale=st.floats(1e-6, 1e6))
def test_spectra_do_not_know_the_order_and_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((4, 4))
    kernel, factors, order = jnp.asarray(root @ root.T), rng.uniform(0.1, 1, 4), rng.permutation(4)
    values = np.asarray(spectrum.eigenvalues(kernel, factors))
    top = np.max(np.abs(values))
    moved = spectrum.eigenvalues(kernel[order][:, order], factors[order])
    np.testing.assert_allclose(moved, values, rtol=1e-8, atol=1e-10 * top)
    np.testing.assert_allclose(
        spectrum.eigenvalues(scale * kernel, factors),
        scale * values,
        rtol=1e-8,
        atol=1e-10 * scale * top,
    )
    operator = spectrum.clipped_operator(kernel, factors)
    np.testing.assert_allclose(jnp.trace(operator), values.sum(), rtol=1e-8)
    symmetric = np.asarray(spectrum.symmetric_eigenvalues(kernel, factors))
    np.testing.assert_allclose(symmetric.sum(), values.sum(), rtol=1e-8)
    assert symmetric[0] <= values[0].real + 1e-10 * top
    assert (
        bool(spectrum.has_positive_quadratic_form(kernel, factors)) == (symmetric[0] > 0)
        or abs(symmetric[0]) < 1e-9 * top
    )
    assert bool(spectrum.has_positive_eigenvalues(kernel, factors))  # C H C is positive with H
    condition = spectrum.condition_number(kernel)
    np.testing.assert_allclose(spectrum.condition_number(scale * kernel), condition, rtol=1e-6)
    assert float(condition) >= 1


@examples(10, 30)
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
def test_certificates_scale_with_the_gradients_and_know_no_order(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((4, 4))
    kernel, a = jnp.asarray(root @ root.T + np.eye(4)), jnp.asarray(rng.standard_normal((4, 1)))
    order = rng.permutation(4)
    for norm in (certificates.safe_clip_norm, certificates.safe_clip_norm_bound):
        found = norm(kernel, a)
        np.testing.assert_allclose(norm(kernel, scale * a), scale * found, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(
            norm(scale**2 * kernel, a), scale * found, rtol=1e-6, atol=1e-12 * scale
        )
        np.testing.assert_allclose(norm(kernel[order][:, order], a[order]), found, rtol=1e-6)
    most = jnp.max(jnp.sqrt(jnp.diag(kernel)) * jnp.abs(a[:, 0]))
    assert float(certificates.safe_clip_norm(kernel, a)) <= float(most) * (1 + 1e-9)


@cache
def compiled_between_times() -> Any:
    assert MODEL.two_time is not None
    names = ntk.check_two_time(MODEL, jnp.asarray(X))
    assert names == tuple(str(layer) for layer in range(5) if PARAMS[layer])  # dense, not erf
    return jax.jit(partial(ntk.between_times, MODEL.two_time.kernel, names))


@examples(4, 10)
@given(variances=npst.arrays(np.float64, (2, 3), elements=st.floats(0, 2)))
def test_kernels_between_times_change_over_with_the_times(variances: np.ndarray) -> None:
    x, (later, earlier) = jnp.asarray(X), jnp.asarray(variances)
    between_times = compiled_between_times()
    between = between_times(x[:2], x[2:], later, earlier)
    changed = between_times(x[2:], x[:2], earlier, later)
    np.testing.assert_allclose(between.nngp, changed.nngp.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        between.ntk.values, changed.ntk.values.transpose(0, 2, 1), rtol=1e-9, atol=1e-12
    )
    both = ntk.two_time_kernel(MODEL, x[:2], x[2:], variance1=later, variance2=earlier)
    np.testing.assert_allclose(both.ntk.values, between.ntk.values, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------- flows and runs

H = jnp.asarray((lambda A: A @ A.T + np.eye(N))(np.random.default_rng(1).standard_normal((N, N))))
Y = np.random.default_rng(2).standard_normal((N, 1))


def flow(rows: Any, **options: Any) -> KernelFlow:
    return KernelFlow(H[rows][:, rows], Y[rows], losses.SquaredError(), Abadi(0.6), **options)


@examples(4, 10)
@given(order=st.permutations(range(N)))
def test_flows_do_not_know_the_order_of_the_samples(order: list[int]) -> None:
    rows, times = np.array(order), [0.0, 0.5, 2.0]
    paths = [
        solve(flow(which), jnp.zeros((N, 1)), times, outputs=True) for which in (np.arange(N), rows)
    ]
    assert paths[0].outputs is not None
    assert paths[1].outputs is not None
    np.testing.assert_allclose(paths[1].outputs, paths[0].outputs[:, rows], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(paths[1].loss, paths[0].loss, rtol=1e-6)
    np.testing.assert_allclose(paths[1].clip_fraction, paths[0].clip_fraction)


@examples(4, 10)
@given(order=st.permutations(range(N)), steps=st.sampled_from([1, 4]))
def test_runs_do_not_know_the_order_of_the_samples(order: list[int], steps: int) -> None:
    rows = np.array(order)
    runs = [
        dp_sgd.run(
            MODEL.apply,
            PARAMS,
            X[which],
            np.tile(Y[which], K),
            losses.SquaredError(),
            Abadi(0.6),
            learning_rate=0.2,
            steps=steps,
            noise_multiplier=0.5,
            outputs=True,
            key=jax.random.key(0),
        )
        for which in (np.arange(N), rows)
    ]
    assert runs[0].outputs is not None
    assert runs[1].outputs is not None
    np.testing.assert_allclose(runs[1].outputs, runs[0].outputs[:, rows], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(runs[1].loss, runs[0].loss, rtol=1e-9)


@examples(6, 20)
@given(rate=st.floats(1e-3, 0.1))
def test_the_sum_is_the_mean_in_another_time(rate: float) -> None:
    everything = np.arange(N)
    mean = recursion(
        flow(everything), jnp.zeros((N, 1)), learning_rate=N * rate, steps=6, outputs=True
    )
    total = recursion(
        flow(everything, reduction="sum"),
        jnp.zeros((N, 1)),
        learning_rate=rate,
        steps=6,
        outputs=True,
    )
    assert total.outputs is not None
    assert mean.outputs is not None
    np.testing.assert_allclose(total.outputs, mean.outputs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.loss, N * mean.loss, rtol=1e-9)
    np.testing.assert_allclose(mean.times, N * total.times, rtol=1e-12)


# ---------------------------------------------------------------------------- calibration


@examples(6, 20)
@given(seed=SEEDS, n_bins=st.sampled_from([1, 12]), binning=st.sampled_from(["width", "mass"]))
def test_calibration_knows_no_order_and_stays_in_its_range(
    seed: int, n_bins: int, binning: Any
) -> None:
    rng = np.random.default_rng(seed)
    probs, labels = rng.dirichlet(np.ones(K), 20), rng.integers(0, K, 20)
    order = rng.permutation(20)
    errors = {
        norm: float(
            calibration.expected_calibration_error(
                probs, labels, n_bins, binning=binning, norm=norm
            )
        )
        for norm in ("l1", "l2", "max")
    }
    assert 0 <= errors["l1"] <= errors["l2"] + 1e-12 <= errors["max"] + 2e-12 <= 1 + 2e-12
    found = float(calibration.maximum_calibration_error(probs, labels, n_bins, binning=binning))
    assert found == errors["max"]
    bins = calibration.reliability_bins(probs, labels, n_bins, binning=binning)
    assert int(bins.counts.sum()) == 20
    assert bool(jnp.all(jnp.diff(bins.edges) >= 0))
    classwise = calibration.classwise_calibration_error(probs, labels, n_bins, binning=binning)
    assert 0 <= float(classwise) <= 1
    assert 0 <= float(calibration.brier_score(probs, labels)) <= 2
    assert float(calibration.negative_log_likelihood(probs, labels)) >= 0
    for metric in (
        calibration.expected_calibration_error,
        calibration.classwise_calibration_error,
        calibration.brier_score,
        calibration.negative_log_likelihood,
    ):
        np.testing.assert_allclose(
            metric(probs[order], labels[order]), metric(probs, labels), rtol=1e-9, atol=1e-12
        )
    # Names of the classes are nothing to it.
    np.testing.assert_allclose(
        calibration.brier_score(probs[:, ::-1], K - 1 - labels),
        calibration.brier_score(probs, labels),
        rtol=1e-12,
    )


# ---------------------------------------------------------------------------- privacy


@examples(4, 12)
@given(
    sigma=st.floats(0.8, 4),
    q=st.sampled_from([1.0, 0.2]),
    steps=st.integers(1, 20),
    more=st.floats(1.2, 2),
)
def test_epsilon_falls_with_noise_and_grows_with_use(
    sigma: float, q: float, steps: int, more: float
) -> None:
    at, slack = 1e-4, 1 + 2e-3  # each is an upper bound, within a tenth of a per cent
    here = privacy.epsilon(sigma, q, steps, at)
    assert privacy.epsilon(more * sigma, q, steps, at) <= here * slack
    assert privacy.epsilon(sigma, q, 2 * steps, at) * slack >= here
    assert privacy.epsilon(sigma, q / more, steps, at) <= here * slack
    assert privacy.epsilon(sigma, q, steps, at / 10) * slack >= here
    assert here <= privacy.epsilon(sigma, q, steps, at, "rdp") * slack
    pieces = privacy.composed_epsilon([(sigma, q, steps), (sigma, q, steps)], at)
    np.testing.assert_allclose(pieces, privacy.epsilon(sigma, q, 2 * steps, at), rtol=2e-3)
    if here > 0:
        assert privacy.delta(sigma, q, steps, here) <= at * 1.03


@given(mu=st.floats(0.01, 5), steps=st.integers(1, 10_000), sigma=st.floats(0, 1e3))
def test_a_budget_is_spent_and_a_number_kept(mu: float, steps: int, sigma: float) -> None:
    budget = privacy.Budget(mu=mu)
    found = privacy.as_noise_multiplier(budget, steps)
    # With full batches, steps of mu_0 = 1/sigma add up to mu^2 = steps/sigma^2.
    np.testing.assert_allclose(steps / found**2, mu**2, rtol=1e-12)
    sampled = privacy.as_noise_multiplier(budget, steps, 0.5)
    spent = 0.5 * np.sqrt(steps * np.expm1(1 / sampled**2))
    np.testing.assert_allclose(spent, mu, rtol=1e-9)
    assert privacy.as_noise_multiplier(sigma, steps) == sigma


@given(
    predictions=st.permutations(["exact", "frozen", "infinite", "recursion"]),
    how_many=st.integers(1, 4),
    sigma=st.sampled_from([0.0, 0.5]),
    momentum=st.sampled_from([0.0, 0.5]),
    parameterization=st.sampled_from(["ntk", "standard"]),
)
def test_what_leaves_out_the_noise_is_told(
    predictions: list[str], how_many: int, sigma: float, momentum: float, parameterization: str
) -> None:
    chosen = predictions[:how_many]
    config = experiment.config(
        predictions=chosen,
        training={"noise_multiplier": sigma, "momentum": momentum},
        model={"parameterization": parameterization},
    )
    left_out = [name for name in chosen if name not in ("recursion", "infinite")]
    assert experiment.noise_free(config) == (left_out if sigma > 0 else [])


# ---------------------------------------------------------------------------- data

FEATURES = npst.arrays(
    np.float64, (8, 2), elements=st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-3)
)


@given(x=FEATURES, scale=st.floats(1e-100, 1e100), seed=st.integers(0, 99))
def test_a_data_set_does_not_know_units_and_splits_apart(
    x: np.ndarray, scale: float, seed: int
) -> None:
    from ntkdp import datasets

    x = np.column_stack([x, np.arange(8.0)])  # so that no two samples are one
    y = np.arange(8) % 3
    plain, scaled = (
        datasets.from_arrays(x * unit, y, seed=seed, n_train=5, n_test=3) for unit in (1.0, scale)
    )
    np.testing.assert_allclose(scaled.x_train, plain.x_train, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(scaled.y_train, plain.y_train)
    raw = datasets.from_arrays(x, y, seed=seed, n_train=5, n_test=3, standardise="none")
    rows = np.concatenate([raw.x_train, raw.x_test])[:, 2]
    assert sorted(rows.tolist()) == list(range(8))
    labels = np.concatenate([raw.y_train, raw.y_test])
    np.testing.assert_array_equal(labels, rows.astype(int) % 3)
    means = np.asarray(plain.x_train).mean(axis=0)
    np.testing.assert_allclose(means, 0.0, atol=1e-9)
    deviations = np.asarray(plain.x_train).std(axis=0)
    assert np.all((np.abs(deviations - 1) < 1e-9) | (deviations == 0))


# ---------------------------------------------------------------------------- trajectories


@st.composite
def trajectories(draw: Any) -> Trajectory:
    n_times, seeds = draw(st.integers(2, 5)), draw(st.sampled_from([(), (2,)]))
    numbers = st.floats(-1e300, 1e300)

    def of(*trailing: int) -> Any:
        return jnp.asarray(
            draw(npst.arrays(np.float64, (*seeds, n_times, *trailing), elements=numbers))
        )

    optional = st.booleans()
    fields = {
        "times": jnp.cumsum(jnp.arange(1.0, n_times + 1)),
        "loss": of(),
        "clip_fraction": of(),
        "steps": jnp.arange(n_times) if draw(optional) else None,
        "accuracy": of() if draw(optional) else None,
        "outputs": of(2, 3) if draw(optional) else None,
        "test_outputs": of(1, 3) if draw(optional) else None,
    }
    # The type checker of the tests draws which entry of a tuple it looks at.
    state = random.getstate()
    path = Trajectory(**fields)
    random.setstate(state)
    return path


def assert_same(one: Trajectory, other: Trajectory) -> None:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(others)
    for leaf, twin in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, twin)


@examples(8, 25)
@given(path=trajectories())
def test_what_is_saved_is_loaded_bit_for_bit(path: Trajectory) -> None:
    assert_same(Trajectory.from_xarray(path.to_xarray()), path)
    with tempfile.TemporaryDirectory() as folder:
        path.save(Path(folder) / "path.nc")
        assert_same(Trajectory.load(Path(folder) / "path.nc"), path)


@examples(8, 25)
@given(path=trajectories(), factor=st.floats(0.1, 10))
def test_a_path_is_at_no_distance_from_itself(path: Trajectory, factor: float) -> None:
    found = compare(path, path)
    for errors in found.errors.values():
        assert errors.sup == errors.mean == 0
    assert found.coverage == 1
    again = compare(path.rescale_time(factor), path.rescale_time(factor))
    assert again.sup_relative_error == 0
    np.testing.assert_allclose(again.times, factor * found.times, rtol=1e-12)
    last = comparison.last_value(path, "loss")
    assert last is not None
    np.testing.assert_allclose(last, np.mean(np.asarray(path.loss)[..., -1]), rtol=1e-12)


@examples(10, 30)
@given(steps=st.integers(1, 40), every=st.integers(1, 50), rate=st.floats(1e-3, 10))
def test_steps_are_recorded_once_and_times_add_up(steps: int, every: int, rate: float) -> None:
    recorded = recorded_steps(steps, every)
    assert recorded[0] == 0
    assert recorded[-1] == steps
    assert np.all(np.diff(recorded) >= 1)
    assert np.all(np.diff(recorded) <= every)
    np.testing.assert_allclose(times_of_steps(rate, recorded), rate * recorded, rtol=1e-12)
    schedule = times_of_steps(lambda k: jnp.asarray(rate), recorded)
    np.testing.assert_allclose(schedule, rate * recorded, rtol=1e-9)


@given(
    loss=npst.arrays(
        np.float64, st.integers(2, 5), elements=st.floats(allow_nan=True, allow_infinity=True)
    )
)
def test_measurements_that_are_not_finite_are_told(loss: np.ndarray) -> None:
    from ntkdp.trajectory import Measurement, Outcome

    measured = Measurement(loss=jnp.asarray(loss), clip_fraction=jnp.zeros(len(loss)))
    path = from_measurements(jnp.arange(float(len(loss))), measured)
    assert path.successful == bool(np.all(np.isfinite(loss)))
    assert Outcome(int(path.outcome)) in (Outcome.SUCCESS, Outcome.NON_FINITE)


@examples(12, 40)
@given(seed=SEEDS, shift=st.floats(-9, 9), scale=st.floats(0.1, 10))
def test_scores_of_ensembles_do_not_know_units_or_order(
    seed: int, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    predicted, observed = rng.standard_normal((9, 3)), rng.standard_normal((4, 3))

    def moved(values: np.ndarray) -> np.ndarray:
        return shift + scale * values

    order = rng.permutation(9)
    crps = comparison.crps(predicted, observed)
    np.testing.assert_allclose(
        comparison.crps(moved(predicted[order]), moved(observed)),
        scale * crps,
        rtol=1e-8,
        atol=1e-12,
    )
    errors = comparison.standardised_error(predicted, observed)
    np.testing.assert_allclose(
        comparison.standardised_error(moved(predicted[order]), moved(observed)), errors, rtol=1e-8
    )
    covered = comparison.band_coverage(predicted, observed)
    again = comparison.band_coverage(moved(predicted[order]), moved(observed))
    np.testing.assert_array_equal(again.share, covered.share)
    assert np.all((covered.share >= 0) & (covered.share <= 1))
    assert np.all((covered.p_value >= 0) & (covered.p_value <= 1))
    band, moved_band = comparison.band(predicted), comparison.band(moved(predicted[order]))
    np.testing.assert_allclose(moved_band.quantiles, moved(band.quantiles), rtol=1e-8, atol=1e-9)
    assert np.all(np.diff(band.quantiles, axis=0) >= 0)


def test_double_precision_is_switched_on_by_request_alone() -> None:
    import subprocess
    import sys

    code = (
        "import jax.numpy as jnp, ntkdp; ntkdp.clipping; ntkdp.dp_sgd; ntkdp.experiment;"
        "before = jnp.ones(1).dtype; ntkdp.enable_x64(); print(before, jnp.ones(1).dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["float32", "float64"], done.stderr


def test_a_kernel_of_layers_is_a_sum_of_its_terms() -> None:
    values = np.random.default_rng(5).standard_normal((3, N, N))
    kernel = LayerwiseKernel(("a", "b", "c"), jnp.asarray(values))
    np.testing.assert_allclose(kernel.total, values.sum(axis=0), rtol=1e-12, atol=1e-12)
    parts = [kernel.select([name]).total for name in kernel.names]
    np.testing.assert_allclose(sum(parts), kernel.total, rtol=1e-12, atol=1e-12)
    assert kernel.select(["c", "a"]).names == ("a", "c")
    with pytest.raises(ValueError, match="unknown group 'd'"):
        kernel.select(["d"])
