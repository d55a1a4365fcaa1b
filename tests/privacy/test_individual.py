"""What privacy costs each sample, against what it adds to steps and against dp-accounting."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from dp_accounting import (
    GaussianDpEvent,
    PoissonSampledDpEvent,
)
from dp_accounting.pld import PLDAccountant
from helpers import KEY, SQUARED, balle_and_wang, known, normal

import ntkdp
from ntkdp import batches, clipping, dp_sgd, models, noise, privacy
from ntkdp.clipping import Abadi, Automatic, NoClipping

N, D, DELTA = 5, 4, 1e-5
SIGMA, STEPS = 0.8, 4


def network(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w["a"]) @ w["b"]


WEIGHTS = {"a": normal(0, D, 3), "b": normal(1, 3, 2)}
X, Y = normal(2, N, D), normal(3, N, 2)
X = X.at[3].set(0.0)  # a sample without a gradient
Y = Y.at[4].set(1e3)  # a sample that is always clipped


def options(**more: Any) -> dict[str, Any]:
    return {
        "learning_rate": 0.1, "noise_multiplier": SIGMA, "reduction": "sum", **more,
    }  # fmt: skip


def added(rule: clipping.ClippingRule, scale: Any, **more: Any) -> np.ndarray:
    """What each sample adds to the steps of a run, in units of ``scale``: steps with and without.

    The run is walked by ``dp_sgd.build``, and each step is made again without a sample.
    """
    parts = [dp_sgd.build(network, X, Y, SQUARED, rule, **options(**more))]
    for i in range(N):
        rest = np.arange(N) != i
        parts.append(dp_sgd.build(network, X[rest], Y[rest], SQUARED, rule, **options(**more)))
    moves = [part.compile() for part in parts]
    state = parts[0].init(WEIGHTS)
    found = np.zeros((STEPS, N))
    for k in range(STEPS):
        key = jax.random.fold_in(KEY, k)
        after, *others = (move(key, state)[0] for move in moves)
        for i, other in enumerate(others):
            gaps = jax.tree.map(lambda a, b: (a - b) / 0.1, after.params, other.params)
            found[k, i] = math.sqrt(sum(jnp.sum((gaps[name] / scale[name]) ** 2) for name in gaps))
        state = after
    return found


FLAT, LAYERED = Abadi(1.5), Automatic([0.5, 2.0], scope="layerwise")


@pytest.mark.parametrize(
    ("rule", "scale", "more"),
    [
        pytest.param(FLAT, {"a": 1.5, "b": 1.5}, {}, marks=pytest.mark.slow),
        pytest.param(
            LAYERED, dict.fromkeys("ab", math.hypot(0.5, 2.0)), {}, marks=pytest.mark.slow
        ),
        (LAYERED, {"a": 0.5 * 2**0.5, "b": 2 * 2**0.5}, {"noise_per_group": True}),
    ],
    ids=["flat", "layerwise", "noise per group"],
)
def test_a_sample_pays_for_what_it_adds_to_the_steps(rule: Any, scale: Any, more: Any) -> None:
    run = dp_sgd.run(
        network, WEIGHTS, X, Y, SQUARED, rule, steps=STEPS, individual=True, record_every=3,
        key=KEY, **options(**more),
    )  # fmt: skip
    costs = privacy.individual(known(run.sensitivities), noise_multiplier=SIGMA)
    expected = np.sqrt((added(rule, scale, **more) ** 2).sum(axis=0)) / SIGMA
    np.testing.assert_allclose(costs.mu, expected, rtol=1e-7, atol=1e-9)
    assert costs.steps == STEPS
    assert costs.mu[3] == 0
    if rule is FLAT:
        assert costs.mu[4] == pytest.approx(math.sqrt(STEPS) / SIGMA, rel=1e-12)
    assert np.all(costs.mu <= math.sqrt(STEPS) / SIGMA * (1 + 1e-12))


def test_a_frozen_kernel_predicts_what_a_linear_model_pays() -> None:
    w = normal(4, D, 2)
    key = jax.random.split(KEY, 2)
    plan: Any = {"learning_rate": 0.05, "noise_multiplier": SIGMA, "sample_rate": 0.5, "steps": 6}
    run = dp_sgd.run(
        lambda w, x: x @ w, w, X, Y, SQUARED, FLAT, individual=True, outputs=True, key=key, **plan
    )
    flow = ntkdp.KernelFlow(X @ X.T, Y, SQUARED, FLAT)
    sensitivities = flow.sensitivities(known(run.outputs))
    one, other = (
        privacy.individual(given, noise_multiplier=SIGMA, sample_rate=0.5, steps=steps)
        for given, steps in ((known(run.sensitivities), None), (sensitivities, run.steps))
    )
    assert one.mu.shape == (2, N)
    np.testing.assert_array_equal(one.counts, other.counts)
    # With full batches each state holds until the next that is recorded.
    thin = privacy.individual(sensitivities[0, ::3], noise_multiplier=SIGMA, steps=[0, 3, 6])
    s = np.asarray(sensitivities[0])
    expected = np.sqrt(3 * (s[0] ** 2 + s[3] ** 2)) / SIGMA
    np.testing.assert_allclose(thin.mu, expected, rtol=1e-12)


def test_epsilon_of_full_batches_is_that_of_the_gaussian_mechanism() -> None:
    s = np.array([[1.0, 0.5, 0.01, 0.0], [1.0, 0.0, 0.0, 0.0]])
    costs = privacy.individual(s, noise_multiplier=SIGMA)
    assert costs.is_guarantee
    epsilon = costs.epsilon(DELTA)
    for mu, found in zip(costs.mu[:3], epsilon[:3], strict=True):
        assert balle_and_wang(mu, found) == pytest.approx(DELTA, rel=1e-6)
    assert epsilon[0] == pytest.approx(privacy.epsilon(SIGMA, 1.0, 2, DELTA), rel=1e-9)
    assert epsilon[3] == 0


def by_dp_accounting(s: np.ndarray, sigma: float, q: float) -> float:
    """Epsilon of steps with these sensitivities, by another library, rounded up."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for one in s:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma / one)))
    return float(accountant.get_epsilon(DELTA))


def test_epsilon_with_sampling_is_an_upper_bound_and_nearly_tight() -> None:
    rng = np.random.default_rng(0)
    q, steps = 0.2, 6
    s = np.minimum(rng.uniform(0.1, 2.0, 3) * np.linspace(1.2, 0.6, steps)[:, None], 1.0)
    costs = privacy.individual(s, noise_multiplier=SIGMA, sample_rate=q)
    epsilon = costs.epsilon(DELTA)
    for found, own in zip(epsilon, s.T, strict=True):
        exact = by_dp_accounting(own, SIGMA, q)
        assert exact * (1 - 1e-3) < found < 1.2 * exact
    # One bound for all of them is that of the most exposed, and none is above the promise.
    shared, promised = costs.epsilon(DELTA, n_bounds=1), privacy.epsilon(SIGMA, q, steps, DELTA)
    assert np.all(shared >= epsilon)
    assert np.ptp(shared) == 0
    assert shared[0] <= promised * (1 + 1e-9)
    always = privacy.individual(np.ones((steps, 1)), noise_multiplier=SIGMA, sample_rate=q)
    assert always.epsilon(DELTA)[0] == pytest.approx(promised, rel=1e-9)
    assert not always.is_guarantee
    limit = privacy.gaussian_dp(SIGMA, q, steps, DELTA)
    assert always.mu[0] == pytest.approx(limit.mu, rel=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_levels_round_up(dtype: Any) -> None:
    s = np.concatenate([np.logspace(-6, 0, 200), [0.0], 2.0 ** (-np.arange(40) / 8)])
    record = privacy.Sensitivities.start(len(s), dtype)
    record = record.after(jnp.asarray(s, dtype), jnp.asarray(s >= 1))
    assert record.clipped.tolist() == (s >= 1).astype(float).tolist()
    counts = np.asarray(record.counts)
    assert counts.sum(axis=1).tolist() == (s > 0).astype(int).tolist()
    levels = 2.0 ** (-np.arange(64)[::-1] / 8)
    counted = counts @ levels
    assert np.all(counted >= np.asarray(s, dtype).astype(float))
    seen = s > levels[0]
    assert np.all(counted[seen] <= s[seen] * 2.0 ** (1 / 8) * (1 + 1e-6))


def test_groups_and_the_exposed() -> None:
    s = np.array([[[1.0, 0.2, 0.6]], [[1.0, 0.4, 0.4]]])
    costs = privacy.individual(s, noise_multiplier=2.0)
    np.testing.assert_allclose(costs.mu, s[:, 0] / 2)
    assert costs.most_exposed(2).tolist() == [0, 2]
    assert costs.least_exposed().tolist() == [1]
    groups = costs.by_group(["b", "a", "a"], DELTA)
    assert isinstance(groups, privacy.GroupExposure)
    assert groups.labels.tolist() == ["a", "b"]
    assert groups.counts.tolist() == [2, 1]
    np.testing.assert_allclose(groups.mu, [0.2, 0.5])
    epsilon = costs.epsilon(DELTA).mean(axis=0)
    np.testing.assert_allclose(groups.epsilon, [epsilon[1:].mean(), epsilon[0]])
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        costs.by_group([0, 1], DELTA)


def test_records_survive_a_file_and_not_a_second_phase(tmp_path: Any) -> None:
    for key in (KEY, jax.random.split(KEY, 2)):
        run = dp_sgd.run(
            lambda w, x: x @ w, normal(4, D, 2), X, Y, SQUARED, FLAT, learning_rate=0.1, steps=2,
            individual=True, key=key,
        )  # fmt: skip
        run.save(tmp_path / "run.nc")
        again = ntkdp.Trajectory.load(tmp_path / "run.nc")
        for one, other in zip(
            jax.tree.leaves(run.sensitivities), jax.tree.leaves(again.sensitivities), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert run.then(run).sensitivities is None


@pytest.mark.parametrize(
    ("rule", "more", "words"),
    [
        (FLAT, {"batches": batches.Cyclic(2)}, "batches must be full ones or Poisson"),
        (NoClipping(), {}, "clipping must bound each sample"),
        (FLAT, {"adaptive": clipping.Adaptive(0.5)}, "adaptive must be None"),
        (FLAT, {"sharpness_aware": ntkdp.SharpnessAware(0.1)}, "sharpness_aware must be None"),
        (FLAT, {"noise": noise.Correlated([1.0, -0.5])}, "noise must be independent"),
    ],
)
def test_runs_refuse_what_is_not_known_one_by_one(rule: Any, more: Any, words: str) -> None:
    given: Any = {"individual": True, "learning_rate": 0.1, "steps": 1, "key": KEY, **more}
    with pytest.raises((TypeError, ValueError), match=words):
        dp_sgd.run(lambda w, x: x @ w, normal(4, D, 2), X, Y, SQUARED, rule, **given)


@pytest.mark.parametrize(
    ("given", "more", "words"),
    [
        ([[2.0]], {}, "sensitivities must be at most 1"),
        ([[-1.0]], {}, "sensitivities must be at least 0"),
        ([1.0], {}, r"sensitivities must have shape \(T, n\)"),
        ([[1.0]], {"noise_multiplier": 0.0}, "noise_multiplier must be positive"),
        ([[1.0]], {"batches": batches.FixedSize(1)}, "batches must be full ones or Poisson"),
        ([[1.0]], {"steps": [0]}, "steps must be a one-dimensional array of two"),
        ([[1.0]], {"steps": [0, 1]}, r"steps must have shape \(1,\)"),
        (privacy.Sensitivities.start(1, float), {"steps": [0, 1]}, "steps must be None"),
    ],
)
def test_bad_input(given: Any, more: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        privacy.individual(given, **{"noise_multiplier": 1.0, **more})
    flow = ntkdp.KernelFlow(jnp.eye(1), jnp.zeros((1, 1)), SQUARED, NoClipping())
    with pytest.raises(ValueError, match="clipping must bound each sample"):
        flow.sensitivities(jnp.zeros((1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_wide_kernels_rank_the_samples_of_digits(sample_rate: float) -> None:
    data = ntkdp.datasets.digits(n_train=200, n_test=1, standardise="unit")
    model, loss = models.mlp([1024], 10), ntkdp.losses.SoftmaxCrossEntropy()
    x = jnp.asarray(data.x_train)
    params = model.init(KEY, x)
    plan: Any = {"learning_rate": 2.0, "steps": 60, "noise_multiplier": 4.0}
    plan["sample_rate"] = sample_rate
    rule = Abadi(1.0)
    run = dp_sgd.run(
        model.apply, params, x, data.y_train, loss, rule, individual=True, record_every=60,
        key=jax.random.key(1), **plan,
    )  # fmt: skip
    kernel = ntkdp.infinite_ntk(model, x)
    flow = ntkdp.KernelFlow(kernel, data.y_train, loss, rule)
    paths = ntkdp.stochastic_flow.ensemble(
        flow, model.apply(params, x), outputs=True, key=jax.random.split(KEY, 8), **plan
    )
    costs = [
        privacy.individual(given, noise_multiplier=4.0, sample_rate=sample_rate, steps=steps)
        for given, steps in (
            (known(run.sensitivities), None),
            (flow.sensitivities(known(paths.outputs)), paths.steps),
        )
    ]
    observed, predicted = costs[0].mu, costs[1].mu.mean(axis=0)
    assert scipy.stats.spearmanr(predicted, observed).statistic >= 0.9
