"""The kernel-free flow against DP-SGD of a linearised model, SciPy, and the flows with a kernel.

With noise it is held to the very runs of DP-SGD, draw by draw, and in law to the kernel's ensemble.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import SOFTMAX, SQUARED, known

import ntkdp
from ntkdp import clipping, privacy, stochastic_flow
from ntkdp.clipping import Scope

N, M, K = 7, 3, 3
_random = np.random.default_rng(0)
LABELS, TEST_LABELS = _random.integers(0, K, N), _random.integers(0, K, M)
TARGETS = _random.normal(size=(N, K))


def plain(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Products, a tied table, a gain and a leaf that needs a Jacobian of its own."""
    h = jnp.tanh(x @ p["w"] * p["gain"])
    return (h @ p["w"].T) @ p["out"] + jnp.sin(p["b"] ** 2)


PLAIN_PARAMS = {
    "w": jnp.asarray(_random.normal(size=(4, 5)) / 2),
    "gain": jnp.asarray(_random.normal(size=5)),
    "out": jnp.asarray(_random.normal(size=(4, K)) / 2),
    "b": jnp.asarray(_random.normal(size=K)),
}


def _problem(name: str) -> tuple[Callable[..., Any], Any, jax.Array, jax.Array]:
    """Model, parameters, training and test inputs."""
    if name == "plain":
        x = jnp.asarray(_random.normal(size=(N + M, 4)))
        return plain, PLAIN_PARAMS, x[:N], x[N:]
    if name == "mlp":
        x = jnp.asarray(_random.normal(size=(N + M, 5)))
        model = ntkdp.models.mlp([6], K)
    else:
        x = jnp.asarray(_random.normal(size=(N + M, 5, 5, 2)))
        model = ntkdp.models.cnn([3], K, kernel_size=2, strides=2)
    return model.apply, model.init(jax.random.key(1), x[:1]), x[:N], x[N:]


PROBLEMS = {name: _problem(name) for name in ("mlp", "cnn", "plain")}


def linearised(apply_fn: Any, w0: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """The linearised model as a function of its own, for whoever trains functions."""

    def apply(w: Any, x: jax.Array) -> jax.Array:
        moved = jax.tree.map(jnp.subtract, w, w0)
        f, df = jax.jvp(lambda p: apply_fn(p, x), (w0,), (moved,))
        return f + df

    return apply


def _rule(rule: str, scope: Scope, params: Any) -> Any:
    """Thresholds that some samples exceed and some do not, at the problems of this file."""
    R: Any = 1.0
    if scope == "layerwise":
        n_groups = len([part for part in params if jax.tree.leaves(part)])
        R = np.linspace(0.3, 0.7, n_groups)
    if rule == "batch":
        R = 2.0 * R
    return {
        "none": lambda: clipping.NoClipping(scope=scope),
        "abadi": lambda: clipping.Abadi(R, scope=scope),
        "global": lambda: clipping.Global(R, Z=1.5 * R, scope=scope),
        "automatic": lambda: clipping.Automatic(R, scope=scope),
        "psac": lambda: clipping.PSAC(R, r=0.2, scope=scope),
        "batch": lambda: clipping.Batch(R, scope=scope),
        "custom": lambda: clipping.Custom(lambda s: 0.2 * jnp.exp(-s), R, scope=scope),
    }[rule]()


def _kernel_flow(name: str, rule: Any, **options: Any) -> tuple[ntkdp.KernelFlow, Any]:
    """The flow with the kernel, and the outputs it starts from."""
    apply_fn, params, x, test_x = PROBLEMS[name]
    flow = ntkdp.KernelFlow(
        ntkdp.layerwise_ntk(apply_fn, params, x),
        LABELS,
        SOFTMAX,
        rule,
        test_kernel=ntkdp.layerwise_ntk(apply_fn, params, test_x, x),
        test_targets=TEST_LABELS,
        **options,
    )
    return flow, (apply_fn(params, x), apply_fn(params, test_x))


def _flow(name: str, rule: Any, **options: Any) -> ntkdp.LinearisedFlow:
    apply_fn, params, x, test_x = PROBLEMS[name]
    return ntkdp.LinearisedFlow(
        apply_fn,
        params,
        x,
        LABELS,
        SOFTMAX,
        rule,
        test_x=test_x,
        test_targets=TEST_LABELS,
        **options,
    )


RECORDED = ("loss", "accuracy", "clip_fraction", "outputs")
TESTED = ("test_loss", "test_accuracy", "test_outputs")


def _assert_same(first: Any, second: Any, tolerance: float) -> None:
    for name in RECORDED + TESTED:
        a, b = getattr(first, name), getattr(second, name)
        scale = float(np.max(np.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


RULES = ("none", "abadi", "global", "automatic", "psac", "batch", "custom")
CHOICES = [(rule, scope) for rule in RULES for scope in ("flat", "layerwise")]
KINDS = [("mlp", *choice) for choice in CHOICES] + [
    ("cnn", "abadi", "layerwise"),
    ("cnn", "batch", "flat"),
    ("plain", "abadi", "flat"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule", "scope"), KINDS)
def test_recursion_is_training_of_the_linearised_model(name: str, rule: str, scope: Scope) -> None:
    """To 1e-9 against plain DP-SGD of the linearised function, and to the flow with the kernel."""
    apply_fn, params, x, test_x = PROBLEMS[name]
    chosen = _rule(rule, scope, params)
    reduction: Any = "sum" if rule == "psac" else "mean"
    eta, steps = (0.1 if reduction == "sum" else 0.7), 12
    path = ntkdp.recursion(
        _flow(name, chosen, reduction=reduction, batch_size=3),
        params,
        learning_rate=eta,
        steps=steps,
        outputs=True,
    )
    run = ntkdp.dp_sgd.run(
        linearised(apply_fn, params),
        params,
        x,
        LABELS,
        SOFTMAX,
        chosen,
        learning_rate=eta,
        steps=steps,
        reduction=reduction,
        test_x=test_x,
        test_targets=TEST_LABELS,
        outputs=True,
        gradients="vmap",
        key=jax.random.key(0),
    )
    _assert_same(path, run, 1e-9)
    np.testing.assert_allclose(path.times, run.times)
    kernel_flow, initial = _kernel_flow(name, chosen, reduction=reduction)
    with_kernel = ntkdp.recursion(
        kernel_flow, initial, learning_rate=eta, steps=steps, outputs=True
    )
    _assert_same(path, with_kernel, 1e-9)
    if rule == "abadi":  # else nothing would tell it from no rule, or from normalising
        assert 0 < float(jnp.min(path.clip_fraction)) < 1


#: Problem, rule, scope, noise multiplier, noise by group, sampling rate.
NOISY = [("plain", "automatic", "layerwise", 0.5, True, 0.6)]
NOISY_SLOW = [
    ("mlp", "abadi", "flat", privacy.Budget(mu=8.0), False, 1.0),
    ("plain", "abadi", "layerwise", 0.4, False, 0.6),
    ("cnn", "psac", "layerwise", 0.3, True, 1.0),
    ("cnn", "global", "flat", 0.3, False, 0.3),
    ("plain", "batch", "layerwise", 0.0, False, 0.6),
    ("mlp", "none", "flat", 0.0, False, 0.3),
]


@pytest.mark.parametrize(
    ("name", "rule", "scope", "sigma", "per_group", "sample_rate"),
    NOISY + [pytest.param(*one, marks=pytest.mark.slow) for one in NOISY_SLOW],
)
def test_a_noisy_run_is_that_of_the_linearised_model_with_the_same_key(
    name: str, rule: str, scope: Scope, sigma: Any, per_group: bool, sample_rate: float
) -> None:
    """To 1e-9, draw by draw, against plain DP-SGD: batches and the noise of every leaf."""
    apply_fn, params, x, test_x = PROBLEMS[name]
    chosen = _rule(rule, scope, params)
    reduction: Any = "sum" if per_group else "mean"
    options: dict[str, Any] = {
        "learning_rate": lambda k: (0.05 if per_group else 0.5) / (1 + 0.1 * k),
        "steps": 6,
        "noise_multiplier": sigma,
        "sample_rate": sample_rate,
        "noise_per_group": per_group,
        "record_every": 3,
        "outputs": True,
        "key": jax.random.split(jax.random.key(4), 2),
    }
    start = jax.tree.map(lambda leaf: leaf + 0.1, params)
    drawn = stochastic_flow.ensemble(
        _flow(name, chosen, reduction=reduction, batch_size=3), start, **options
    )
    run = ntkdp.dp_sgd.run(
        linearised(apply_fn, params),
        start,
        x,
        LABELS,
        SOFTMAX,
        chosen,
        reduction=reduction,
        test_x=test_x,
        test_targets=TEST_LABELS,
        gradients="vmap",
        **options,
    )
    _assert_same(drawn, run, 1e-9)
    np.testing.assert_array_equal(drawn.times, run.times)
    np.testing.assert_array_equal(drawn.steps, run.steps)
    assert abs(float(run.loss[0, -1] / run.loss[1, -1]) - 1) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "sample_rate"), [("flat", 1.0), ("layerwise", 0.5)])
def test_noisy_runs_have_the_law_of_the_ensemble_of_the_kernel(
    scope: Scope, sample_rate: float
) -> None:
    """Mean and deviation of the final losses, train and test, at four standard errors."""
    apply_fn, params, x, test_x = PROBLEMS["mlp"]
    rule, seeds = _rule("abadi", scope, params), 400
    options: dict[str, Any] = {"learning_rate": 0.5, "steps": 10, "noise_multiplier": 0.5}
    options |= {"sample_rate": sample_rate, "record_every": 10}
    without = stochastic_flow.ensemble(
        _flow("mlp", rule), params, key=jax.random.split(jax.random.key(1), seeds), **options
    )
    kernel_flow, initial = _kernel_flow("mlp", rule)
    everything = ntkdp.layerwise_ntk(apply_fn, params, jnp.concatenate([x, test_x]))
    with_kernel = stochastic_flow.ensemble(
        kernel_flow,
        initial,
        noise_kernel=everything,
        key=jax.random.split(jax.random.key(2), seeds),
        **options,
    )
    for field in ("loss", "test_loss"):
        one, other = (np.asarray(getattr(path, field))[:, -1] for path in (without, with_kernel))
        error = np.sqrt((one.var() + other.var()) / seeds)
        assert abs(one.mean() - other.mean()) < 4 * error, field
        # The standard error of the ratio of two deviations, by the fourth moment.
        kurtosis = np.mean((other - other.mean()) ** 4) / other.var() ** 2
        spread = np.sqrt((kurtosis - 1) / (2 * seeds))
        assert abs(one.std() / other.std() - 1) < 4 * spread, field
        # A third more noise would be seen.
        assert 4 * spread < 1 / 3, field


def test_a_noise_kernel_is_refused_where_there_is_no_kernel() -> None:
    with pytest.raises(ValueError, match="noise_kernel must be None with a LinearisedFlow"):
        stochastic_flow.ensemble(
            _flow("mlp", clipping.Abadi(1.0)), PROBLEMS["mlp"][1], learning_rate=0.1, steps=1,
            noise_multiplier=1.0, noise_kernel=jnp.eye(N), key=jax.random.key(0),
        )  # fmt: skip


@eqx.filter_jit
def _velocity_and_measurement(flow: Any, state: Any) -> Any:
    return flow.velocity(state), flow.measure(state, True)


AT_ONE_STATE = [("abadi", "flat"), ("psac", "layerwise"), ("batch", "layerwise")]


@pytest.mark.parametrize(
    ("rule", "scope"),
    AT_ONE_STATE
    + [pytest.param(*one, marks=pytest.mark.slow) for one in CHOICES if one not in AT_ONE_STATE],
)
def test_one_state_is_that_of_the_kernel_flow(rule: str, scope: Scope) -> None:
    """Away from the start: J times the velocity of the weights, and all that is measured."""
    apply_fn, params, x, test_x = PROBLEMS["mlp"]
    chosen = _rule(rule, scope, params)
    away = jax.tree.map(lambda leaf: leaf + 0.2 * jnp.cos(leaf), params)
    flow = _flow("mlp", chosen, batch_size=3)
    velocity, measured = _velocity_and_measurement(flow, flow.init(away))
    apply_lin, both = linearised(apply_fn, params), jnp.concatenate([x, test_x])
    outputs, pushed = jax.jvp(lambda w: apply_lin(w, both), (away,), (velocity,))
    with_kernel, _ = _kernel_flow("mlp", chosen)
    state = with_kernel.init((outputs[:N], outputs[N:]))
    of_train, of_test = with_kernel.velocity(state)
    scale = float(jnp.max(jnp.abs(pushed)))
    np.testing.assert_allclose(of_train, pushed[:N], rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(known(of_test), pushed[N:], rtol=0, atol=1e-10 * scale)
    _assert_same(measured, with_kernel.measure(state, True), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule", "scope"), [("mlp", "psac", "layerwise"), ("plain", "abadi", "flat")]
)
def test_solution_is_that_of_the_kernel_flow(name: str, rule: str, scope: Scope) -> None:
    """To 1e-9: solvers of weights and of outputs choose steps of their own, across kinks too."""
    chosen = _rule(rule, scope, PROBLEMS[name][1])
    kernel_flow, initial = _kernel_flow(name, chosen)
    options: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14, "outputs": True}
    times = np.linspace(0.0, 5.0, 4)
    with_kernel = ntkdp.solve(kernel_flow, initial, times, **options)
    path = ntkdp.solve(_flow(name, chosen), PROBLEMS[name][1], times, **options)
    assert path.successful
    assert float(path.loss[-1]) < 0.9 * float(path.loss[0])
    _assert_same(path, with_kernel, 1e-9)


def test_unclipped_squared_loss_is_a_matrix_exponential() -> None:
    """f(t) = y + exp(-H t / n) (f(0) - y), with H from plain Jacobians."""
    apply_fn, params, x, test_x = PROBLEMS["mlp"]
    flow = ntkdp.LinearisedFlow(
        apply_fn, params, x, TARGETS, SQUARED, clipping.NoClipping(), test_x=test_x, batch_size=2
    )
    times = np.array([0.0, 1.0, 10.0])
    path = ntkdp.solve(flow, params, times, rtol=1e-9, atol=1e-12, outputs=True)
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(apply_fn))(params, jnp.concatenate([x, test_x])))
    J = np.concatenate([np.asarray(leaf).reshape((N + M) * K, -1) for leaf in leaves], axis=1)
    train, test = J[: N * K], J[N * K :]
    H = train @ train.T
    error = np.ravel(apply_fn(params, x)) - TARGETS.ravel()
    f_test = np.ravel(apply_fn(params, test_x))
    for k, t in enumerate(times):
        left = scipy.linalg.expm(-H * t / N) @ error
        np.testing.assert_allclose(
            np.ravel(known(path.outputs)[k]), TARGETS.ravel() + left, atol=1e-7
        )
        gone = np.linalg.solve(H, left - error)
        np.testing.assert_allclose(
            np.ravel(known(path.test_outputs)[k]), f_test + test @ train.T @ gone, atol=1e-6
        )
    assert path.test_loss is None
    assert path.accuracy is None


@pytest.mark.slow
def test_a_linear_model_is_its_own_linearisation() -> None:
    """From any start, wherever it is linearised: the flow of the weights themselves."""

    def linear(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x) @ p["w"] + x[:, :1] * p["b"]

    x = jnp.asarray(_random.normal(size=(N, 4)))
    one, other = (
        {
            "w": jnp.asarray(_random.normal(size=(4, K))),
            "b": jnp.asarray(_random.normal(size=K)),
        }
        for _ in range(2)
    )
    rule = clipping.Automatic(0.5, scope="layerwise")
    problem = (x, LABELS, SOFTMAX, rule)
    times = np.linspace(0.0, 4.0, 3)
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11, "outputs": True}
    exact = ntkdp.solve(ntkdp.WeightFlow(linear, *problem), other, times, **options)
    flow = ntkdp.LinearisedFlow(linear, one, *problem, batch_size=4)
    path = ntkdp.solve(flow, other, times, **options)
    for name in RECORDED:
        np.testing.assert_allclose(getattr(path, name), getattr(exact, name), atol=1e-8)
    np.testing.assert_allclose(known(path.outputs)[0], linear(other, x), atol=1e-12)


@pytest.mark.parametrize(
    ("batch_size", "n", "rule"),
    [
        (3, N, "batch"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [
                (1, N, "abadi"),
                (1, 1, "batch"),
                (2, 6, "abadi"),
                (5, 6, "batch"),
                (N + 2, 4, "abadi"),
            ]
        ),
    ],
)
def test_batches_change_nothing(batch_size: int, n: int, rule: str) -> None:
    """Nor does what fills up the last."""
    apply_fn, params, x, test_x = PROBLEMS["mlp"]
    chosen = _rule(rule, "layerwise", params)
    problem = (apply_fn, params, x[:n], LABELS[:n], SOFTMAX, chosen)
    away = jax.tree.map(lambda leaf: leaf + 0.1, params)
    found = []
    for size in (batch_size, None):
        flow = ntkdp.LinearisedFlow(*problem, test_x=test_x, batch_size=size)
        found.append(_velocity_and_measurement(flow, flow.init(away)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def test_memory_does_not_grow_with_the_samples() -> None:
    """What the compiler plans besides arguments and results; with the size of a batch it does."""
    apply_fn, params, _, _ = PROBLEMS["mlp"]

    def planned(n: int, batch_size: int | None) -> int:
        x = np.random.default_rng(1).normal(size=(n, 5))
        flow = ntkdp.LinearisedFlow(
            apply_fn, params, x, np.zeros(n, int), SOFTMAX, clipping.Abadi(1.0),
            batch_size=batch_size,
        )  # fmt: skip
        velocity = jax.jit(lambda x, state: eqx.tree_at(lambda f: f.x, flow, x).velocity(state))
        program = velocity.lower(flow.x, flow.init(params)).compile()
        return int(known(program.memory_analysis()).temp_size_in_bytes)

    few, many = planned(64, 16), planned(4096, 16)
    one_kernel = 8 * (64 * K) ** 2
    assert many - few < 0.2 * one_kernel, (few, many)
    assert planned(64, 64) > 1.5 * few


def test_default_batches_fit_the_budget() -> None:
    """Factors of a dense layer take its input and its output's cotangent, 64 MiB in all."""

    def dense(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    flow = ntkdp.LinearisedFlow(
        dense, jnp.zeros((1000, 24)), np.zeros((2, 1000)), np.zeros((2, 24)), SQUARED,
        clipping.NoClipping(),
    )  # fmt: skip
    assert flow.batch_size == 2**26 // (8 * 1024)


@pytest.mark.slow
def test_float32_stays() -> None:
    """With 64-bit mode on, where a solver carries the state in float64, and without."""
    apply_fn, params, x, _ = PROBLEMS["mlp"]
    few, data = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    problem: tuple[Any, ...] = (LABELS, SOFTMAX, clipping.Abadi(1.0))
    steps: dict[str, Any] = {"learning_rate": 0.5, "steps": 5}
    double = ntkdp.LinearisedFlow(apply_fn, params, x, *problem)
    expected = ntkdp.recursion(double, params, **steps).loss

    def check() -> ntkdp.LinearisedFlow:
        flow = ntkdp.LinearisedFlow(apply_fn, few, data, *problem, batch_size=3)
        path = ntkdp.recursion(flow, few, outputs=True, **steps)
        assert (
            path.loss.dtype == known(path.outputs).dtype == path.clip_fraction.dtype == jnp.float32
        )
        np.testing.assert_allclose(path.loss, expected, rtol=1e-5)
        return flow

    flow = check()
    velocity = eqx.filter_jit(flow.velocity)(flow.init(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(velocity)} == {jnp.dtype(jnp.float32)}
    in_double = jax.tree.map(lambda d: d.astype(jnp.float64), flow.init(params))
    velocity = eqx.filter_eval_shape(flow.velocity, in_double)
    assert {leaf.dtype for leaf in jax.tree.leaves(velocity)} == {jnp.dtype(jnp.float64)}
    path = ntkdp.solve(flow, few, [0.0, 1.0], rtol=1e-4, atol=1e-6, outputs=True)
    assert path.successful
    assert path.loss.dtype == known(path.outputs).dtype == jnp.float32
    with jax.enable_x64(False):
        check()


def test_flows_of_flows_take_it() -> None:
    """The modified equation is linear in the step: half a step's worth of DG G."""
    flow = ntkdp.LinearisedFlow(
        lambda w, x: x @ w, jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1)), SQUARED,
        clipping.NoClipping(),
    )  # fmt: skip
    modified = ntkdp.ModifiedFlow(flow, learning_rate=0.1)
    velocity = modified.velocity(modified.init(jnp.full((1, 1), 2.0)))
    np.testing.assert_allclose(velocity, -2.0 * (1 + 0.05), rtol=1e-12)


W = jnp.ones((2, 1))
X = np.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": np.zeros((2, 1))}, ValueError, "targets must have one row a sample, 3"),
        ({"targets": np.zeros((3, 2))}, ValueError, r"targets .* \(3, 1\), got \(3, 2\)"),
        ({"test_targets": np.zeros((2, 1))}, ValueError, "test_targets need test_x"),
        ({"test_x": np.ones((4, 3))}, ValueError, r"fails for test_x of shape \(4, 3\)"),
        (
            {"test_x": np.ones((4, 2)), "test_targets": np.zeros((3, 1))},
            ValueError,
            "test_targets must have one row a sample, 4",
        ),
        ({"x": np.full((3, 2), np.nan)}, ValueError, "x must be finite, got 6"),
        ({"x": np.ones((0, 2))}, ValueError, "x must have shape"),
        ({"params": W.at[0].set(jnp.inf)}, ValueError, "params must be finite, got 1"),
        ({"params": jnp.ones((2, 1), int)}, TypeError, "must be a floating-point array"),
        ({"params": {}}, ValueError, "params must hold at least one array"),
        pytest.param(
            {"apply_fn": lambda w, x: x @ w - jnp.mean(x @ w)},
            ValueError,
            "couples the samples",
            marks=pytest.mark.slow,
        ),
        ({"loss": "squared"}, TypeError, "loss"),
        ({"clipping": 1.0}, TypeError, "clipping"),
        (
            {"clipping": clipping.Abadi([1.0, 1.0], scope="layerwise")},
            ValueError,
            "R has 2 entries for 1 parameter groups",
        ),
        (
            {"clipping": clipping.Abadi(1.0, scope="layerwise"), "groups": {"a": 1}},
            ValueError,
            "groups must be a pytree prefix",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "apply_fn": lambda w, x: x @ w,
        "params": W,
        "x": X,
        "targets": np.zeros((3, 1)),
        "loss": SQUARED,
        "clipping": clipping.Abadi(1.0),
    }
    with pytest.raises(error, match=message):
        ntkdp.LinearisedFlow(**arguments | options)


def test_bad_initial_states() -> None:
    flow = ntkdp.LinearisedFlow(
        lambda p, x: x @ p["w"], {"w": W}, X, np.zeros((3, 1)), SQUARED, clipping.Abadi(1.0)
    )
    for initial, message in (
        (None, "initial must have the structure of params, .* start from params itself"),
        (W, "initial must have the structure of params"),
        ({"w": np.ones((2, 2))}, r"initial\['w'\] must have shape \(2, 1\), got \(2, 2\)"),
        ({"w": W.at[0].set(jnp.nan)}, r"initial\['w'\] must be finite, got 1 NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            ntkdp.solve(flow, initial, [0.0, 1.0])
    weights = ntkdp.WeightFlow(lambda w, x: x @ w, X, np.zeros((3, 1)), SQUARED,
                               clipping.Abadi(1.0))  # fmt: skip
    with pytest.raises(TypeError, match="WeightFlow"):
        ntkdp.recursion(weights, W, learning_rate=0.1, steps=1)  # type: ignore[arg-type]
