"""Audits: bounds against exact laws, coverage over repetitions, and attacks of real runs."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SQUARED, linear
from scipy import stats

from ntkdp import KernelFlow, advisor, dp_sgd, privacy
from ntkdp.clipping import Abadi

DELTA = 1e-3


def gaussians(seed: int, mu: float, runs: int) -> np.ndarray:
    scores = np.random.default_rng(seed).standard_normal((2, runs))
    scores[0] += mu
    return scores


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    # Scores of two values, so that every threshold between them is the same.
    present = np.tile(np.repeat([1.0, 0.0], [30, 20]), 2)
    absent = np.tile(np.repeat([1.0, 0.0], [10, 40]), 2)
    found = privacy.audit(present, absent, DELTA, confidence=0.9)
    limits = [stats.binomtest(errors, 50).proportion_ci(0.9, "exact").high for errors in (10, 20)]
    assert (found.false_positive, found.false_negative) == pytest.approx(tuple(limits), rel=1e-9)
    fp, fn = limits
    expected = max(math.log((1 - fn - DELTA) / fp), math.log((1 - fp - DELTA) / fn))
    assert found.epsilon == pytest.approx(expected, rel=1e-9)
    mu = -stats.norm.ppf(fp) - stats.norm.ppf(fn)
    assert found.mu == pytest.approx(mu, rel=1e-9)
    assert found.gaussian_epsilon == pytest.approx(privacy.epsilon(1 / mu, 1.0, 1, DELTA), rel=1e-6)


@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
def test_bounds_hold_as_often_as_they_say(mu: float) -> None:
    bound = privacy.epsilon(1 / mu, 1.0, 1, DELTA) if mu else 0.0
    pairs = [gaussians(seed, mu, 400) for seed in range(200)]
    found = [privacy.audit(present, absent, DELTA) for present, absent in pairs]
    # 95% of 200, with room for chance of 4 standard deviations.
    assert np.mean([one.mu <= mu for one in found]) >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / 200)
    assert np.mean([one.epsilon <= bound for one in found]) >= 0.95
    if mu:
        assert np.median([one.mu for one in found]) > 0.5 * mu


def test_failed_runs_and_scores_without_a_difference_prove_nothing() -> None:
    same = np.full(100, 3.0)
    assert privacy.audit(same, same, DELTA).epsilon == 0
    assert privacy.audit(same, same, DELTA).mu == 0
    assert privacy.audit(np.full(100, np.inf), np.full(100, -np.inf), DELTA).epsilon > 2


# ------------------------------------------------------------------------------- one run


def by_definition(m: int, r: int, correct: int, epsilon: float, delta: float) -> float:
    """The bound of Steinke et al.'s theorem, in loops."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    chances = [math.comb(r, k) * right**k * (1 - right) ** (r - k) for k in range(r + 1)]
    bound = sum(chances[correct:])
    largest = max(
        (sum(chances[max(correct - i, 0) : correct]) / i for i in range(1, correct + 1)),
        default=0.0,
    )
    return min(1.0, bound + 2 * m * delta * largest)


@pytest.mark.parametrize(("m", "r", "correct"), [(40, 20, 19), (40, 40, 31), (30, 7, 7)])
def test_the_bound_of_one_run_is_that_of_its_theorem(m: int, r: int, correct: int) -> None:
    included = np.arange(m) % 2 == 0
    scores = included * 1.0 + 1e-3 * np.arange(m)
    # Guesses are the extremes: turn some of them around.
    order = np.argsort(scores)
    guessed = np.concatenate([order[: r // 2], order[m - (r + 1) // 2 :]])
    for wrong in guessed[: r - correct]:
        included[wrong] = ~included[wrong]
    found = privacy.audit_one_run(included, scores, 1e-4, guesses=r)
    assert found > 0
    assert by_definition(m, r, correct, found, 1e-4) == pytest.approx(0.05, rel=1e-4)


def test_one_run_of_randomised_response_is_not_above_its_epsilon() -> None:
    epsilon, m = 1.5, 400
    rng = np.random.default_rng(0)
    right = 1 / (1 + math.exp(-epsilon))
    found = []
    for _ in range(200):
        included = rng.random(m) < 0.5
        scores = np.where(rng.random(m) < right, included, ~included) + rng.random(m) * 0.1
        found.append(privacy.audit_one_run(included, scores, 1e-9, guesses=m))
    assert np.mean(np.asarray(found) <= epsilon) >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / 200)
    assert np.median(found) > 0.7 * epsilon
    coin = privacy.audit_one_run(rng.random(m) < 0.5, rng.random(m), 1e-9, guesses=m)
    assert coin < 0.3


# ------------------------------------------------------------------------------- real runs
# A linear model: four samples, and a canary with an input of its own, clipped at every step.

RATE, STEPS, FAR = 0.1, 8, 30.0
SPREAD = np.random.default_rng(1)
X = np.concatenate([SPREAD.standard_normal((4, 3)), np.zeros((4, 1))], axis=1)
Y = SPREAD.standard_normal((4, 1))
CANARY = np.array([[0.0, 0.0, 0.0, 1.0]])


def last_outputs(canary: bool, sigma: float, keys: Any, R: float = 1.0, q: float = 1.0) -> Any:
    """Outputs at the canary's input after training with it or without it."""
    x, y = (np.concatenate([X, CANARY]), np.append(Y, [[FAR]], 0)) if canary else (X, Y)
    run = dp_sgd.run(
        linear, jnp.zeros((4, 1)), x, y, SQUARED, Abadi(R), learning_rate=RATE, steps=STEPS,
        noise_multiplier=sigma, sample_rate=q, reduction="sum", test_x=CANARY, outputs=True,
        record_every=STEPS, key=keys,
    )  # fmt: skip
    assert run.test_outputs is not None
    return np.asarray(run.test_outputs[:, -1, 0, 0])


def repeated_audits(sigma: float, R: float, repetitions: int, runs: int) -> list[privacy.Audit]:
    keys = jax.random.split(jax.random.key(3), (2, repetitions * runs))
    present, absent = (
        last_outputs(canary, sigma, keys[int(canary)], R).reshape(repetitions, runs)
        for canary in (True, False)
    )
    return [privacy.audit(one, other, DELTA) for one, other in zip(present, absent, strict=True)]


def test_audits_of_runs_are_below_the_promise_and_find_sabotage() -> None:
    promised = privacy.epsilon(2.0, 1.0, STEPS, DELTA)
    honest = repeated_audits(2.0, 1.0, 50, 1000)
    assert all(one.epsilon <= promised for one in honest)
    assert np.mean([one.gaussian_epsilon <= promised for one in honest]) >= 0.9
    assert np.median([one.gaussian_epsilon for one in honest]) > 0.7 * promised
    # Half of the noise; and no clipping, so that the canary moves weights by far more than R.
    for sigma, R, found_by in ((1.0, 1.0, "gaussian_epsilon"), (2.0 / FAR, FAR, "epsilon")):
        broken = repeated_audits(sigma, R, 5, 1000)
        assert all(getattr(one, found_by) > promised for one in broken)


@pytest.mark.parametrize("q", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_the_predicted_advantage_is_that_of_real_runs(q: float) -> None:
    sigma, runs = 1.5, 3000
    keys = jax.random.split(jax.random.key(4), (2, runs))
    present, absent = (
        last_outputs(canary, sigma, keys[int(canary)], q=q) for canary in (True, False)
    )
    real = privacy.advantage(-((present - FAR) ** 2), -((absent - FAR) ** 2))
    x, y = np.concatenate([X, CANARY]), np.append(Y, [[FAR]], 0)
    flow = KernelFlow(x @ x.T, y, SQUARED, Abadi(1.0), reduction="sum")
    predicted = advisor.membership_advantage(
        flow, jnp.zeros((5, 1)), 4, learning_rate=RATE, steps=STEPS, noise_multiplier=sigma,
        sample_rate=q, key=keys[0],
    )  # fmt: skip
    error = math.hypot(real.standard_error, predicted.standard_error)
    assert abs(predicted.advantage - real.advantage) < 4 * error
    assert predicted.area == pytest.approx(real.area, abs=0.04)
    limit = privacy.delta(sigma, q, STEPS, epsilon=0.0)
    assert 0.2 < predicted.advantage < limit + 4 * predicted.standard_error
    # A sample that resembles the others is harder to find.
    typical = advisor.membership_advantage(
        flow, jnp.zeros((5, 1)), 0, learning_rate=RATE, steps=STEPS, noise_multiplier=sigma,
        sample_rate=q, key=keys[0],
    )  # fmt: skip
    assert typical.advantage < predicted.advantage


def test_advantage_of_gaussians() -> None:
    found = privacy.advantage(*gaussians(0, 1.0, 4000))
    expected = 2 * stats.norm.cdf(0.5) - 1
    assert abs(found.advantage - expected) < 4 * found.standard_error
    assert found.area == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.03)
    nothing = privacy.advantage(*gaussians(1, 0.0, 4000))
    assert abs(nothing.advantage) < 4 * nothing.standard_error


@pytest.mark.parametrize(
    ("given", "words"),
    list(
        itertools.chain(
            [((np.zeros(3), np.zeros(9), DELTA), "present must be an array of 4")],
            [((np.zeros(9), np.full(9, np.nan), DELTA), "absent must not be NaN")],
            [((np.zeros(9), np.zeros(9), 0.0), "delta must be")],
        )
    ),
)
def test_bad_scores(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        privacy.audit(*given)


@pytest.mark.parametrize(
    ("included", "scores", "guesses", "words"),
    [
        ([1, 0], [0.0, 1.0], 1, "included must be an array"),
        ([True, False], [0.0], 1, "scores must have shape"),
        ([True, False], [0.0, 1.0], 3, "guesses must be at most the 2 canaries"),
        ([True, False], [0.0, np.nan], 1, "scores must be finite"),
    ],
)
def test_bad_guesses(included: Any, scores: Any, guesses: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        privacy.audit_one_run(included, scores, DELTA, guesses=guesses)


@pytest.mark.parametrize("sample", [-1, 2])
def test_a_sample_that_is_not_there(sample: int) -> None:
    flow = KernelFlow(jnp.eye(2), jnp.zeros((2, 1)), SQUARED, Abadi(1.0))
    with pytest.raises(ValueError, match="sample must be"):
        advisor.membership_advantage(
            flow, jnp.zeros((2, 1)), sample, learning_rate=0.1, steps=1,
            key=jax.random.split(jax.random.key(0), 4),
        )  # fmt: skip
