"""Optimizers do as plain loops and optax say, in runs, and in the outputs as in the weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, SQUARED, known, linear, normal

import ntkdp
from ntkdp import (
    clipping,
    dp_sgd,
    gradient_flow,
    losses,
    optimizers,
    stochastic_flow,
    trajectory,
)
from ntkdp._results import setup as setups
from ntkdp.optimizers import SGD, Adam

X, Y, W = normal(0, 6, 4), normal(1, 6, 2), normal(2, 4, 2)
TEST_X, TEST_Y = normal(3, 3, 4), normal(4, 3, 2)
R = 0.8
RULE = clipping.Abadi(R)
STEPS = 9
#: Between float32, in which optax counts the steps of a schedule, and float64.
SCHEDULE = optax.piecewise_constant_schedule(0.5, {4: 0.5})
WHOLE = SGD(momentum=0.6, nesterov=True, weight_decay=0.2, average=0.5)
DECOUPLED = SGD(momentum=0.5, weight_decay=0.1, decoupled=True)
PARTS = [
    pytest.param(SGD(momentum=0.9), marks=pytest.mark.slow),
    pytest.param(SGD(weight_decay=0.2), marks=pytest.mark.slow),
    pytest.param(SGD(average=0.7), marks=pytest.mark.slow),
]


def observed(
    optimizer: Any, key: Any = KEY, apply: Any = linear, w: Any = W, **options: Any
) -> Any:
    given: dict[str, Any] = {
        "learning_rate": 0.4, "steps": STEPS, "outputs": True, "test_x": TEST_X,
        "test_targets": TEST_Y,
    }  # fmt: skip
    return dp_sgd.run(
        apply, w, X, Y, SQUARED, RULE, optimizer=optimizer, key=key, **(given | options)
    )


def by_hand(
    momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
    decoupled: bool = False, average: float | None = None, rates: Any = (0.4,) * STEPS,
    start: Any = W, mean: Any = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:  # fmt: skip
    """Weights and their average by the equations of the docstrings, clipped one by one."""
    x, y, w = (np.asarray(part) for part in (X, Y, start))
    mean = w if mean is None else mean
    m, path, means = np.zeros_like(w), [w], [mean]
    for rate in rates:
        g = np.zeros_like(w)
        for x_i, y_i in zip(x, y, strict=True):
            own = np.outer(x_i, x_i @ w - y_i)
            g += own * min(1.0, R / np.linalg.norm(own)) / len(x)
        if not decoupled:
            g = g + weight_decay * w
        m = momentum * m + g
        u = g + momentum * m if nesterov else m
        if decoupled:
            u = u + weight_decay * w
        w = w - rate * u
        mean = w if average is None else average * mean + (1 - average) * w
        path.append(w)
        means.append(mean)
    return path, means


def clipped_share(w: np.ndarray) -> float:
    a = np.asarray(X) @ w - np.asarray(Y)
    return float(np.mean(np.linalg.norm(X, axis=1) * np.linalg.norm(a, axis=1) > R))


@pytest.mark.parametrize("sgd", [WHOLE, pytest.param(DECOUPLED, id="decoupled"), *PARTS])
def test_runs_follow_the_equations(sgd: SGD) -> None:
    options = {
        field: getattr(sgd, field)
        for field in ("momentum", "nesterov", "weight_decay", "decoupled", "average")
    }
    run = observed(sgd, learning_rate=SCHEDULE)
    path, means = by_hand(**options, rates=[float(SCHEDULE(k)) for k in range(STEPS)])
    expected = [np.asarray(X) @ mean for mean in means]
    np.testing.assert_allclose(run.outputs, expected, atol=1e-12)
    np.testing.assert_allclose(run.test_outputs, [TEST_X @ mean for mean in means], atol=1e-12)
    # Losses are of the average, clipping is of the weights themselves.
    losses_of_mean = [np.mean(np.sum((f - Y) ** 2, axis=1)) / 2 for f in expected]
    np.testing.assert_allclose(run.loss, losses_of_mean, atol=1e-12)
    np.testing.assert_allclose(run.clip_fraction, [clipped_share(w) for w in path])


def test_plain_sgd_is_the_default_to_the_last_bit() -> None:
    options: dict[str, Any] = {"noise_multiplier": 0.5, "sample_rate": 0.5}
    default = observed(None, **options)
    for same in (optax.sgd, SGD(weight_decay=0)):
        np.testing.assert_array_equal(observed(same, **options).outputs, default.outputs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(momentum=0.9, nesterov=True), partial(optax.sgd, momentum=0.9, nesterov=True)),
        pytest.param(Adam(), optax.adam, marks=pytest.mark.slow),
        (Adam(b1=0.8, b2=0.95, eps=1e-4), partial(optax.adam, b1=0.8, b2=0.95, eps=1e-4)),
        (Adam(weight_decay=1e-4), optax.adamw),
    ],
)
def test_optax_makes_the_same_runs(ours: Any, theirs: Any) -> None:
    options: dict[str, Any] = {"noise_multiplier": 0.5, "learning_rate": SCHEDULE}
    run, same = observed(ours, **options), observed(theirs, **options)
    np.testing.assert_allclose(run.outputs, same.outputs, rtol=1e-12)
    assert ntkdp.compare(run, same).differences == {}
    known = optimizers.recognised(theirs)
    assert type(known) is type(ours)
    np.testing.assert_allclose(jax.tree.leaves(known), jax.tree.leaves(ours))


def network(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w["in"]) @ w["out"]


PARAMS = {"in": normal(5, 4, 5), "out": normal(6, 5, 2)}


def linearised(w: Any, x: Any) -> Any:
    """The network linearised at PARAMS, as a model of its own."""
    moved = jax.tree.map(jnp.subtract, w, PARAMS)
    f, change = jax.jvp(lambda p: network(p, x), (PARAMS,), (moved,))
    return f + change


FLOW = ntkdp.LinearisedFlow(
    network, PARAMS, X, Y, SQUARED, RULE, test_x=TEST_X, test_targets=TEST_Y
)


def kernel_flow() -> tuple[ntkdp.KernelFlow, Any, Any]:
    """The flow of the outputs, outputs at the start, and those at zero weights."""
    kernel = ntkdp.empirical_ntk(network, PARAMS, X)
    test_kernel = ntkdp.empirical_ntk(network, PARAMS, TEST_X, X)
    flow = ntkdp.KernelFlow(kernel, Y, SQUARED, RULE, test_kernel=test_kernel, test_targets=TEST_Y)
    start, at_zero = [], []
    for x in (X, TEST_X):
        f, Jw = jax.jvp(lambda w, x=x: network(w, x), (PARAMS,), (PARAMS,))
        start.append(f)
        at_zero.append(f - Jw)
    return flow, tuple(start), tuple(at_zero)


def assert_same(one: Any, other: Any) -> None:
    for name in ("outputs", "test_outputs", "loss", "test_loss", "clip_fraction"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=0, atol=1e-10, err_msg=name
        )


@pytest.mark.parametrize(
    "sgd", [WHOLE, pytest.param(DECOUPLED, id="decoupled", marks=pytest.mark.slow), *PARTS]
)
def test_predictions_are_runs_of_the_linearised_model(sgd: SGD) -> None:
    given: dict[str, Any] = {"learning_rate": SCHEDULE, "steps": STEPS, "outputs": True}
    flow, start, at_zero = kernel_flow()
    run = observed(sgd, apply=linearised, w=PARAMS, learning_rate=SCHEDULE)
    in_weights = ntkdp.recursion(FLOW, PARAMS, optimizer=sgd, **given)
    in_outputs = ntkdp.recursion(flow, start, optimizer=sgd, outputs_at_zero=at_zero, **given)
    drawn = stochastic_flow.ensemble(
        flow, start, optimizer=sgd, outputs_at_zero=at_zero, key=KEY, **given
    )
    for predicted in (in_weights, in_outputs, drawn):
        assert_same(predicted, run)
        assert ntkdp.compare(predicted, run).differences == {}
    noise: dict[str, Any] = {"noise_multiplier": 0.7, "sample_rate": 0.6}
    noisy = observed(sgd, apply=linearised, w=PARAMS, learning_rate=SCHEDULE, **noise)
    ensemble = stochastic_flow.ensemble(FLOW, PARAMS, optimizer=sgd, key=KEY, **given, **noise)
    assert np.max(np.abs(noisy.outputs - run.outputs)) > 0.1
    assert_same(ensemble, noisy)


@pytest.mark.parametrize(
    "adam",
    [
        pytest.param(Adam(), marks=pytest.mark.slow),
        Adam(correct_noise=True, floor=1e-3, weight_decay=0.1, average=0.5),
    ],
)
def test_a_linearised_model_takes_any_optimizer(adam: Any) -> None:
    given: dict[str, Any] = {
        "learning_rate": 0.05, "steps": STEPS, "outputs": True, "noise_multiplier": 0.7,
    }  # fmt: skip
    run = observed(adam, apply=linearised, w=PARAMS, **given)
    drawn = stochastic_flow.ensemble(FLOW, PARAMS, optimizer=adam, key=KEY, **given)
    assert_same(drawn, run)
    assert ntkdp.compare(drawn, run).differences == {}


def test_noise_of_outputs_passes_through_the_optimizer() -> None:
    """Where J is the identity, noise of outputs is noise of weights: the laws are compared."""
    n, sigma, keys = 3, 0.5, jax.random.split(KEY, 4000)
    flow = ntkdp.KernelFlow(jnp.eye(n), jnp.zeros((n, 1)), SQUARED, clipping.Abadi(50.0))
    sgd = SGD(momentum=0.8, nesterov=True, weight_decay=0.05, average=0.5)
    given: dict[str, Any] = {
        "learning_rate": 0.1, "steps": 6, "noise_multiplier": sigma, "record_every": 6,
        "outputs": True, "optimizer": sgd,
    }  # fmt: skip
    start = jnp.ones((n, 1))
    drawn = stochastic_flow.ensemble(flow, start, outputs_at_zero=0 * start, key=keys, **given)
    # The same linear recursion for one weight, by its response to the noise of each step.
    response = np.zeros(6)
    for j in range(6):
        w = m = mean = 0.0
        for k in range(6):
            g = w / n + 0.05 * w + (k == j)
            m = 0.8 * m + g
            w = w - 0.1 * (g + 0.8 * m)
            mean = 0.5 * mean + 0.5 * w
        response[j] = mean
    std = np.sqrt(np.sum(response**2)) * sigma * 50.0 / n
    ends = np.asarray(known(drawn.outputs)[:, -1, :, 0])
    # Six standard errors of a standard deviation from 12,000 draws.
    np.testing.assert_allclose(np.std(ends), std, rtol=6 / np.sqrt(2 * ends.size))


def test_phases_start_the_momentum_anew_and_go_on_with_the_average() -> None:
    options: dict[str, Any] = {"momentum": 0.9, "average": 0.8, "weight_decay": 0.1}
    phases = [ntkdp.Phase(4, RULE, 0.4), ntkdp.Phase(5, RULE, 0.3)]
    data: dict[str, Any] = {
        "targets": Y, "loss": SQUARED, "phases": phases, "test_targets": TEST_Y, "outputs": True,
        "optimizer": SGD(**options), "key": jax.random.split(KEY, 2),
    }  # fmt: skip
    run = dp_sgd.run_phases(linear, W, X, test_x=TEST_X, **data)
    drawn = stochastic_flow.ensemble_phases(
        initial=(X @ W, TEST_X @ W), outputs_at_zero=(0 * Y, 0 * TEST_Y), kernel=X @ X.T,
        test_kernel=TEST_X @ X.T, **data,
    )  # fmt: skip
    path, means = by_hand(rates=[0.4] * 4, **options)
    _, more = by_hand(rates=[0.3] * 5, start=path[-1], mean=means[-1], **options)
    expected = [np.asarray(X) @ mean for mean in [*means, *more[1:]]]
    del data["key"]
    stepped = gradient_flow.recursion_phases(
        initial=(X @ W, TEST_X @ W), outputs_at_zero=(0 * Y, 0 * TEST_Y), kernel=X @ X.T,
        test_kernel=TEST_X @ X.T, **data,
    )  # fmt: skip
    for found in (run, drawn):
        assert found.outputs is not None
        for outputs in found.outputs:
            np.testing.assert_allclose(outputs, np.stack(expected), atol=1e-12)
    assert_same(drawn, run)
    assert_same(stepped, jax.tree.map(lambda leaf: leaf[0] if leaf.ndim > 1 else leaf, run))
    assert ntkdp.compare(stepped, run).differences == {}


def test_adam_without_noise_follows_the_paper() -> None:
    """DP-AdamBC, equation by equation, and told the variance of the noise by the run."""
    adam = Adam(0.8, 0.9, correct_noise=True, floor=1e-4, weight_decay=0.1)
    transformation, w = adam(0.1), np.array([1.0, -2.0, 0.5])
    state, variance = transformation.init(jnp.asarray(w)), 0.3
    m = v = np.zeros(3)
    for k in range(1, 6):
        g = np.asarray(normal(k, 3))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        square = np.maximum(v / (1 - 0.9**k) - variance, 1e-4)
        expected = -0.1 * (m / (1 - 0.8**k) / np.sqrt(square) + 0.1 * w)
        updates, state = transformation.update(
            jnp.asarray(g), state, jnp.asarray(w), noise_variance=variance
        )
        np.testing.assert_allclose(updates, expected, rtol=1e-12)
        w = w + expected


def told(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """Plain SGD that keeps the variance of the noise that it is told of as its state."""

    def update(gradient: Any, state: Any, params: Any, *, noise_variance: Any, **extra: Any) -> Any:
        del state, params, extra
        return jax.tree.map(lambda g: -learning_rate * g, gradient), noise_variance

    return optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(lambda leaf: jnp.zeros(()), params), update
    )


@pytest.mark.parametrize(
    ("rule", "options", "deviations"),
    [
        (RULE, {}, (R, R)),
        (RULE, {"reduction": "sum", "sample_rate": 0.5}, (6 * R, 6 * R)),
        (clipping.Abadi([1.0, 2.0], scope="layerwise"), {}, (5**0.5, 5**0.5)),
        (
            clipping.Abadi([1.0, 2.0], scope="layerwise"),
            {"noise_per_group": True},
            (2**0.5, 2**0.5 * 2),
        ),
    ],
)
def test_optimizers_are_told_the_variance_of_the_noise(
    rule: Any, options: dict[str, Any], deviations: tuple[float, float]
) -> None:
    algorithm = dp_sgd.build(
        network, X, Y, SQUARED, rule, learning_rate=0.1, noise_multiplier=3.0, optimizer=told,
        **options,
    )  # fmt: skip
    state, _ = algorithm.compile()(KEY, algorithm.init(PARAMS))
    divisor = 6 * options.get("sample_rate", 1.0)
    expected = [(3.0 * std / divisor) ** 2 for std in deviations]
    np.testing.assert_allclose(jax.tree.leaves(state.optimizer_state), expected, rtol=1e-12)


def test_averages_are_kept_in_single_precision_at_least() -> None:
    w = W.astype(jnp.bfloat16)
    sgd = SGD(momentum=0.5, average=0.999)
    algorithm = dp_sgd.build(
        linear, X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16), SQUARED, RULE, learning_rate=0.5,
        optimizer=sgd,
    )  # fmt: skip
    state = algorithm.init(w)
    after, _ = algorithm.compile()(KEY, state)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    average = np.asarray(after.average)
    assert average.dtype == jnp.float32
    assert algorithm.measured_params(after).dtype == jnp.bfloat16
    # In bfloat16 a thousandth of a step would be lost.
    step = np.asarray(after.params, np.float32) - np.asarray(w, np.float32)
    np.testing.assert_allclose(average - np.asarray(w, np.float32), step / 1000, atol=1e-5)


def test_numbers_may_be_traced_and_need_no_other_program() -> None:
    given: dict[str, Any] = {"learning_rate": 0.4, "steps": STEPS}
    flow = ntkdp.KernelFlow(X @ X.T, Y, SQUARED, RULE)

    def end(momentum: Any, decay: Any) -> Any:
        sgd = SGD(momentum, average=decay)
        return ntkdp.recursion(flow, X @ W, optimizer=sgd, **given).loss[-1]

    momenta, decays = jnp.array([0.0, 0.5]), jnp.array([0.0, 0.3])
    swept = jax.vmap(end)(momenta, decays)
    np.testing.assert_allclose(swept, [end(0.0, 0.0), end(0.5, 0.3)], rtol=1e-12)
    slope = jax.grad(end)(0.5, 0.3)
    np.testing.assert_allclose(slope, (end(0.501, 0.3) - end(0.499, 0.3)) / 0.002, rtol=1e-4)


def differing(predicted: Any, trained: Any) -> dict[str, str]:
    """What tells the training of a recursion and a run apart, without training."""
    stepping = trajectory.Stepping(0.4, STEPS, 1)
    flow = ntkdp.KernelFlow(X @ X.T, Y, SQUARED, RULE)
    recursion = gradient_flow.with_steps(flow.setup(), stepping, optimizer=predicted)
    run = dp_sgd.build(linear, X, Y, SQUARED, RULE, learning_rate=0.4, optimizer=trained)
    return setups.differences((recursion,), (run.setup(stepping),))


@pytest.mark.parametrize(
    ("predicted", "trained", "words"),
    [
        (SGD(), SGD(0.9), "sgd predicted, sgd(momentum=0.9) in the run"),
        (SGD(0.9), SGD(0.9, True), "sgd(momentum=0.9) predicted, sgd(momentum=0.9, nesterov=True)"),
        (SGD(weight_decay=0.1), SGD(weight_decay=0.2), "sgd(weight_decay=0.1) predicted, sgd(w"),
        (SGD(), SGD(average=0.99), "sgd predicted, sgd(average=0.99) in the run"),
        (SGD(), Adam(correct_noise=True), "sgd predicted, adam(correct_noise=True) in the run"),
        (Adam(), optax.adamw, "adam predicted, adam(weight_decay=0.0001) in the run"),
        (SGD(), optax.lion, "sgd predicted, optax.lion in the run"),
    ],
)
def test_another_optimizer_is_named(predicted: Any, trained: Any, words: str) -> None:
    found = differing(predicted, trained)
    assert found.keys() == {"optimizer"}
    assert found["optimizer"].startswith(words)
    assert differing(predicted, predicted) == {}


def test_numbers_that_are_not_known_are_no_difference() -> None:
    def compared(momentum: Any) -> Any:
        assert differing(SGD(momentum), SGD(0.9)) == {}
        assert differing(SGD(), SGD(momentum)) == {
            "optimizer": "sgd predicted, sgd(momentum=?) in the run"
        }
        return momentum

    jax.eval_shape(compared, 0.5)


def test_inertia_and_preconditioners_know_their_optimizers() -> None:
    ball = ntkdp.HeavyBallFlow(ntkdp.KernelFlow(X @ X.T, Y, SQUARED, RULE), friction=0.1 / 0.4**0.5)
    stepping = trajectory.Stepping(0.4, STEPS, 1)

    def against(flow: Any, trained: Any) -> dict[str, str]:
        run = dp_sgd.build(linear, X, Y, SQUARED, RULE, learning_rate=0.4, optimizer=trained)
        unit = 1.0 if flow.setup().friction is None else 0.4**-0.5
        scaled = setups.rescaled((run.setup(stepping),), unit)
        return setups.differences((flow.setup(),), scaled)

    assert against(ball, SGD(momentum=0.9)) == against(ball, SGD(0.9, nesterov=True)) == {}
    for other in (SGD(0.9, weight_decay=0.1), SGD(0.9, average=0.5), Adam()):
        assert against(ball, other)["optimizer"].startswith("heavy ball predicted, ")
    preconditioned = ntkdp.KernelFlow(X @ X.T, Y, SQUARED, RULE, preconditioned_kernel=X @ X.T)
    given: dict[str, Any] = {"learning_rate": 0.4, "steps": STEPS}
    assert against(preconditioned, Adam()) == {}
    assert ntkdp.recursion(preconditioned, X @ W, optimizer=SGD(0.9), **given).setup == (
        ntkdp.recursion(preconditioned, X @ W, **given).setup
    )
    with pytest.raises(ValueError, match="decoupled weight decay with a preconditioned_kernel"):
        ntkdp.recursion(preconditioned, X @ W, optimizer=SGD(weight_decay=0.1), **given)


def test_own_optimizers_are_told_apart_by_being_linear() -> None:
    class Signs(optimizers.Optimizer):
        average: None = None
        is_linear = False

        @property
        def decays_weights(self) -> bool:
            return False

        def __call__(self, learning_rate: Any) -> Any:
            return optax.sign_sgd(learning_rate)

    flow = ntkdp.KernelFlow(X @ X.T, Y, SQUARED, RULE)
    given: dict[str, Any] = {"learning_rate": 0.4, "steps": STEPS}
    for other, name in ((Signs(), "Signs"), (optax.adam, "Adam"), (optax.lion, "lion")):
        with pytest.raises(ValueError, match=f"must be linear .* got {name}; LinearisedFlow"):
            ntkdp.recursion(flow, X @ W, optimizer=other, **given)
        with pytest.raises(ValueError, match="response_ensemble takes Adam"):
            stochastic_flow.ensemble(flow, X @ W, optimizer=other, key=KEY, **given)


def test_weight_decay_needs_to_know_the_outputs_at_zero() -> None:
    flow, start, at_zero = kernel_flow()
    decay = SGD(weight_decay=0.1)
    given: dict[str, Any] = {"learning_rate": 0.4, "steps": STEPS, "optimizer": decay}
    with pytest.raises(ValueError, match=r"outputs_at_zero must be given .* jax\.jvp\("):
        ntkdp.recursion(flow, start, **given)
    with pytest.raises(ValueError, match=r"outputs_at_zero must be a \(train, test\) pair"):
        ntkdp.recursion(flow, start, outputs_at_zero=at_zero[0], **given)
    with pytest.raises(ValueError, match=r"outputs_at_zero\[1\] must have shape"):
        ntkdp.recursion(flow, start, outputs_at_zero=(at_zero[0], at_zero[0]), **given)
    with pytest.raises(ValueError, match="outputs_at_zero must be None with a LinearisedFlow"):
        ntkdp.recursion(FLOW, PARAMS, outputs_at_zero=at_zero, **given)
    kernel = ntkdp.layerwise_ntk(network, PARAMS, X)
    phases = [ntkdp.Phase(2, RULE, 0.4, trainable=[kernel.names[0]])]
    with pytest.raises(ValueError, match="without weight decay where phases freeze groups"):
        stochastic_flow.ensemble_phases(
            kernel, Y, losses.SquaredError(), phases, start[0], optimizer=decay, key=KEY,
            outputs_at_zero=at_zero[0],
        )  # fmt: skip
