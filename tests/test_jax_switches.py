"""JAX's own checks are passed: NaN, dtypes and ranks are as meant wherever numbers are made."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, Gradients

import ntkdp
from ntkdp import calibration, certificates, dp_sgd, ntk, optimizers, spectrum, stochastic_flow
from ntkdp import high_dimensional_sgd as hsgd

N, M, D = 6, 2, 3
DTYPE = jnp.float64
LOSS, RULE = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
NOISY: dict[str, Any] = {"learning_rate": 0.1, "steps": 3, "noise_multiplier": 0.5}
LAYERWISE = ntkdp.clipping.Abadi(1.0, scope="layerwise")
RULES = {
    "none": ntkdp.clipping.NoClipping(),
    "global": ntkdp.clipping.Global(1.0, Z=4.0),
    "automatic": ntkdp.clipping.Automatic(1.0),
    "psac": ntkdp.clipping.PSAC(1.0),
    "batch": ntkdp.clipping.Batch(1.0),
}
LOSSES = {
    "cross-entropy": (ntkdp.losses.SoftmaxCrossEntropy(), np.arange(N) % 2, 2),
    "logistic": (ntkdp.losses.Logistic(), np.arange(N) % 2, 1),
    "huber": (ntkdp.losses.Huber(0.5), np.ones((N, 1)), 1),
}


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(len(shape)).normal(size=shape), DTYPE)


X, Y, X_TEST, Y_TEST = normal(N, D), normal(N, 1), normal(M, D, scale=0.5), normal(M, 1, scale=0.5)
PARAMS = {"body": normal(D, 4), "head": {"w": normal(4, 1), "b": normal(1)}}
TESTS: dict[str, Any] = {"test_x": X_TEST, "test_targets": Y_TEST}
PROBS, CLASSES = np.array([0.9, 0.8, 0.3, 0.6], DTYPE), np.array([1, 0, 0, 1])
LOGITS = normal(8, 3)
PRIVATELY: dict[str, Any] = {**NOISY, "clip_norm": 1.0, "key": KEY}


def apply(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["body"]) @ params["head"]["w"] + params["head"]["b"][None]


MLP = ntkdp.models.mlp([4], 1)
WEIGHT = ntkdp.WeightFlow(apply, X, Y, LOSS, RULE, **TESTS)


class Made:
    """What takes a program to make, made when it is first asked for."""

    @cached_property
    def keys(self) -> Any:
        return jax.random.split(KEY, 3)

    @cached_property
    def kernel(self) -> Any:
        return ntkdp.layerwise_ntk(apply, PARAMS, X)

    @cached_property
    def total(self) -> Any:
        return self.kernel.total

    @cached_property
    def start(self) -> Any:
        return apply(PARAMS, X)

    @cached_property
    def flow(self) -> Any:
        return ntkdp.KernelFlow(self.total, Y, LOSS, RULE)

    @cached_property
    def linearised(self) -> Any:
        return ntkdp.LinearisedFlow(apply, PARAMS, X, Y, LOSS, RULE, **TESTS)

    @cached_property
    def tested(self) -> Any:
        test_kernel = ntkdp.layerwise_ntk(apply, PARAMS, X_TEST, X)
        tests: dict[str, Any] = {"test_kernel": test_kernel, "test_targets": Y_TEST}
        return ntkdp.KernelFlow(self.kernel, Y, LOSS, LAYERWISE, reduction="sum", **tests)

    @cached_property
    def starts(self) -> Any:
        return self.start, apply(PARAMS, X_TEST)

    @cached_property
    def two_times(self) -> Any:
        return stochastic_flow.TwoTimeFlow(MLP, X, Y, LOSS, RULE)

    @cached_property
    def high_dimensional(self) -> Any:
        ones = jnp.ones(4)
        numbers = {"n_samples": 40, "noise_multiplier": 0.1, "label_noise": 0.3}
        return hsgd.HighDimensionalSGD(ones, ones / 4, 1.0, 0.5, **numbers)


MADE = Made()
TIMES = [0.0, 0.5, 1.0]
PUBLIC = ntkdp.PublicRows(X_TEST, Y_TEST, weight=0.3)
ORDER = ntkdp.ZerothOrder(2, reach=0.1)
UPHILL = ntkdp.SharpnessAware(0.1, n_params=17)
PHASES = [
    ntkdp.Phase(2, LAYERWISE, 0.1, noise_multiplier=0.5, trainable=["head"]),
    ntkdp.Phase(2, LAYERWISE, 0.1, noise_multiplier=0.5),
]


def run(**options: Any) -> Any:
    options = {"loss": LOSS, "clipping": RULE, "key": KEY, "outputs": True} | options
    return dp_sgd.run(apply, PARAMS, X, Y, **(NOISY | TESTS | options))


def step(**options: Any) -> Any:
    algorithm = dp_sgd.build(apply, X, Y, LOSS, RULE, learning_rate=0.1, **options)
    return algorithm.compile()(KEY, algorithm.init(PARAMS))


def of_loss(name: str) -> Any:
    loss, targets, k = LOSSES[name]
    params = {"body": normal(D, 4), "head": {"w": normal(4, k), "b": normal(k)}}
    kernel = ntkdp.empirical_ntk(apply, params, X)
    flow = ntkdp.KernelFlow(kernel, targets, loss, RULE)
    observed = dp_sgd.run(apply, params, X, targets, loss, RULE, key=KEY, **NOISY)
    return observed, ntkdp.recursion(flow, apply(params, X), learning_rate=0.1, steps=2)


def of_rule(name: str) -> Any:
    custom = name == "custom"
    rule = ntkdp.clipping.Custom(lambda s: 1 / (1 + s), 1.0) if custom else RULES[name]
    flow = ntkdp.KernelFlow(MADE.total, Y, LOSS, rule)
    observed = run(clipping=rule, noise_multiplier=0.0)
    return observed, ntkdp.recursion(flow, MADE.start, learning_rate=0.1, steps=2)


def compared() -> Any:
    observed = run(key=MADE.keys)
    predicted = stochastic_flow.ensemble(MADE.flow, MADE.start, key=MADE.keys, **NOISY)
    comparison = ntkdp.compare(predicted, observed)
    measures = (comparison.crps, comparison.skill(), comparison.band_coverage)
    return measures, comparison.observed_band, comparison.standardised_error


def _solve(flow: Any, initial: Any) -> Any:
    return ntkdp.solve(flow, initial, TIMES, outputs=True)


MOMENTUM = optimizers.SGD(0.9, nesterov=True, weight_decay=0.1, average=0.5)
ADAM = optimizers.Adam(weight_decay=0.1, correct_noise=True, average=0.5)
CALLS: dict[str, Callable[[], Any]] = {
    "dp_sgd.run": run,
    "dp_sgd.run, seeds": lambda: run(key=MADE.keys),
    "dp_sgd.run, Poisson": lambda: run(sample_rate=0.5),
    "dp_sgd.run, vmap": lambda: run(gradients="vmap", sample_rate=0.5),
    "dp_sgd.run, layerwise": lambda: run(clipping=LAYERWISE, noise_per_group=True),
    "dp_sgd.run, Adam": lambda: run(optimizer=ADAM, microbatch_size=4),
    "dp_sgd.run, schedule": lambda: run(learning_rate=optax.linear_schedule(0.1, 0.01, 3)),
    "dp_sgd.run_phases": lambda: dp_sgd.run_phases(apply, PARAMS, X, Y, LOSS, PHASES, key=KEY),
    "dp_sgd.build": step,
    "dp_sgd.build, Poisson": lambda: step(sample_rate=0.5),
    "recursion": lambda: ntkdp.recursion(
        MADE.flow,
        MADE.start,
        learning_rate=0.1,
        steps=2,
        optimizer=MOMENTUM,
        outputs_at_zero=MADE.start,
    ),
    "recursion, layerwise": lambda: ntkdp.recursion(
        MADE.tested, MADE.starts, learning_rate=0.1, steps=2, outputs=True
    ),
    "recursion_phases": lambda: ntkdp.gradient_flow.recursion_phases(
        MADE.kernel, Y, LOSS, PHASES, MADE.start
    ),
    "solve_phases": lambda: ntkdp.gradient_flow.solve_phases(
        MADE.kernel, Y, LOSS, PHASES, MADE.start
    ),
    "KernelFlow": lambda: _solve(MADE.tested, MADE.starts),
    "WeightFlow": lambda: _solve(WEIGHT, PARAMS),
    "LinearisedFlow": lambda: _solve(MADE.linearised, PARAMS),
    "HeavyBallFlow": lambda: _solve(ntkdp.HeavyBallFlow(MADE.flow, friction=1.0), MADE.start),
    "ModifiedFlow": lambda: _solve(ntkdp.ModifiedFlow(MADE.flow, learning_rate=0.1), MADE.start),
    "ensemble": lambda: stochastic_flow.ensemble(MADE.flow, MADE.start, key=MADE.keys, **NOISY),
    "ensemble, Poisson": lambda: stochastic_flow.ensemble(
        MADE.flow, MADE.start, key=MADE.keys, sample_rate=0.5, **NOISY
    ),
    "ensemble, weights": lambda: stochastic_flow.ensemble(
        MADE.linearised, PARAMS, key=MADE.keys, optimizer=ADAM, **NOISY
    ),
    "dp_sgd.run, public rows": lambda: run(public=PUBLIC),
    "dp_sgd.run, zeroth order": lambda: run(zeroth_order=ORDER, sample_rate=0.5),
    "ensemble, public rows": lambda: stochastic_flow.ensemble(
        ntkdp.LinearisedFlow(apply, PARAMS, X, Y, LOSS, RULE, public=PUBLIC),
        PARAMS,
        key=MADE.keys,
        **NOISY,
    ),
    "ensemble, zeroth order": lambda: stochastic_flow.ensemble(
        MADE.flow, MADE.start, key=MADE.keys, zeroth_order=ORDER, **NOISY
    ),
    "dp_sgd.run, sharpness-aware": lambda: run(sharpness_aware=UPHILL),
    "ensemble, sharpness-aware": lambda: stochastic_flow.ensemble(
        MADE.flow, MADE.start, key=MADE.keys, sharpness_aware=UPHILL, **NOISY
    ),
    "ensemble_phases": lambda: stochastic_flow.ensemble_phases(
        MADE.kernel, Y, LOSS, PHASES, MADE.start, key=MADE.keys
    ),
    "moments": lambda: stochastic_flow.moments(MADE.flow, MADE.start, outputs=True, **NOISY),
    "moments, Poisson": lambda: stochastic_flow.moments(
        MADE.flow, MADE.start, sample_rate=0.5, **NOISY
    ),
    "moments, low rank": lambda: stochastic_flow.moments(
        MADE.flow, MADE.start, rank=2, optimizer=MOMENTUM, outputs_at_zero=MADE.start, **NOISY
    ),
    "moment_flow": lambda: stochastic_flow.moment_flow(
        MADE.flow, MADE.start, TIMES, learning_rate=0.1, noise_multiplier=0.5
    ),
    "fixed_privacy_flow": lambda: stochastic_flow.fixed_privacy_flow(
        MADE.flow, MADE.start, TIMES, mu=2.0
    ),
    "final_outputs": lambda: stochastic_flow.final_outputs(
        MADE.flow,
        MADE.start,
        learning_rates=[0.1, 0.2],
        clip_norms=[1.0, 2.0],
        steps=3,
        noise_multipliers=0.5,
        key=KEY,
    ),
    "two_time_kernel": lambda: ntkdp.two_time_kernel(MLP, X, variance1=0.5, variance2=0.0),
    "two_time_ensemble": lambda: stochastic_flow.two_time_ensemble(
        MADE.two_times, key=MADE.keys, **NOISY
    ),
    "two_time_flow": lambda: stochastic_flow.two_time_flow(
        MADE.two_times, None, TIMES, variance=0.1, steps=4, key=MADE.keys
    ),
    "weight_noise_variance": lambda: stochastic_flow.weight_noise_variance(
        RULE, N, optimizer=MOMENTUM, **NOISY
    ),
    "empirical_ntk": lambda: ntkdp.empirical_ntk(apply, PARAMS, X, batch_size=4),
    "layerwise_ntk": lambda: ntkdp.layerwise_ntk(apply, PARAMS, X, X_TEST),
    "infinite_ntk": lambda: ntkdp.infinite_ntk(MLP, X, X_TEST),
    "layerwise_infinite_ntk": lambda: ntkdp.layerwise_infinite_ntk(MLP, X),
    "preconditioned_ntk": lambda: ntk.preconditioned_ntk(
        apply, PARAMS, jax.tree.map(lambda w: w**2 + 1, PARAMS), X
    ),
    "per_sample_gradient_norms": lambda: ntkdp.per_sample_gradient_norms(
        apply, PARAMS, X, jnp.ones_like(Y), groups=None
    ),
    "models": lambda: MLP.apply(MLP.init(KEY, X), X),
    "clipped_operator": lambda: spectrum.clipped_operator(MADE.total, jnp.full(N, 0.5, DTYPE)),
    "eigenvalues": lambda: spectrum.eigenvalues(MADE.total, jnp.full(N, 0.5, DTYPE)),
    "symmetric_eigenvalues": lambda: spectrum.symmetric_eigenvalues(
        MADE.kernel, jnp.full((2, N), 0.5, DTYPE)
    ),
    "condition_number": lambda: spectrum.condition_number(MADE.total),
    "has_positive_quadratic_form": lambda: spectrum.has_positive_quadratic_form(MADE.total),
    "has_positive_eigenvalues": lambda: spectrum.has_positive_eigenvalues(
        MADE.total, jnp.full(N, 0.5, DTYPE)
    ),
    "safe_clip_norm": lambda: certificates.safe_clip_norm(MADE.total, MADE.start - Y),
    "safe_clip_norm_bound": lambda: certificates.safe_clip_norm_bound(
        MADE.kernel, MADE.start - Y, scope="layerwise"
    ),
    "certify": lambda: certificates.certify(
        MADE.total,
        ntkdp.recursion(MADE.flow, MADE.start, learning_rate=0.1, steps=2, outputs=True),
        Y,
        LOSS,
        RULE,
    ),
    "reliability_bins": lambda: calibration.reliability_bins(PROBS, CLASSES),
    "reliability_bins, mass": lambda: calibration.reliability_bins(
        PROBS, CLASSES, n_bins=6, binning="mass"
    ),
    "expected_calibration_error": lambda: [
        calibration.expected_calibration_error(PROBS, CLASSES, norm=norm)
        for norm in ("l1", "l2", "max")
    ],
    "classwise_calibration_error": lambda: calibration.classwise_calibration_error(PROBS, CLASSES),
    "scores": lambda: [
        calibration.brier_score(PROBS, CLASSES),
        calibration.negative_log_likelihood(PROBS, CLASSES),
    ],
    "bootstrap": lambda: calibration.bootstrap(
        calibration.brier_score, PROBS, CLASSES, 10, key=KEY
    ),
    "fit_temperature": lambda: calibration.fit_temperature(LOGITS, np.arange(8) % 3),
    "fit_platt": lambda: calibration.fit_platt(LOGITS[:, 0], np.arange(8) // 2 % 2),
    "fit_temperature_privately": lambda: calibration.fit_temperature_privately(
        LOGITS, np.arange(8) % 3, **PRIVATELY
    ),
    "fit_platt_privately": lambda: calibration.fit_platt_privately(
        LOGITS[:, 0], np.arange(8) // 2 % 2, **PRIVATELY
    ),
    "compare": compared,
    "advisor.gradient_norms": lambda: ntkdp.advisor.gradient_norms(
        apply, PARAMS, X, Y, LOSS, quantiles=[0, 0.5]
    ),
    "advisor.largest_stable_learning_rate": lambda: ntkdp.advisor.largest_stable_learning_rate(
        MADE.flow, MADE.start, steps=10
    ),
    "advisor.predict": lambda: ntkdp.advisor.predict(
        MADE.flow, MADE.start, learning_rates=[0.1, 0.2], clip_norms=[1.0], steps=3
    ),
    "high_dimensional_sgd.solve": lambda: hsgd.solve(MADE.high_dimensional, TIMES),
    "high_dimensional_sgd.risk_by_clip_norm": lambda: hsgd.risk_by_clip_norm(
        MADE.high_dimensional, [0.5, 1.0]
    ),
    "high_dimensional_sgd.simulate": lambda: hsgd.simulate(
        MADE.high_dimensional, steps=4, key=MADE.keys
    ),
    "times_of_steps": lambda: ntkdp.trajectory.times_of_steps(0.3, np.arange(4)),
}
CALLS |= {f"loss: {name}": partial(of_loss, name) for name in LOSSES}
CALLS |= {f"rule: {name}": partial(of_rule, name) for name in (*RULES, "custom")}


#: What takes a second or more to compile, and is much like something quicker.
SLOW = {
    "loss: cross-entropy",
    "dp_sgd.run",
    "dp_sgd.run, Poisson",
    "moments",
    "high_dimensional_sgd.solve",
    "dp_sgd.run, vmap",
    "dp_sgd.run, Adam",
    "dp_sgd.build, Poisson",
    "recursion, layerwise",
    "dp_sgd.run, seeds",
    "dp_sgd.run, schedule",
    "dp_sgd.run_phases",
    "recursion_phases",
    "solve_phases",
    "WeightFlow",
    "LinearisedFlow",
    "HeavyBallFlow",
    "ModifiedFlow",
    "ensemble, Poisson",
    "ensemble, weights",
    "ensemble_phases",
    "dp_sgd.run, public rows",
    "dp_sgd.run, zeroth order",
    "ensemble, public rows",
    "dp_sgd.run, sharpness-aware",
    "moments, Poisson",
    "moments, low rank",
    "moment_flow",
    "fixed_privacy_flow",
    "two_time_ensemble",
    "two_time_flow",
    "compare",
    "high_dimensional_sgd.risk_by_clip_norm",
    *[f"loss: {name}" for name in LOSSES if name != "cross-entropy"],
    *[f"rule: {name}" for name in (*RULES, "custom") if name != "global"],
}


@pytest.fixture
def switches() -> Iterator[ExitStack]:
    """Where switches are turned, and turned back in the end."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CALLS]
)
def test_all_switches_at_once_change_nothing(name: str, switches: ExitStack) -> None:
    expected = CALLS[name]()
    switches.enter_context(jax.debug_nans(True))
    switches.enter_context(jax.numpy_dtype_promotion("strict"))
    switches.enter_context(jax.numpy_rank_promotion("raise"))
    found = CALLS[name]()
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("gradients", ["structured", "vmap"])
def test_places_left_empty_are_nan_where_nan_is_an_error(
    gradients: Gradients, switches: ExitStack
) -> None:
    switches.enter_context(jax.debug_nans(True))
    _, info = step(sample_rate=0.5, gradients=gradients)
    there = np.arange(len(info.norms)) < int(info.batch_size)
    assert not np.all(there)
    np.testing.assert_array_equal(np.isnan(info.norms), ~there)


def test_nan_of_a_model_is_found_where_nan_is_an_error(switches: ExitStack) -> None:
    switches.enter_context(jax.debug_nans(True))
    algorithm = dp_sgd.build(
        lambda w, x: jnp.log(x @ w),
        X,
        Y,
        LOSS,
        ntkdp.clipping.NoClipping(),
        learning_rate=0.1,
        sample_rate=0.5,
    )
    with pytest.raises(FloatingPointError, match="nan"):
        algorithm.compile()(KEY, algorithm.init(-jnp.ones((D, 1), DTYPE)))
