"""Calibration: metrics and bins against scikit-learn, the bootstrap and the diagram."""

import itertools
import math
from functools import partial
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from helpers import examples, known
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

from ntkdp import calibration
from ntkdp.calibration import (
    _bins,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_bins,
)

Norm = Literal["l1", "l2", "max"]
NORMS: tuple[Norm, ...] = ("l1", "l2", "max")


def random_case(generator: Any, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, some on bin edges, and labels drawn from flattened ones."""
    logits = generator.normal(0.0, generator.uniform(0.1, 4.0), (n, n_classes))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    on_edge = generator.random(n) < 0.2
    first = generator.integers(0, 16, n) / 15
    edged = np.concatenate([first[:, None], np.tile((1 - first)[:, None], n_classes - 1)
                            / (n_classes - 1)], axis=1)  # fmt: skip
    probs = np.where(on_edge[:, None], edged, probs)
    return probs, generator.integers(0, n_classes, n)


def oracle(confidence: np.ndarray, hits: np.ndarray, n_bins: int) -> dict[str, float]:
    """The gaps are scikit-learn's; how many samples share one is counted from its means."""
    accuracy, mean = calibration_curve(hits, confidence, n_bins=n_bins)
    edges = np.linspace(0, 1, n_bins + 1)
    counts = [
        np.sum((confidence > lo) & (confidence <= hi) | ((k == 0) & (confidence == 0)))
        for k, (lo, hi) in enumerate(itertools.pairwise(edges))
    ]
    weights = np.array([c for c in counts if c]) / len(hits)
    gaps = np.abs(accuracy - mean)
    return {
        "l1": float(np.sum(weights * gaps)),
        "l2": float(np.sqrt(np.sum(weights * gaps**2))),
        "max": float(np.max(gaps)),
    }


# --- metrics -------------------------------------------------------------------------------------


def test_errors_of_a_thousand_random_cases_are_those_of_scikit_learn() -> None:
    generator, n = np.random.default_rng(0), 60
    for n_classes, n_bins in ((2, 15), (3, 15), (10, 15), (3, 1), (5, 7)):
        cases = [random_case(generator, n, n_classes) for _ in range(200)]
        probs, labels = (np.stack(part) for part in zip(*cases, strict=True))
        top, confidence = probs.argmax(axis=2), probs.max(axis=2)
        norms = [partial(expected_calibration_error, n_bins=n_bins, norm=n) for n in NORMS]
        found = jax.jit(jax.vmap(lambda p, y, norms=norms: [norm(p, y) for norm in norms]))
        expected = [
            list(oracle(c, t == y, n_bins).values())
            for c, t, y in zip(confidence, top, labels, strict=True)
        ]
        measured = np.stack(found(probs, labels), axis=1)
        np.testing.assert_allclose(measured, expected, atol=1e-12, rtol=0)


def test_classwise_error_is_the_mean_over_the_columns() -> None:
    probs, labels = random_case(np.random.default_rng(1), 300, 4)
    for norm in NORMS:
        expected = np.mean([oracle(probs[:, k], labels == k, 15)[norm] for k in range(4)])
        found = calibration.classwise_calibration_error(probs, labels, norm=norm)
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_bins_of_equal_counts_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    for n, n_bins in ((60, 15), (150, 10), (12, 12)):
        p = generator.uniform(0.5, 1.0, n)
        y = (generator.random(n) < 0.7).astype(int)
        bins = reliability_bins(p, y, n_bins, binning="mass")
        accuracy, mean = calibration_curve(y, p, n_bins=n_bins, strategy="quantile")
        np.testing.assert_array_equal(bins.counts, n // n_bins)
        np.testing.assert_allclose(bins.accuracy, accuracy, rtol=1e-14)
        np.testing.assert_allclose(bins.confidence, mean, rtol=1e-14)


def test_equal_confidences_share_a_bin() -> None:
    p, y = np.repeat([0.6, 0.9], [7, 3]), np.ones(10, int)
    bins = reliability_bins(p, y, 5, binning="mass")
    assert sorted(np.asarray(bins.counts).tolist()) == [0, 0, 0, 3, 7]
    found = expected_calibration_error(p, y, 5, binning="mass")
    assert float(found) == pytest.approx(0.7 * 0.4 + 0.3 * 0.1, abs=1e-14)


def test_edges_belong_below_and_empty_bins_are_not_a_number() -> None:
    confidences = np.array([0.5, 0.5000001, 0.75, 1.0])
    bins = reliability_bins(confidences, np.array([0, 1, 1, 1]), 4)
    assert bins.counts.tolist() == [0, 1, 2, 1]
    assert bins.edges.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    np.testing.assert_array_equal(bins.accuracy, [np.nan, 1.0, 1.0, 1.0])
    assert bins.confidence.tolist()[3] == 1.0


METRICS = (
    expected_calibration_error,
    maximum_calibration_error,
    calibration.classwise_calibration_error,
    calibration.brier_score,
    calibration.negative_log_likelihood,
    lambda probs, labels: reliability_bins(probs, labels, 3),
    lambda probs, labels: reliability_bins(probs, labels, 3, binning="mass"),
)


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float16, marks=pytest.mark.slow),
        pytest.param(jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.float64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("labels", [[0, 1], [1, 0]])
def test_a_probability_past_its_end_by_rounding_counts_as_the_end(
    dtype: Any, labels: list[int]
) -> None:
    past = 2 * float(jnp.finfo(dtype).eps)
    exact, shifted = jnp.array([1, 0], dtype), jnp.array([1 + past, -past], dtype)
    assert bool(jnp.all(shifted != exact))
    for metric in METRICS:
        expected = metric(exact, np.array(labels))
        for probs in (shifted, shifted[:, None], jnp.stack([1 - shifted, shifted], axis=1)):
            for compute in (metric, jax.jit(metric)):
                found = compute(probs, np.array(labels))
                jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_likelihood_of_an_impossible_label_is_infinite_however_it_is_rounded() -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    for probs in ([above], [[-1e-8, 1.0]], [[0.0, 1.0]], [[-1e-6, 0.5, 0.500001]]):
        found = calibration.negative_log_likelihood(np.array(probs, np.float32), np.array([0]))
        assert float(found) == np.inf


def test_probabilities_keep_their_derivative_at_zero_and_one() -> None:
    slope = jax.grad(lambda p: calibration.brier_score(p, np.array([1, 0])))
    np.testing.assert_allclose(slope(np.array([1.0, 0.0])), [0.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(slope(np.array([0.0, 1.0])), [-1.0, 1.0], rtol=1e-15)


def test_logits_under_jit_are_no_probabilities() -> None:
    for metric in METRICS[:5]:
        assert np.isnan(jax.jit(metric)(jnp.array([1.7, 0.2]), jnp.array([1, 0])))
    with pytest.raises(ValueError, match="probs must lie in"):
        calibration.brier_score(jnp.array([1.7, 0.2], jnp.bfloat16), np.array([1, 0]))
    with pytest.raises(ValueError, match="must sum to 1"):
        calibration.brier_score(jnp.array([[0.6, 0.6]], jnp.float16), np.array([1]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_measured_in_single(dtype: Any) -> None:
    probs, labels = random_case(np.random.default_rng(5), 5000, 2)
    half = jnp.asarray(probs[:, 1], dtype)
    for metric in METRICS[:5]:
        found, expected = metric(half, labels), metric(np.asarray(half, np.float64), labels)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_probability_of_zero_is_in_the_first_bin() -> None:
    """One class has probability 0 throughout and never comes true, the other always does."""
    probs, labels = np.array([[0.0, 1.0]] * 3), np.ones(3, int)
    assert float(calibration.classwise_calibration_error(probs, labels)) == 0.0
    assert float(calibration.classwise_calibration_error(probs, 1 - labels, norm="max")) == 1.0


def test_binary_probabilities_are_two_columns() -> None:
    p, y = np.array([0.1, 0.45, 0.5, 0.8]), np.array([0, 1, 0, 1])
    both = np.stack([1 - p, p], axis=1)
    for metric in (
        expected_calibration_error,
        maximum_calibration_error,
        calibration.classwise_calibration_error,
        calibration.brier_score,
        calibration.negative_log_likelihood,
    ):
        expected = float(metric(both, y))
        assert float(metric(p, y)) == expected == float(metric(p[:, None], y == 1))
    bins = reliability_bins(p, y, 2)
    np.testing.assert_allclose(bins.confidence, [0.5, (0.9 + 0.55 + 0.8) / 3], rtol=1e-14)
    np.testing.assert_allclose(bins.accuracy, [1.0, 2 / 3], rtol=1e-14)  # of a tie, class 0


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_scores_are_those_of_scikit_learn(n_classes: int) -> None:
    probs, labels = random_case(np.random.default_rng(3), 500, n_classes)
    probs = 0.99 * probs + 0.01 / n_classes
    classes = np.arange(n_classes)
    brier = sklearn.metrics.brier_score_loss(labels, probs, labels=classes)
    assert float(calibration.brier_score(probs, labels)) == pytest.approx(brier, rel=1e-13)
    nll = sklearn.metrics.log_loss(labels, probs, labels=classes)
    found = calibration.negative_log_likelihood(probs, labels)
    assert float(found) == pytest.approx(nll, rel=1e-13)


def test_an_impossible_label_has_infinite_likelihood() -> None:
    assert calibration.negative_log_likelihood(jnp.zeros(1), jnp.ones(1, int)) == math.inf


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(["width", "mass"]))
@examples(12, 30)
def test_invariants(seed: int, binning: Any) -> None:
    """Every sample is counted once; norms are ordered; the order of samples does not matter."""
    generator = np.random.default_rng(seed)
    probs, labels = random_case(generator, 40, 3)
    bins = reliability_bins(probs, labels, binning=binning)
    assert int(jnp.sum(bins.counts)) == 40
    total = np.nansum(bins.counts * bins.accuracy)
    assert total == pytest.approx(np.sum(probs.argmax(axis=1) == labels), abs=1e-10)
    l1, l2, largest = (
        float(expected_calibration_error(probs, labels, binning=binning, norm=norm))
        for norm in NORMS
    )
    whole = abs(np.mean(probs.max(axis=1)) - np.mean(probs.argmax(axis=1) == labels))
    assert whole - 1e-12 <= l1 <= l2 + 1e-12 <= largest + 2e-12 <= 1 + 1e-11
    order = generator.permutation(40)
    again = expected_calibration_error(probs[order], labels[order], binning=binning)
    assert float(again) == pytest.approx(l1, abs=1e-12)


def test_float32_keeps_its_digits_over_a_million_samples() -> None:
    generator = np.random.default_rng(4)
    p = generator.uniform(0.93, 1.0, 1_000_000).astype(np.float32)
    y = (generator.random(p.size) < 0.5).astype(np.int32)
    found = expected_calibration_error(p, y, 1)
    assert found.dtype == jnp.float32
    expected = abs(p.astype(np.float64).mean() - y.mean())
    assert float(found) == pytest.approx(expected, abs=2e-6)


def test_the_error_can_be_differentiated() -> None:
    """The gap of a bin changes by 1/n with the confidence of one of its samples."""
    p, y = jnp.array([0.9, 0.95, 0.7, 0.7]), jnp.array([1, 0, 0, 0])
    for binning in ("width", "mass"):
        gradient = jax.grad(lambda p, b=binning: expected_calibration_error(p, y, 2, binning=b))(p)
        np.testing.assert_allclose(gradient, 0.25, rtol=1e-14)
    calibrated = jnp.array([0.5, 0.5]), jnp.array([1, 0])
    found = jax.grad(lambda p: expected_calibration_error(p, calibrated[1], norm="l2"))
    assert np.all(np.isfinite(found(calibrated[0])))


# --- bootstrap -----------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    """The Brier score of a constant forecast is a mean: 1.96 standard errors, give or take."""
    generator = np.random.default_rng(5)
    p, y = np.full(2000, 0.7), (generator.random(2000) < 0.6).astype(int)
    found = calibration.bootstrap(calibration.brier_score, p, y, 2000, key=jax.random.key(0))
    terms = (p - y) ** 2
    half = 1.959964 * terms.std() / math.sqrt(2000)
    assert float(found.estimate) == pytest.approx(terms.mean(), rel=1e-12)
    assert float(found.high - found.low) == pytest.approx(2 * half, rel=0.08)
    assert float(found.low + found.high) / 2 == pytest.approx(terms.mean(), abs=0.1 * half)


def test_bootstrap_levels_nest_and_metrics_may_be_arrays() -> None:
    generator = np.random.default_rng(6)
    p, y = generator.uniform(0.0, 1.0, 50), generator.integers(0, 2, 50)
    metric = lambda p, y: reliability_bins(p, y, 4).counts.astype(float)  # noqa: E731
    wide, narrow = (
        calibration.bootstrap(metric, p, y, 200, level, key=jax.random.key(1))
        for level in (1.0, 0.5)
    )
    assert wide.low.shape == (4,)
    assert np.all(wide.low <= narrow.low)
    assert np.all(narrow.low <= narrow.high)
    assert np.all(narrow.high <= wide.high)
    assert float(jnp.sum(narrow.estimate)) == 50


# --- bad input -----------------------------------------------------------------------------------

GOOD, LABELS = np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([1, 0])


@pytest.mark.parametrize(
    ("probs", "labels", "error", "message"),
    [
        (np.array([[2.0, -1.0], [0.5, 0.5]]), LABELS, ValueError, "probs must lie in .*softmax"),
        (np.array([[0.2, 0.7], [0.5, 0.5]]), LABELS, ValueError, "rows of probs must sum to 1"),
        (np.array([[np.nan, 0.7], [0.5, 0.5]]), LABELS, ValueError, "probs must be finite"),
        (np.array([0.2, np.inf]), LABELS, ValueError, "probs must be finite"),
        (np.array([0.2, 1.5]), LABELS, ValueError, "probs must lie"),
        (GOOD, np.array([0, 2]), ValueError, "labels must be classes in 0..1, got .* to 2"),
        (GOOD, np.array([-1, 1]), ValueError, "labels must be classes in 0..1, got values from -1"),
        (GOOD, np.array([0.0, 1.0]), TypeError, "labels must be integers, got dtype float64"),
        (GOOD, np.eye(2, dtype=int), ValueError, "labels must be classes of shape .* argmax"),
        (GOOD, np.array([1]), ValueError, r"labels must be classes of shape \(2,\)"),
        (np.zeros((0, 2)), np.zeros(0, int), ValueError, "probs must have shape"),
        (np.zeros((1, 1, 2)), np.zeros(1, int), ValueError, "probs must have shape"),
        (GOOD + 0j, LABELS, TypeError, "probs must be real"),
    ],
)  # fmt: skip
def test_bad_input(probs: Any, labels: Any, error: type, message: str) -> None:
    for metric in (
        expected_calibration_error,
        maximum_calibration_error,
        calibration.classwise_calibration_error,
        calibration.brier_score,
        calibration.negative_log_likelihood,
        reliability_bins,
        calibration.reliability_diagram,
    ):
        with pytest.raises(error, match=message):
            metric(probs, labels)
    with pytest.raises(error, match=message):
        calibration.bootstrap(calibration.brier_score, probs, labels, key=jax.random.key(0))


def test_bad_options() -> None:
    for n_bins, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="n_bins must be"):
            _bins.checked_binning(n_bins, "width")
    with pytest.raises(ValueError, match="unknown binning 'massive'; did you mean 'mass'"):
        _bins.checked_binning(15, "massive")
    for options, message in (({"level": 1.5}, "level"), ({"n_resamples": 0}, "n_resamples")):
        with pytest.raises(ValueError, match=f"{message} must be"):
            calibration.bootstrap(
                calibration.brier_score, GOOD, LABELS, **options, key=jax.random.key(0)
            )


# --- diagram -------------------------------------------------------------------------------------


def test_the_diagram_holds_the_bins() -> None:
    """Accuracy 1/3 at 0.9, over-confident by 0.5666; 1 at 0.6, under-confident by 0.4."""
    p, y = np.array([0.9, 0.9, 0.9, 0.6]), np.array([1, 0, 0, 1])
    axes = Figure().subplots()
    assert calibration.reliability_diagram(p, y, n_bins=5, ax=axes) is axes
    bars, over, under = axes.containers
    found = [(b.get_x(), b.get_width(), b.get_height()) for b in bars]
    np.testing.assert_allclose(found, [(0.4, 0.2, 1.0), (0.8, 0.2, 1 / 3)], rtol=1e-12)
    np.testing.assert_allclose([(b.get_y(), b.get_height()) for b in over], [(1 / 3, 0.9 - 1 / 3)])
    np.testing.assert_allclose([(b.get_y(), b.get_height()) for b in under], [(1.0, -0.4)])
    assert over[0].get_edgecolor() != under[0].get_edgecolor()
    ece = 0.75 * (0.9 - 1 / 3) + 0.25 * 0.4
    assert axes.get_title() == f"ECE = {100 * ece:.2g}%, n = 4"
    shown = [text.get_text() for text in known(axes.get_legend()).get_texts()]
    assert shown == ["accuracy", "over-confident", "under-confident"]
    known(axes.get_figure(root=True)).draw_without_rendering()


def test_a_bin_of_no_width_is_seen() -> None:
    p, y = np.full(6, 0.75), np.array([1, 1, 0, 1, 1, 0])
    axes = calibration.reliability_diagram(p, y, binning="mass")
    (bar,) = axes.containers[0]
    assert bar.get_width() > 0
    assert bar.get_x() + bar.get_width() / 2 == pytest.approx(0.75)
