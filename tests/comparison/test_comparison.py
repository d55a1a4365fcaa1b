"""Errors against closed forms and NumPy, alignment of times, and what must not look close."""

import inspect
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import rich.console
from helpers import examples, known
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import ntkdp
from ntkdp import compare, comparison
from ntkdp._results import console, page
from ntkdp.trajectory import Outcome

TIMES = np.array([0.0, 1.0, 2.0, 4.0])


def trajectory(
    loss: npt.ArrayLike, times: npt.ArrayLike = TIMES, **fields: Any
) -> ntkdp.Trajectory:
    loss = np.asarray(loss, np.float64)
    fields = {
        name: value if name == "outcome" else jnp.asarray(value) for name, value in fields.items()
    }
    fields.setdefault("clip_fraction", jnp.zeros(loss.shape))
    return ntkdp.Trajectory(jnp.asarray(times), jnp.asarray(loss), **fields)


RUN = trajectory([8.0, 4.0, 2.0, 1.0])


# --- closed forms --------------------------------------------------------------------------------


def test_errors_of_a_known_pair() -> None:
    """Relative errors 0.5, 0.25, 0.125; the start, wrong by half, is given and not predicted."""
    result = compare(trajectory([4.0, 6.0, 1.5, 1.125]), RUN)
    np.testing.assert_array_equal(result.times, [1.0, 2.0, 4.0])
    np.testing.assert_array_equal(result.relative_error, [0.5, 0.25, 0.125])
    assert result.sup_relative_error == 0.5
    assert result.time_of_sup == 1.0
    assert result.mean_relative_error == pytest.approx(0.875 / 3, rel=1e-15)
    assert result.coverage == 1.0
    assert result.final == {
        "predicted": {"loss": 1.125, "accuracy": None},
        "observed": {"loss": 1.0, "accuracy": None},
    }
    for unrecorded in ("output_error", "accuracy_error", "test_sup_relative_error",
                       "test_output_error", "test_accuracy_error", "observed_band",
                       "predicted_band", "band_coverage", "standardised_error"):  # fmt: skip
        assert getattr(result, unrecorded) is None
    assert result.output_errors is None
    assert result.test_output_errors is None


def test_a_short_run_is_not_flattered() -> None:
    """The loss falls by 0.1 of 2: a prediction that stays where it is has an error of 5%."""
    run = trajectory([2.0, 1.975, 1.95, 1.9], test_loss=[4.0, 4.0, 4.5, 4.25])
    result = compare(trajectory([2.0] * 4, test_loss=[4.0] * 4), run)
    assert result.sup_relative_error == pytest.approx(0.1 / 1.9)
    assert result.error_of_fall == pytest.approx(1.0)
    assert result.test_error_of_fall == pytest.approx(1.0)  # it rose by 0.5
    half = compare(trajectory([2.0, 1.9875, 1.975, 1.95]), run)
    assert half.error_of_fall == pytest.approx(0.5)
    assert half.test_error_of_fall is None


def test_the_fall_is_measured_from_the_start() -> None:
    run, late = trajectory([8.0, 4.0, 2.0, 1.0]), trajectory([4.0, 2.0, 1.0], TIMES[1:])
    prediction = trajectory([8.0, 6.0, 2.0, 1.0])
    assert compare(prediction, run).error_of_fall == pytest.approx(2 / 7)
    # A log that begins late falls from where its prediction starts; without both, nobody knows.
    assert compare(prediction, late).error_of_fall == pytest.approx(2 / 7)
    nowhere = trajectory([6.0, 2.0, 1.0], TIMES[1:], start=0.0)
    assert compare(nowhere, late).error_of_fall is None
    # Nothing moves: no share, unless nothing is wrong either.
    still = trajectory([8.0] * 4)
    assert compare(still, still).error_of_fall == 0.0
    assert compare(run, still).error_of_fall == np.inf
    assert compare(trajectory([8.0, 4.0, np.nan, 1.0]), run).error_of_fall == np.inf


def test_shares_are_compared_by_their_difference() -> None:
    fields = {"accuracy": [0.0, 0.5, 0.5, 0.75], "clip_fraction": [1.0, 1.0, 0.5, 0.0]}
    other = {"accuracy": [0.0, 0.5, 0.75, 1.0], "clip_fraction": [1.0, 0.625, 0.5, 0.0]}
    tests = {"test_loss": [1.0, 1.0, 1.0, 2.0], "test_accuracy": [0.0, 0.0, 0.25, 0.25]}
    other_tests = {"test_loss": [9.0, 1.0, 1.5, 3.5], "test_accuracy": [0.0, 0.5, 0.25, 0.25]}
    result = compare(
        trajectory(RUN.loss, **other, **other_tests), trajectory(RUN.loss, **fields, **tests)
    )
    assert result.accuracy_error == 0.25
    assert result.errors["accuracy"].time_of_sup == 2.0
    assert result.clip_fraction_error == 0.375
    assert result.test_accuracy_error == 0.5
    assert result.test_sup_relative_error == 0.75
    assert result.final["predicted"] == {"loss": 1.0, "accuracy": 1.0}
    assert result.final["observed"] == {"loss": 1.0, "accuracy": 0.75}


def test_errors_of_outputs_against_numpy_norms() -> None:
    generator = np.random.default_rng(0)
    predicted, observed = generator.normal(size=(2, 4, 5, 3))
    result = compare(
        trajectory(RUN.loss, outputs=predicted, test_outputs=observed[:, :2]),
        trajectory(RUN.loss, outputs=observed, test_outputs=predicted[:, :2]),
    )
    expected = [
        np.linalg.norm(p - o, "fro") / np.linalg.norm(o, "fro")
        for p, o in zip(predicted[1:], observed[1:], strict=True)
    ]
    np.testing.assert_allclose(result.errors["outputs"].over_time, expected, rtol=1e-14)
    assert result.output_error == pytest.approx(max(expected), rel=1e-14)
    each = np.linalg.norm(predicted - observed, axis=1) / np.linalg.norm(observed, axis=1)
    np.testing.assert_allclose(known(result.output_errors), each[1:].max(axis=0), rtol=1e-14)
    swapped = np.linalg.norm((predicted - observed)[:, :2], axis=1)
    swapped /= np.linalg.norm(predicted[:, :2], axis=1)
    np.testing.assert_allclose(
        known(result.test_output_errors), swapped[1:].max(axis=0), rtol=1e-14
    )


def test_seeds_are_averaged_before_they_are_compared() -> None:
    """Errors of single seeds are 1/2 and 1/4; against their mean the prediction is exact."""
    losses = np.array([[8.0, 2.0, 2.0, 2.0], [8.0, 6.0, 6.0, 6.0]])
    run = trajectory(losses, accuracy=np.array([[0.0] * 4, [1.0] * 4]), outcome=np.array([0, 0]),
                     outputs=np.stack([np.ones((4, 2, 1)), 3 * np.ones((4, 2, 1))]))  # fmt: skip
    prediction = trajectory(
        [8.0, 4.0, 4.0, 5.0], accuracy=[0.5] * 4, outputs=2 * np.ones((4, 2, 1))
    )
    result = compare(prediction, run)
    np.testing.assert_array_equal(result.relative_error, [0.0, 0.0, 0.25])
    assert result.accuracy_error == 0.0
    assert result.output_error == 0.0
    assert result.observed.loss.shape == (2, 4)
    np.testing.assert_array_equal(known(result.observed_band).mean, losses.mean(axis=0))
    assert compare(run, prediction).time_of_sup == 4.0


def test_band_against_scipy() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=(7, 5))
    band = comparison.band(values, levels=(0.1, 0.5))
    np.testing.assert_allclose(band.mean, np.mean(values, axis=0), rtol=1e-14)
    np.testing.assert_allclose(band.standard_deviation, stats.tstd(values, axis=0), rtol=1e-13)
    np.testing.assert_allclose(band.standard_error, stats.sem(values, axis=0), rtol=1e-13)
    np.testing.assert_allclose(band.quantiles[1], np.median(values, axis=0), rtol=1e-14)
    np.testing.assert_allclose(band.quantiles[0], stats.scoreatpercentile(values, 10, axis=0))


def test_band_of_one_seed_has_no_spread() -> None:
    band = comparison.band(np.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(band.mean, [1.0, 2.0])
    assert np.all(np.isnan(band.standard_deviation))
    assert np.all(np.isnan(band.standard_error))


@pytest.mark.parametrize(
    ("values", "levels", "message"),
    [(np.ones(3), (0.5,), r"values must have shape \(S, T\).*got \(3,\)"),
     (np.ones((2, 3)), (0.5, 50.0), r"levels must be in \[0, 1\], got \(0.5, 50.0\)")],
)  # fmt: skip
def test_wrong_bands(values: Any, levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison.band(values, levels)


# --- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["prediction", "run", "both"])
def test_what_is_not_finite_is_never_close(bad: float, side: str) -> None:
    broken = trajectory([8.0, 4.0, bad, 1.0], accuracy=[0.0, 0.0, bad, 0.0],
                        outputs=np.array([1.0, 1.0, bad, 1.0])[:, None, None],
                        clip_fraction=[0.0, 0.0, bad, 0.0])  # fmt: skip
    whole = trajectory(RUN.loss, accuracy=np.zeros(4), outputs=np.ones((4, 1, 1)))
    prediction = broken if side != "run" else whole
    result = compare(prediction, broken if side != "prediction" else whole)
    np.testing.assert_array_equal(result.relative_error, [0.0, np.inf, 0.0])
    assert result.sup_relative_error == np.inf
    assert result.mean_relative_error == np.inf
    assert result.time_of_sup == 2.0
    assert result.accuracy_error == np.inf
    assert result.clip_fraction_error == np.inf
    assert result.output_error == np.inf
    np.testing.assert_array_equal(result.output_errors, [np.inf])
    assert not result.sup_relative_error < 1e300


def test_one_diverged_seed_is_not_averaged_away() -> None:
    losses = np.array([[8.0, 4.0, 2.0, np.nan], [8.0, 4.0, 2.0, 1.0]])
    result = compare(RUN, trajectory(losses, outcome=np.array([3, 0])))
    assert result.sup_relative_error == np.inf
    assert result.time_of_sup == 4.0
    assert result.message.startswith("run: the trajectory became infinite or NaN")


def test_seeds_that_diverge_in_opposite_directions() -> None:
    outputs = np.ones((2, 4, 1, 1))
    outputs[:, 3] = np.array([np.inf, -np.inf])[:, None, None]
    run = trajectory(np.full((2, 4), [1.0, 1.0, 1.0, np.inf]), outputs=outputs)
    result = compare(trajectory(np.ones(4), outputs=np.ones((4, 1, 1))), run)
    np.testing.assert_array_equal(result.errors["outputs"].over_time, [0.0, 0.0, np.inf])
    np.testing.assert_array_equal(result.relative_error, [0.0, 0.0, np.inf])
    np.testing.assert_array_equal(known(result.observed_band).mean, [1.0, 1.0, 1.0, np.inf])


def test_a_solver_that_gave_up_is_reported() -> None:
    flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), ntkdp.losses.SquaredError(),
                            ntkdp.clipping.NoClipping())  # fmt: skip
    prediction = ntkdp.solve(flow, jnp.array([[4.0]]), TIMES, max_steps=2)
    assert int(prediction.outcome) == Outcome.MAX_STEPS
    result = compare(prediction, RUN)
    assert result.sup_relative_error == np.inf
    assert "prediction: the solver reached max_steps" in result.message
    assert "max_steps" in str(result.table().caption)
    assert compare(RUN, RUN).message == "success"


def test_zero_against_zero_and_against_something() -> None:
    run = trajectory([8.0, 4.0, 0.0, 0.0])
    result = compare(trajectory([8.0, 4.0, 0.0, 1e-300]), run)
    np.testing.assert_array_equal(result.relative_error, [0.0, 0.0, np.inf])


@pytest.mark.parametrize("scale", [1e-290, 1e290])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    outputs = np.ones((4, 3, 2))
    result = compare(
        trajectory(1.5 * scale * RUN.loss, outputs=1.5 * scale * outputs),
        trajectory(scale * RUN.loss, outputs=scale * outputs),
    )
    assert result.sup_relative_error == pytest.approx(0.5, rel=1e-14)
    assert result.output_error == pytest.approx(0.5, rel=1e-14)


# --- invariants ----------------------------------------------------------------------------------

losses_of_runs = hnp.arrays(np.float64, 6, elements=st.floats(1e-6, 1e6))


@examples(25, 50)
@given(losses_of_runs)
def test_no_error_against_itself(loss: Any) -> None:
    run = trajectory(
        loss, np.arange(6.0), accuracy=np.linspace(0, 1, 6), outputs=loss[:, None, None]
    )
    result = compare(run, run)
    assert all(errors.sup == 0 and errors.mean == 0 for errors in result.errors.values())
    assert set(result.errors) == {"loss", "accuracy", "outputs", "clip_fraction"}


@examples(25, 50)
@given(losses_of_runs, losses_of_runs, st.sets(st.integers(1, 5), min_size=1))
def test_only_shared_times_count(predicted: Any, observed: Any, kept: Any) -> None:
    """Thinning either side equals thinning both, and the sup is over what is left."""
    times = np.arange(6.0)
    index = np.array([0, *sorted(kept)])
    both = compare(trajectory(predicted, times), trajectory(observed, times))
    thin_run = trajectory(observed[index], times[index])
    thin_prediction = trajectory(predicted[index], times[index])
    of_run = compare(trajectory(predicted, times), thin_run)
    of_prediction = compare(thin_prediction, trajectory(observed, times))
    for result in (of_run, of_prediction, compare(thin_prediction, thin_run)):
        np.testing.assert_array_equal(result.times, times[index[1:]])
        np.testing.assert_array_equal(result.relative_error, both.relative_error[index[1:] - 1])
        np.testing.assert_array_equal(result.predicted.loss, predicted[index])
        np.testing.assert_array_equal(result.observed.loss, observed[index])
        assert result.sup_relative_error <= both.sup_relative_error
    assert of_run.coverage == 1.0
    assert of_prediction.coverage == len(kept) / 5


@examples(25, 50)
@given(losses_of_runs, losses_of_runs, st.floats(1e-3, 1e3))
def test_units_do_not_matter(predicted: Any, observed: Any, scale: Any) -> None:
    times = np.arange(6.0)
    plain = compare(trajectory(predicted, times), trajectory(observed, times))
    scaled = compare(
        trajectory(scale * predicted, scale * times), trajectory(scale * observed, scale * times)
    )
    np.testing.assert_allclose(scaled.relative_error, plain.relative_error, rtol=1e-9, atol=1e-14)


@examples(25, 50)
@given(losses_of_runs, st.floats(-0.9, 9.0))
def test_a_constant_factor_is_the_error(observed: Any, error: Any) -> None:
    times = np.arange(6.0)
    result = compare(trajectory((1 + error) * observed, times), trajectory(observed, times))
    np.testing.assert_allclose(result.relative_error, abs(error), rtol=1e-9, atol=1e-14)


# --- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_times_agree_to_rounding(dtype: Any) -> None:
    """Multiples of the learning rate and its running sum differ in the last digits."""
    rate, steps = 0.1, 200
    multiples = (np.arange(steps + 1) * rate).astype(dtype)
    exact = np.arange(steps + 1) * np.float64(rate)
    loss = np.exp(-exact)
    result = compare(trajectory(loss, exact), trajectory(loss, multiples))
    assert len(result.times) == steps
    assert result.sup_relative_error == 0.0


@pytest.mark.parametrize(("offset", "shared"), [(1e-15, 3), (1e-9, 2)])
def test_near_is_not_the_same(offset: float, shared: int) -> None:
    times = TIMES * np.array([1.0, 1.0, 1.0 + offset, 1.0])
    assert len(compare(trajectory(RUN.loss, times), RUN).times) == shared


def test_float32_times_that_are_not_the_same() -> None:
    times = (TIMES * (1 + 1e-5)).astype(np.float32)
    with pytest.raises(ValueError, match="share no time"):
        compare(trajectory(RUN.loss, times), trajectory(RUN.loss, TIMES.astype(np.float32)))


def test_a_time_is_matched_once() -> None:
    """Steps finer than float32 resolves: each time has at most one partner, in order."""
    fine = 1000.0 + np.arange(8) * 1e-5
    coarse = np.unique(fine.astype(np.float32))
    result = compare(
        trajectory(np.ones(9), np.append(0.0, fine)),
        trajectory(np.ones(len(coarse) + 1), np.append(np.float32(0), coarse)),
    )
    assert len(result.times) == len(coarse)
    assert np.all(np.diff(result.times) > 0)
    assert result.predicted.times.shape == result.observed.times.shape


def test_a_missing_start_hides_no_error() -> None:
    """Without the run's start, the first shared time is still a prediction."""
    result = compare(trajectory([8.0, 9.0, 2.0, 1.0]), trajectory(RUN.loss[1:], TIMES[1:]))
    np.testing.assert_array_equal(result.times, TIMES[1:])
    assert result.sup_relative_error == 1.25


def test_a_prediction_of_half_the_run_says_so() -> None:
    result = compare(trajectory(RUN.loss[:2], TIMES[:2]), RUN)
    assert result.coverage == pytest.approx(1 / 3)
    assert "33% of the run's recorded times" in str(result.table().caption)


def test_steps_and_seeds_are_kept_at_shared_times() -> None:
    run = trajectory(np.ones((2, 4)), steps=np.array([0, 10, 20, 40]), outcome=np.array([0, 0]),
                     outputs=np.ones((2, 4, 3, 1)))  # fmt: skip
    observed = compare(trajectory([1.0, 1.0], TIMES[[0, 2]]), run).observed
    assert known(observed.steps).tolist() == [0, 20]
    assert observed.loss.shape == (2, 2)
    assert known(observed.outputs).shape == (2, 2, 3, 1)
    assert np.shape(observed.outcome) == (2,)


@pytest.mark.parametrize("times", [TIMES + 0.25, np.array([0.0, 1.5, 2.5, 3.5])])
def test_no_shared_time(times: Any) -> None:
    message = (
        rf"prediction has 4 in \[{times[0]:g}, {times[-1]:g}\], run has 4 in \[0, 4\]; "
        r"predict at the times of the run, solve\(flow, initial, run.times\)"
    )
    with pytest.raises(ValueError, match=message):
        compare(trajectory(RUN.loss, times), RUN)


def test_only_the_start_is_shared() -> None:
    with pytest.raises(ValueError, match="share no time after the start"):
        compare(trajectory([8.0], [0.0]), RUN)


# --- distributions -------------------------------------------------------------------------------

ONES = np.ones((2, 2))


def integrals(sample: np.ndarray, y: float) -> tuple[float, float]:
    """Of (F - 1{x >= y})^2 and F (1 - F), F the empirical law; both are constant between points."""
    points = np.sort(np.append(sample, y))
    middle, width = (points[1:] + points[:-1]) / 2, np.diff(points)
    law = np.mean(sample[:, None] <= middle, axis=0)
    return width @ (law - (middle >= y)) ** 2, width @ (law * (1 - law))


def test_crps_against_the_integral_of_the_squared_difference() -> None:
    """Fair: the integral for the empirical law, less its own spread over S - 1."""
    generator = np.random.default_rng(3)
    predicted, observed = generator.gamma(2.0, size=(7, 5)), generator.gamma(2.0, size=(3, 5))
    expected = np.zeros((3, 5))
    for run, t in np.ndindex(3, 5):
        of_law, spread = integrals(predicted[:, t], float(observed[run, t]))
        expected[run, t] = of_law - spread / 6
    np.testing.assert_allclose(
        comparison.crps(predicted, observed), expected.mean(axis=0), rtol=1e-12
    )


@pytest.mark.parametrize("n_predicted", [2, 5])
def test_crps_of_gaussian_ensembles_is_unbiased(n_predicted: int) -> None:
    """sd (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), for ensembles of any size."""
    mean, sd, y = 1.0, 0.5, 1.4
    z = (y - mean) / sd
    expected = sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)
    predicted = np.random.default_rng(4).normal(mean, sd, (n_predicted, 20_000))
    scores = comparison.crps(predicted, np.full(20_000, y))
    assert abs(np.mean(scores) - expected) < 4 * stats.sem(scores)


def test_crps_without_spread_is_the_absolute_error() -> None:
    observed = np.array([[1.0, 2.0], [4.0, 2.0]])
    prediction = np.array([2.0, 5.0])
    for predicted in (prediction, prediction[None], np.stack([prediction] * 3)):
        np.testing.assert_array_equal(comparison.crps(predicted, observed), [1.5, 3.0])


def test_coverage_against_all_orders_of_exchangeable_runs() -> None:
    """Three predicted runs and two observed: inside is between the extremes of the three."""
    orders = list(itertools.permutations(range(5)))
    counts = Counter(sum(min(o[:3]) < y < max(o[:3]) for y in o[3:]) for o in orders)
    probability = {k: count / len(orders) for k, count in counts.items()}
    assert sum(k * p for k, p in probability.items()) / 2 == pytest.approx(2 / 4)
    for order in orders:
        values = np.array(order, np.float64)[:, None]
        found = comparison.band_coverage(values[:3], values[3:])
        inside = round(2 * found.share[0])
        expected = sum(p for p in probability.values() if p <= probability[inside] + 1e-12)
        assert found.level == 0.5
        assert found.p_value[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("inside", [20, 33, 36, 40])
def test_coverage_by_a_known_law_is_binomial(inside: int) -> None:
    """A predicted ensemble without end leaves no doubt about the band."""
    predicted = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)[:, None]
    observed = np.where(np.arange(40) < inside, 0.0, 3.0)[:, None]
    found = comparison.band_coverage(predicted, observed)
    expected = stats.binomtest(inside, 40, found.level).pvalue
    assert found.level == pytest.approx(0.9, abs=1e-5)
    assert found.p_value[0] == pytest.approx(expected, rel=0.02)


def test_coverage_of_runs_of_the_same_law_and_of_another() -> None:
    """Four thousand trials of 19 predicted runs and 20 observed; a skewed law."""
    generator = np.random.default_rng(5)
    predicted, observed = (
        generator.gamma(0.7, size=(19, 4000)),
        generator.gamma(0.7, size=(20, 4000)),
    )
    found = comparison.band_coverage(predicted, observed)
    assert found.level == 0.9
    assert abs(np.mean(found.share) - 0.9) < 4 * stats.sem(found.share)
    rejected = np.mean(found.p_value <= 0.05)
    assert 0.005 < rejected < 0.05 + 4 * (0.05 * 0.95 / 4000) ** 0.5
    # A binomial law would forget that the band is random too.
    naive = [stats.binomtest(k, 20, 0.9).pvalue for k in range(21)]
    assert np.mean(np.take(naive, np.rint(20 * found.share).astype(int)) <= 0.05) > 2 * 0.05
    narrow = comparison.band_coverage(0.2 * predicted, observed)
    assert np.mean(narrow.p_value <= 0.05) > 0.5


@examples(25, 50)
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_coverage_knows_ranks_only(n_predicted: Any, level: Any, seed: Any) -> None:
    generator = np.random.default_rng(seed)
    predicted, observed = generator.normal(size=(n_predicted, 3)), generator.normal(size=(4, 3))
    found = comparison.band_coverage(predicted, observed, level)
    size = n_predicted + 1
    possible = np.array([(size - 2 * j) / size for j in range(1, n_predicted // 2 + 1)])
    assert abs(found.level - level) <= np.min(np.abs(possible - level)) + 1e-12
    assert found.level in possible
    mapped = comparison.band_coverage(np.exp(predicted), np.exp(observed), level)
    np.testing.assert_array_equal(mapped.share, found.share)
    np.testing.assert_array_equal(mapped.p_value, found.p_value)
    assert np.all((found.p_value > 0) & (found.p_value <= 1))


def test_standardised_error_against_scipy() -> None:
    generator = np.random.default_rng(6)
    predicted, observed = generator.normal(1.0, 2.0, (9, 4)), generator.gamma(2.0, size=(5, 4))
    welch = stats.ttest_ind(predicted, observed, equal_var=False)
    np.testing.assert_allclose(
        comparison.standardised_error(predicted, observed), welch.statistic, rtol=1e-12
    )
    of_mean = stats.ttest_1samp(observed, predicted[0])
    np.testing.assert_allclose(
        comparison.standardised_error(predicted[0], observed), -of_mean.statistic, rtol=1e-12
    )
    same = np.ones((2, 2))
    np.testing.assert_array_equal(comparison.standardised_error(same, same), 0.0)
    np.testing.assert_array_equal(comparison.standardised_error(same - 1, same), -np.inf)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_distributions_that_are_not_finite_are_never_close(bad: float) -> None:
    good, broken = np.arange(6.0).reshape(3, 2), np.arange(6.0).reshape(3, 2)
    broken[1, 1] = bad
    for predicted, observed in ((good, broken), (broken, good), (broken, broken)):
        assert np.all(np.isfinite(comparison.crps(predicted, observed)) == [True, False])
        z = comparison.standardised_error(predicted, observed)
        assert np.all(np.isfinite(z) == [True, False])
    assert comparison.band_coverage(good, broken).share[1] == pytest.approx(2 / 3)


def test_a_band_of_coinciding_runs_has_no_p_value() -> None:
    predicted = np.array([[1.0, 1.0], [1.0, 2.0]])
    found = comparison.band_coverage(predicted, np.array([[1.0, 1.5], [3.0, 1.5]]))
    np.testing.assert_array_equal(found.share, [0.5, 1.0])
    np.testing.assert_array_equal(np.isnan(found.p_value), [True, False])


def test_an_ensemble_is_compared_after_the_start() -> None:
    """By hand: runs 1 and 3 against 2 and 5, and a start that all share."""
    prediction = trajectory([[8.0, 1.0], [8.0, 3.0]], TIMES[:2])
    result = compare(prediction, trajectory([[8.0, 2.0], [8.0, 5.0]], TIMES[:2]))
    np.testing.assert_array_equal(known(result.predicted_band).mean, [8.0, 2.0])
    np.testing.assert_allclose(known(result.predicted_band).quantiles[:, 1], [1.1, 2.0, 2.9])
    assert known(result.band_coverage).level == pytest.approx(1 / 3)
    np.testing.assert_array_equal(known(result.band_coverage).share, [0.5])
    # Distances 1, 1 and 4, 2: means 1 and 3, each less half the gap of 2.
    np.testing.assert_array_equal(result.crps, [1.0])
    assert result.mean_crps == 1.0
    # The mean, 2, alone: distances 0 and 3.
    assert result.skill() == pytest.approx(1 - 1.0 / 1.5)
    np.testing.assert_allclose(known(result.standardised_error), [-1.5 / (1 + 1.5**2) ** 0.5])
    assert result.coverage == 1.0


def test_what_is_no_ensemble_has_no_distribution() -> None:
    run = trajectory(np.stack([RUN.loss, 3 * RUN.loss]))
    for prediction in (RUN, trajectory(RUN.loss[None])):
        result = compare(prediction, run)
        assert result.predicted_band is None
        assert result.band_coverage is None
        np.testing.assert_array_equal(result.crps, RUN.loss[1:])
        assert result.skill() == 0.0
        assert result.table().row_count == 2
    np.testing.assert_allclose(known(compare(RUN, run).standardised_error), -1.0)
    assert compare(trajectory(RUN.loss[None]), run).standardised_error is None
    assert compare(run, RUN).standardised_error is None
    assert known(compare(run, RUN).band_coverage).n_runs == 1


def test_skill_over_another_prediction() -> None:
    generator = np.random.default_rng(7)
    losses = np.asarray(RUN.loss) * generator.lognormal(0.0, 0.3, (30, 4))
    run, ensemble = trajectory(losses[:10]), trajectory(losses[10:])
    ours, theirs = compare(ensemble, run), compare(RUN, run)
    assert ours.skill(theirs) == pytest.approx(1 - ours.mean_crps / theirs.mean_crps)
    assert ours.skill(theirs) > 0
    assert ours.skill(ours) == 0.0
    assert compare(run, RUN).skill(compare(RUN, RUN)) == -np.inf
    failed = compare(trajectory(np.full(4, np.nan)), run)
    assert failed.skill(theirs) == failed.skill() == -np.inf
    assert ours.skill(failed) == 1.0
    for other in (compare(RUN, RUN), compare(RUN, trajectory(losses[:10, :3], TIMES[:3]))):
        with pytest.raises(ValueError, match="same run at the same times"):
            ours.skill(other)
    with pytest.raises(TypeError, match="reference must be a Comparison, got str"):
        inspect.unwrap(comparison.Comparison.skill)(ours, "frozen")


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: comparison.band_coverage(ONES[:1], ONES), "predicted must hold at least 2"),
     (lambda: comparison.band_coverage(ONES, np.ones(3)), "must have the same times"),
     (lambda: comparison.band_coverage(ONES, ONES, 1.0), r"level must be in \(0, 1\), got 1.0"),
     (lambda: comparison.band_coverage(ONES, ONES, np.nan), "level must be in"),
     (lambda: comparison.crps(1.0, ONES), r"predicted must have shape \(S, T\).*got \(\)"),
     (lambda: comparison.crps(ONES, np.ones((0, 2))), "observed must have shape"),
     (lambda: comparison.standardised_error(ONES, ONES[0]), "observed must hold at least 2 runs"),
     (lambda: comparison.standardised_error(ONES[:1], ONES), "predicted must hold at least 2")],
)  # fmt: skip
def test_wrong_distributions(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_noisy_runs_of_a_linear_model_are_inside_the_band_of_their_kernel() -> None:
    """And not inside that of a third of the noise; the frozen flow has a worse score."""
    key_x, key_y, of_runs, of_ensemble = jax.random.split(jax.random.key(8), 4)
    x, y = jax.random.normal(key_x, (8, 12)), jax.random.normal(key_y, (8, 1))
    loss, rule = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
    options: dict[str, Any] = {
        "learning_rate": 0.2,
        "steps": 40,
        "record_every": 10,
        "sample_rate": 0.5,
    }
    run = ntkdp.dp_sgd.run(
        lambda w, x: x @ w, jnp.zeros((12, 1)), x, y, loss, rule,
        noise_multiplier=1.5, key=jax.random.split(of_runs, 50), **options,
    )  # fmt: skip
    flow = ntkdp.KernelFlow(x @ x.T, y, loss, rule)
    keys = jax.random.split(of_ensemble, 199)
    right, quiet = (
        compare(ntkdp.stochastic_flow.ensemble(
            flow, jnp.zeros((8, 1)), noise_multiplier=noise, key=keys, **options), run,
            allow="noise_multiplier")
        for noise in (1.5, 0.5)
    )  # fmt: skip
    assert known(right.band_coverage).level == 0.9
    assert np.min(known(right.band_coverage).p_value) > 0.01
    assert np.max(np.abs(known(right.standardised_error))) < 3
    assert np.min(known(quiet.band_coverage).p_value) < 1e-4
    assert right.skill(quiet) > 0
    frozen = compare(ntkdp.solve(flow, jnp.zeros((8, 1)), run.times), run)
    assert right.skill(frozen) > 0.2
    assert right.skill() > 0.1


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"), [("prediction", ([1.0], RUN)), ("run", (RUN, None))]
)
def test_wrong_types(name: str, arguments: Any) -> None:
    given_type = "list" if name == "prediction" else "NoneType"
    # Tests check annotations at run time, which users do not: look beneath.
    with pytest.raises(TypeError, match=f"{name} must be a Trajectory.*got {given_type}"):
        inspect.unwrap(compare)(*arguments)


def test_outputs_of_another_shape() -> None:
    with pytest.raises(
        ValueError, match=r"outputs of the same shape, got \(4, 2, 1\) and \(4, 3, 1\)"
    ):
        compare(
            trajectory(RUN.loss, outputs=np.ones((4, 2, 1))),
            trajectory(RUN.loss, outputs=np.ones((4, 3, 1))),
        )


@pytest.mark.parametrize(("times", "loss"), [(TIMES, np.ones(3)), (TIMES[:0], np.ones(0)),
                                             (TIMES, np.ones((2, 2, 4)))])  # fmt: skip
def test_malformed_trajectories(times: Any, loss: Any) -> None:
    with pytest.raises(ValueError, match="run must have times of shape"):
        compare(RUN, trajectory(loss, times))


# --- presentation and the whole way --------------------------------------------------------------


def printed(result: comparison.Comparison) -> str:
    """The table as a wide terminal shows it."""
    text = io.StringIO()
    rich.console.Console(width=120, file=text).print(result.table())
    return text.getvalue()


def test_table_shows_the_numbers() -> None:
    prediction = trajectory([8.0, 6.0, 1.5, np.nan], accuracy=[0.0, 0.25, 0.5, 0.5])
    run = trajectory(RUN.loss, accuracy=[0.0, 0.25, 0.25, 0.5])
    lines = printed(compare(prediction, run)).splitlines()
    (loss,) = [line.split("│") for line in lines if "training loss" in line]
    assert [cell.strip() for cell in loss[2:8]] == [
        "nan", "1", "infinite", "infinite", "4", "infinite",
    ]  # fmt: skip
    (accuracy,) = [line.split("│") for line in lines if "training accuracy" in line]
    assert [cell.strip() for cell in accuracy[2:8]] == ["0.5", "0.5", "0.25", "", "2", "0.0833"]


def test_table_shows_the_distribution() -> None:
    prediction = trajectory([[8.0, 1.0], [8.0, 3.0]], TIMES[:2])
    result = compare(prediction, trajectory([[8.0, 2.0], [8.0, 5.0]], TIMES[:2]))
    rows = [line.split("│")[1:-1] for line in printed(result).splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells["training loss"][2:4] == ["42.9 %", "33.3 %"]  # 1.5 of 3.5, and of a fall by 4.5
    assert cells["runs in the band"] == ["0.3333", "0.5", "0.167", "", "1", "0.167"]
    assert cells["CRPS"] == ["", "", "1", "", "1", "1"]
    assert cells["error in std. errors"] == ["", "", "0.832", "", "1", "0.832"]


def test_a_comparison_prints_as_its_table() -> None:
    run = trajectory(RUN.loss, accuracy=[0.0, 0.25, 0.25, 0.5])
    result = compare(trajectory([8.0, 6.0, 1.5, 1.25], accuracy=[0.0, 0.25, 0.5, 0.5]), run)
    title, *lines = str(result).splitlines()
    assert title == "Prediction against run at 3 times, t = 1 to 4"
    assert lines == [
        "                                        largest  of the          mean",
        "                   predicted  observed    error    fall  at t   error",
        "training loss           1.25         1     50 %  28.6 %     1  33.3 %",
        "training accuracy        0.5       0.5     0.25             2  0.0833",
        "clip fraction              0         0        0             1       0",
    ]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=6, max_size=6))
def test_a_printed_table_holds_its_cells(cells: list[str]) -> None:
    """One line a row, and every cell of it, aligned to its column."""
    cells = [re.sub(r"[\s\x00-\x1f\x7f-\x9f]", "_", cell) for cell in cells]
    text = console.plain_table("title", ("a", "two words", "c"), [cells[:3], cells[3:]], ["note"])
    lines = text.split("\n")
    assert (lines[0], lines[-1]) == ("title", "note")
    width = max(len("words"), len(cells[1]), len(cells[4]))
    first = max(4, len(cells[0]), len(cells[3]))
    for line, row in zip(lines[-3:-1], (cells[:3], cells[3:]), strict=True):
        assert line.startswith(row[0])
        assert line.ljust(first + 2 + width)[first + 2 : first + 2 + width] == row[1].rjust(width)
        assert line.endswith(row[2])


def test_a_comparison_in_a_notebook_escapes_what_it_shows() -> None:
    shown = compare(trajectory([8.0, 6.0, 1.5, 1.25]), RUN)._repr_html_()
    assert "<td>training loss</td><td class=number>1.25</td>" in shown
    assert "html lang" not in shown
    hostile = page.summary("<b>", ("<i>",), [("<script>",)], ["a & b"])
    for tag in ("<b>", "<i>", "<script>"):
        assert tag not in hostile
    assert "&lt;script&gt;" in hostile
    assert "a &amp; b" in hostile


def test_a_comparison_as_a_frame() -> None:
    """Means over seeds at the times after the start, and errors as the comparison has them."""
    fields = {"clip_fraction": np.zeros((2, 4)), "outputs": np.ones((2, 4, 3, 1))}
    prediction = trajectory([[8.0, 3.0, 2.0, 1.0], [8.0, 4.0, 2.0, 1.0]], **fields)
    result = compare(prediction, trajectory(RUN.loss, outputs=2 * np.ones((4, 3, 1))))
    frame = result.to_pandas()
    assert frame.index.tolist() == [1.0, 2.0, 4.0]
    assert frame["loss", "predicted"].tolist() == [3.5, 2.0, 1.0]
    assert frame["loss", "observed"].tolist() == [4.0, 2.0, 1.0]
    assert frame["loss", "error"].tolist() == [0.125, 0.0, 0.0]
    assert frame["outputs"].columns.tolist() == ["error"]
    assert frame["outputs", "error"].tolist() == [0.5] * 3
    assert frame.columns.names == ["quantity", "value"]


def test_plot_draws_both() -> None:
    result = compare(trajectory([8.0, 6.0, 1.5, 1.0]), RUN)
    observed, predicted = result.plot().lines
    np.testing.assert_array_equal(observed.get_ydata(), RUN.loss)
    np.testing.assert_array_equal(predicted.get_ydata(), [8.0, 6.0, 1.5, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_recursion_is_the_run_of_a_linear_model(dtype: Any) -> None:
    """A linear model trains by its kernel: the errors are rounding, outputs and shares included."""
    key_x, key_y = jax.random.split(jax.random.key(3))
    x, y = jax.random.normal(key_x, (6, 4), dtype), jax.random.normal(key_y, (6, 2), dtype)
    params = jnp.zeros((4, 2), dtype)
    loss, rule = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
    options: dict[str, Any] = {
        "learning_rate": 0.1,
        "steps": 30,
        "record_every": 7,
        "outputs": True,
    }
    run = ntkdp.dp_sgd.run(
        lambda w, x: x @ w, params, x, y, loss, rule, key=jax.random.key(0), **options
    )
    flow = ntkdp.KernelFlow(x @ x.T, y, loss, rule)
    result = compare(ntkdp.recursion(flow, jnp.zeros_like(y), **options), run)
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    assert len(result.times) == 5
    assert result.sup_relative_error < tolerance
    assert known(result.output_error) < tolerance
    assert result.clip_fraction_error == 0.0
