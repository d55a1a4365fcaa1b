"""Training in phases: frozen and released groups, late switches, schedules, and their privacy."""

import itertools
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import KEY, SOFTMAX, SQUARED, often_or_slow

import ntkdp
from ntkdp import Phase, clipping, dp_sgd, gradient_flow, models, privacy, stochastic_flow
from ntkdp.trajectory._phase import check_phases

N, M, P, K = 7, 4, 9, 3
SPLIT = 4


def linear(w: dict[str, Any], x: jax.Array) -> jax.Array:
    return x[:, :SPLIT] @ w["body"] + x[:, SPLIT:] @ w["head"]


def numbers(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


X, TEST = numbers(1, N, P), numbers(2, M, P)
LABELS, TEST_LABELS = jnp.arange(N) % K, jnp.arange(M) % K
Y = numbers(3, N, K)
PARAMS = {"body": numbers(4, SPLIT, K), "head": numbers(5, P - SPLIT, K)}
ALL = jnp.concatenate([X, TEST])
KERNEL = ntkdp.layerwise_ntk(linear, PARAMS, X)
TEST_KERNEL = ntkdp.layerwise_ntk(linear, PARAMS, TEST, X)
NOISE_KERNEL = ntkdp.layerwise_ntk(linear, PARAMS, ALL)
INITIAL = (linear(PARAMS, X), linear(PARAMS, TEST))


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    """Equal arrays; a prediction and a run are not of one setup."""
    options: dict[str, Any] = {"rtol": 0} | tolerance
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **options)


# Phases and trajectories one after another.


@pytest.mark.parametrize(
    ("gradients", "seeds", "sample_rate"),
    often_or_slow(
        [("structured", None, 1.0), ("structured", 3, 0.6), ("vmap", 3, 1.0)],
        [("structured", 3, 0.6)],
    ),
)
def test_a_single_phase_is_a_run_to_the_last_bit(
    gradients: Any, seeds: int | None, sample_rate: float
) -> None:
    rule = clipping.Abadi(0.5, scope="layerwise")
    shared: dict[str, Any] = {
        "sample_rate": sample_rate, "optimizer": optax.adam, "test_x": TEST,
        "test_targets": TEST_LABELS, "record_every": 3, "outputs": True, "gradients": gradients,
        "key": KEY if seeds is None else jax.random.split(KEY, seeds),
    }  # fmt: skip
    problem = (linear, PARAMS, X, LABELS, SOFTMAX)
    steps: dict[str, Any] = {"learning_rate": 0.1, "steps": 7, "noise_multiplier": 0.3}
    run = partial(dp_sgd.run, *problem)(rule, **steps, **shared)
    phased = partial(dp_sgd.run_phases, *problem)([Phase(clipping=rule, **steps)], **shared)
    assert_same(phased, run)


@pytest.mark.slow
def test_phases_that_differ_in_nothing_are_one_run() -> None:
    """Every step has noise and a batch of its own, numbered through the whole."""
    rule = clipping.Abadi(0.5)
    shared: dict[str, Any] = {"sample_rate": 0.6, "outputs": True, "key": KEY}
    steps: dict[str, Any] = {"learning_rate": 0.1, "noise_multiplier": 0.3}
    problem = (linear, PARAMS, X, Y, SQUARED)
    run = partial(dp_sgd.run, *problem)(rule, steps=6, **shared, **steps)
    two = [Phase(3, rule, **steps)] * 2
    phased = partial(dp_sgd.run_phases, *problem)(two, **shared)
    assert_same(phased, run, rtol=1e-12, atol=1e-14)
    flow = ntkdp.KernelFlow(KERNEL, Y, SQUARED, rule)
    drawn = stochastic_flow.ensemble(flow, INITIAL[0], steps=6, **shared, **steps)
    phased = stochastic_flow.ensemble_phases(KERNEL, Y, SQUARED, two, INITIAL[0], **shared)
    assert_same(phased, drawn, rtol=1e-12, atol=1e-14)


def test_trajectories_join_where_they_meet() -> None:
    def path(start: float, seeds: int, **fields: Any) -> ntkdp.Trajectory:
        values = start + jnp.broadcast_to(jnp.arange(3.0), (seeds, 3))
        return ntkdp.Trajectory(
            10 + 2 * jnp.arange(3.0), values, values / 10, steps=5 + jnp.arange(3), **fields
        )

    whole = path(0.0, 2).then(path(2.0, 2))
    assert whole.times.tolist() == [10, 12, 14, 16, 18]
    assert whole.steps is not None
    assert whole.steps.tolist() == [5, 6, 7, 8, 9]
    np.testing.assert_array_equal(whole.loss, np.broadcast_to(np.arange(5.0), (2, 5)))
    assert whole.successful
    failed = path(0.0, 2, outcome=jnp.array([0, 3])).then(path(2.0, 2, outcome=jnp.array([1, 0])))
    assert np.asarray(failed.outcome).tolist() == [1, 3]
    outputs = path(0.0, 2, outputs=jnp.zeros((2, 3, 4, 1)))
    both = outputs.then(outputs).outputs
    assert both is not None
    assert both.shape == (2, 5, 4, 1)
    with pytest.raises(ValueError, match="other must record outputs"):
        outputs.then(path(2.0, 2))
    with pytest.raises(ValueError, match="other must record loss"):
        path(0.0, 2).then(path(2.0, 3))
    with pytest.raises(TypeError, match="Trajectory"):
        outputs.then(outputs.loss)  # type: ignore[arg-type]


# Frozen groups.


@pytest.mark.parametrize(
    ("frozen", "trained", "optimizer", "options"),
    [
        ("body", "head", None, {"gradients": "vmap"}),
        ("head", "body", partial(optax.adamw, weight_decay=0.1), {"microbatch_size": 2}),
    ],
)
def test_frozen_weights_do_not_move(
    frozen: str, trained: str, optimizer: Any, options: dict[str, Any]
) -> None:
    algorithm = dp_sgd.build(
        linear, X, LABELS, SOFTMAX, clipping.Abadi(0.5), learning_rate=0.1, noise_multiplier=1.0,
        sample_rate=0.5, optimizer=optimizer, trainable=[trained], **options,
    )  # fmt: skip
    state, step = algorithm.init(PARAMS), algorithm.compile()
    for k in range(3):
        state, _ = step(jax.random.key(k), state)
    np.testing.assert_array_equal(state.params[frozen], PARAMS[frozen])
    assert np.all(state.params[trained] != PARAMS[trained])


@pytest.mark.parametrize("scope", often_or_slow(["flat", "layerwise"], ["layerwise"]))
def test_a_frozen_group_is_a_constant_of_the_model(scope: Any) -> None:
    """Held to the training of a model that does not have it among its parameters."""
    rule = clipping.Automatic(0.7, scope=scope)
    steps: dict[str, Any] = {"learning_rate": 0.2, "steps": 5, "noise_multiplier": 0.4}
    shared: dict[str, Any] = {"sample_rate": 0.7, "outputs": True, "key": KEY}
    layers = {"a": PARAMS["body"], "b": {"W": PARAMS["head"], "c": numbers(8, K)}}

    def apply(layers: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x[:, :SPLIT] @ layers["a"])
        return hidden + x[:, SPLIT:] @ layers["b"]["W"] + hidden * layers["b"]["c"]

    alone = dp_sgd.run(
        lambda b, x: apply({"a": layers["a"], "b": b}, x),
        layers["b"], X, LABELS, SOFTMAX, rule, groups="b", **steps, **shared,
    )  # fmt: skip
    phase = Phase(clipping=rule, **steps, trainable=("b",))
    phased = dp_sgd.run_phases(
        apply, layers, X, LABELS, SOFTMAX, [phase],
        gradients="structured" if scope == "flat" else "vmap", **shared,
    )  # fmt: skip
    assert_same(phased, alone, rtol=1e-10, atol=1e-13)


def three_groups(w: dict[str, Any], x: jax.Array) -> jax.Array:
    return x @ (w["a"] + w["b"] + w["c"])


@pytest.mark.parametrize(
    ("rule", "per_group", "expected"),
    [
        (clipping.Abadi(0.7), False, {"a": 0.7, "c": 0.7}),
        (clipping.Abadi(0.7, scope="layerwise"), False, dict.fromkeys("ac", 0.7 * math.sqrt(2))),
        (clipping.Abadi(np.array([0.3, 0.4]), scope="layerwise"), False, dict.fromkeys("ac", 0.5)),
        (
            clipping.Abadi(np.array([0.3, 0.4]), scope="layerwise"),
            True,
            {"a": 0.3 * math.sqrt(2), "c": 0.4 * math.sqrt(2)},
        ),
    ],
)
def test_noise_is_in_proportion_to_the_sensitivity_of_what_is_trained(
    rule: Any, per_group: bool, expected: dict[str, float]
) -> None:
    """Gradients are zero: what moves the weights is noise. Variances by their chi-squared law."""
    params = dict.fromkeys("abc", jnp.zeros((200, K)))
    x = jnp.zeros((2, 200))
    sigma, rate = 1.5, 0.1
    algorithm = dp_sgd.build(
        three_groups, x, jnp.zeros((2, K)), SQUARED, rule, learning_rate=rate,
        noise_multiplier=sigma, noise_per_group=per_group, reduction="sum",
        trainable=("a", "c"),
    )  # fmt: skip
    state, _ = algorithm.step(jax.random.key(7), algorithm.init(params))
    assert not np.any(state.params["b"])
    for name, sensitivity in expected.items():
        moved = np.asarray(state.params[name]).ravel()
        chi_squared = np.sum((moved / (rate * sigma * sensitivity)) ** 2)
        share = scipy.stats.chi2.cdf(chi_squared, moved.size)
        assert 1e-3 < share < 1 - 1e-3


# Predictions.


RULES: dict[tuple[str, str], list[Any]] = {
    ("none", "flat"): [clipping.NoClipping()] * 2,
    ("none", "layerwise"): [clipping.NoClipping("layerwise")] * 2,
    ("abadi", "flat"): [clipping.Abadi(0.3), clipping.Abadi(2.0)],
    ("abadi", "layerwise"): [
        clipping.Abadi(0.3, scope="layerwise"),
        clipping.Abadi(np.array([0.4, 1.5]), scope="layerwise"),
    ],
    ("automatic", "flat"): [clipping.Automatic(0.5), clipping.Automatic(2.0)],
    ("automatic", "layerwise"): [
        clipping.Automatic(0.5, scope="layerwise"),
        clipping.Automatic(np.array([0.4, 1.5]), scope="layerwise"),
    ],
}


#: The rest are covered in part by these; `make test-slow` runs them.
OFTEN = [("automatic", "layerwise")]


@pytest.mark.parametrize(
    "rules", [pytest.param(r, marks=() if r in OFTEN else pytest.mark.slow) for r in RULES]
)
def test_prediction_is_the_run_of_a_linear_model(rules: Any) -> None:
    """Frozen, then released under a schedule, then a late switch of R."""
    first, second = RULES[rules]
    phases = [
        Phase(4, first, 0.3, trainable=("head",)),
        Phase(5, first, optax.linear_schedule(0.3, 0.1, 4)),
        Phase(4, second, 0.2),
    ]
    predicted = gradient_flow.recursion_phases(
        KERNEL, LABELS, SOFTMAX, phases, INITIAL, test_kernel=TEST_KERNEL,
        test_targets=TEST_LABELS, outputs=True,
    )  # fmt: skip
    observed = dp_sgd.run_phases(
        linear, PARAMS, X, LABELS, SOFTMAX, phases, test_x=TEST, test_targets=TEST_LABELS,
        outputs=True, key=KEY, gradients="vmap" if rules == ("none", "flat") else "structured",
    )  # fmt: skip
    assert_same(predicted, observed, rtol=1e-10, atol=1e-10)
    assert predicted.steps is not None
    assert predicted.steps.tolist() == list(range(14))


def test_a_probed_head_is_another_model_than_all_of_it() -> None:
    """Prediction and run would agree, too, if both ignored what is frozen."""
    rule = clipping.Abadi(0.3)
    paths = [
        gradient_flow.recursion_phases(KERNEL, Y, SQUARED, [Phase(4, rule, 0.3, 0.0, names)], f)
        for f, names in itertools.product([INITIAL[0]], [("head",), ("body",), None])
    ]
    finals = [float(path.loss[-1]) for path in paths]
    assert min(abs(a - b) for a, b in itertools.combinations(finals, 2)) > 0.01


@pytest.mark.slow
def test_the_flow_in_time_is_the_limit_of_small_steps() -> None:
    """Unclipped squared loss: the matrix exponentials of both kernels, one after another."""
    rule = clipping.NoClipping()
    phases = [Phase(10, rule, 0.3, trainable=("head",)), Phase(20, rule, 0.2)]
    path = gradient_flow.solve_phases(
        KERNEL, Y, SQUARED, phases, INITIAL[0], record_every=10, outputs=True, rtol=1e-9
    )
    np.testing.assert_allclose(path.times, [0, 3, 5, 7])
    error = np.asarray(INITIAL[0] - Y).ravel()
    head, total = (
        np.asarray(kernel).transpose(0, 2, 1, 3).reshape(N * K, N * K)
        for kernel in (KERNEL.select(["head"]).total, KERNEL.total)
    )
    expected = scipy.linalg.expm(-4 / N * total) @ scipy.linalg.expm(-3 / N * head) @ error
    assert path.outputs is not None
    np.testing.assert_allclose(path.outputs[-1].ravel() - Y.ravel(), expected, atol=1e-7)


NOISY: dict[str, dict[str, Any]] = {
    "flat": {
        "phases": [
            Phase(6, clipping.Abadi(0.5), 0.4, 0.6, ("head",)),
            Phase(6, clipping.Abadi(1.0), 0.3, 0.5),
        ],
    },
    "layerwise, sampled": {
        "phases": [
            Phase(6, clipping.Abadi(0.4, scope="layerwise"), 0.3, 0.5),
            Phase(6, clipping.Automatic(0.8, scope="layerwise"), 0.2, 0.5, ("body",)),
        ],
        "sample_rate": 0.6,
        "noise_per_group": True,
    },
    "late switch": {
        "phases": [
            Phase(6, clipping.Abadi(0.2), 0.8, privacy.Budget(mu=1.0)),
            Phase(6, clipping.Abadi(1.0), 0.2, 0.0),
        ],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", NOISY)
def test_noisy_predictions_have_the_mean_and_the_spread_of_runs(setting: str) -> None:
    """Two-sided, three standard errors of the difference, train and test loss."""
    seeds = 800
    shared: dict[str, Any] = {"record_every": 3} | NOISY[setting]
    phases = shared.pop("phases")
    predicted = stochastic_flow.ensemble_phases(
        KERNEL, LABELS, SOFTMAX, phases, INITIAL, test_kernel=TEST_KERNEL,
        test_targets=TEST_LABELS, noise_kernel=NOISE_KERNEL,
        key=jax.random.split(jax.random.key(11), seeds), **shared,
    )  # fmt: skip
    observed = dp_sgd.run_phases(
        linear, PARAMS, X, LABELS, SOFTMAX, phases, test_x=TEST, test_targets=TEST_LABELS,
        key=jax.random.split(jax.random.key(12), seeds), **shared,
    )  # fmt: skip
    np.testing.assert_allclose(predicted.times, observed.times)
    for name in ("loss", "test_loss"):
        a, b = (np.asarray(getattr(path, name))[:, 1:] for path in (predicted, observed))
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / seeds)
        assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 3 * error)
        fourth = [scipy.stats.kurtosis(path, axis=0) + 2 for path in (a, b)]
        error = a.std(axis=0) * np.sqrt((fourth[0] + fourth[1]) / (4 * seeds))
        assert np.all(np.abs(a.std(axis=0) - b.std(axis=0)) < 3 * error)


# A network.


@pytest.fixture(scope="module")
def network() -> dict[str, Any]:
    data = ntkdp.datasets.load("digits", n_train=24, n_test=10, standardise="unit")
    model = models.mlp([32, 32], 10)
    x = jnp.asarray(data.x_train)
    params = model.init(jax.random.key(1), x)
    return {"apply": model.apply, "params": params, "x": x, "y": data.y_train, "test": data.x_test}


@pytest.mark.slow
def test_linear_probing_is_linear(network: dict[str, Any]) -> None:
    """The head's kernel of a network predicts its probing to rounding, clipped and with tests."""
    apply, params, x = (network[name] for name in ("apply", "params", "x"))
    test = jnp.asarray(network["test"])
    kernel = ntkdp.layerwise_ntk(apply, params, x)
    test_kernel = ntkdp.layerwise_ntk(apply, params, test, x)
    head = kernel.names[-1]
    phases = [Phase(20, clipping.Abadi(0.5), 3.0, trainable=(head,))]
    predicted = gradient_flow.recursion_phases(
        kernel, network["y"], SOFTMAX, phases, (apply(params, x), apply(params, test)),
        test_kernel=test_kernel, outputs=True,
    )  # fmt: skip
    observed = dp_sgd.run_phases(
        apply, params, x, network["y"], SOFTMAX, phases, test_x=test, outputs=True, key=KEY
    )
    assert_same(predicted, observed, rtol=1e-8, atol=1e-8)
    assert predicted.clip_fraction[0] > 0
    assert predicted.loss[-1] < 0.8 * predicted.loss[0]


@pytest.mark.slow
def test_a_kernel_taken_anew_at_the_release_predicts_better(network: dict[str, Any]) -> None:
    apply, params, x = (network[name] for name in ("apply", "params", "x"))
    rule = clipping.Abadi(1.0)
    probing, tuning = Phase(30, rule, 20.0, trainable=("4",)), Phase(20, rule, 0.2)
    probe = dp_sgd.build(
        apply, x, network["y"], SOFTMAX, rule, learning_rate=20.0, trainable=("4",)
    )
    state, step = probe.init(params), probe.compile()
    for _ in range(probing.steps):
        state, _ = step(KEY, state)
    kernels = [ntkdp.layerwise_ntk(apply, where, x) for where in (params, state.params)]
    run = dp_sgd.run_phases(
        apply, params, x, network["y"], SOFTMAX, [probing, tuning], outputs=True, key=KEY
    )
    assert run.outputs is not None
    np.testing.assert_allclose(run.outputs[30], apply(state.params, x), atol=1e-10)
    errors: list[float] = []
    for kernel in (kernels[0], kernels):
        path = gradient_flow.recursion_phases(
            kernel, network["y"], SOFTMAX, [probing, tuning], apply(params, x)
        )
        errors.append(float(np.max(np.abs(path.loss / run.loss - 1)[31:])))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.1


# Privacy of several mechanisms.


def test_full_batches_compose_as_gaussian_dp() -> None:
    """mu^2 = sum K / sigma^2, and its epsilon by the formula of Balle and Wang."""
    pieces = [(20.0, 1.0, 100), (35.0, 1.0, 50), (8.0, 1.0, 1)]
    mu = math.sqrt(sum(steps / sigma**2 for sigma, _, steps in pieces))
    for delta in (1e-3, 1e-6):
        epsilon = privacy.composed_epsilon(pieces, delta)
        normal = scipy.stats.norm
        got = normal.cdf(mu / 2 - epsilon / mu)
        got -= math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)
        assert got == pytest.approx(delta, rel=1e-8)
        assert privacy.composed_epsilon(pieces, delta, "rdp") > epsilon


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_pieces_are_the_whole(accountant: Any) -> None:
    """Pieces of one mechanism, of others so near that they are counted apart, and in any order."""
    whole = privacy.epsilon(1.1, 0.01, 900, 1e-5, accountant)
    equal = privacy.composed_epsilon([(1.1, 0.01, 300)] * 3, 1e-5, accountant)
    assert equal == pytest.approx(whole, rel=1e-12)
    near = [(1.1, 0.01, 300), (1.1 + 1e-9, 0.01, 500), (1.1 - 1e-9, 0.01, 100)]
    apart = privacy.composed_epsilon(near, 1e-5, accountant)
    assert apart == pytest.approx(whole, rel=2e-3)
    assert privacy.composed_epsilon(near[::-1], 1e-5, accountant) == apart


def exact_delta(pieces: list[tuple[float, float]], epsilon: float) -> float:
    """Of two sampled Gaussian steps, by quadrature over both releases: the larger direction."""
    z = np.linspace(-12, 14, 4001)
    out, own = [], []
    for sigma, q in pieces:
        without = scipy.stats.norm.pdf(z, 0, sigma)
        out.append(without)
        own.append((1 - q) * without + q * scipy.stats.norm.pdf(z, 1, sigma))
    with_, without = (np.multiply.outer(*both) for both in (own, out))
    area = (z[1] - z[0]) ** 2
    return max(
        area * float(np.sum(np.maximum(a - math.exp(epsilon) * b, 0)))
        for a, b in ((with_, without), (without, with_))
    )


def test_sampled_steps_that_differ_compose_to_what_quadrature_finds() -> None:
    pieces = [(1.0, 0.3), (1.5, 1.0)]
    delta = 1e-3
    epsilon = privacy.composed_epsilon([(s, q, 1) for s, q in pieces], delta)
    assert exact_delta(pieces, epsilon) == pytest.approx(delta, rel=0.02)
    assert exact_delta(pieces, epsilon) <= delta * (1 + 1e-4)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_one_step_without_noise_spends_everything(accountant: Any) -> None:
    assert privacy.composed_epsilon([(5.0, 1.0, 10), (0.0, 0.1, 1)], 1e-5, accountant) == math.inf


def test_phases_know_their_mechanisms() -> None:
    rule, budget = clipping.Abadi(1.0), privacy.Budget(2.0, 1e-5)
    phase = Phase(40, rule, 0.1, budget)
    assert phase.mechanism() == (budget.noise_multiplier(40), 1.0, 40)
    assert privacy.composed_epsilon([phase.mechanism()], 1e-5) == pytest.approx(2.0, rel=1e-3)
    half = budget.noise_multiplier(80)
    both = [Phase(40, rule, 0.1, half), Phase(40, rule, 0.1, half, ("head",))]
    spent = privacy.composed_epsilon([phase.mechanism() for phase in both], 1e-5)
    assert spent == pytest.approx(2.0, rel=1e-3)
    assert privacy.composed_epsilon([phase.mechanism()] * 2, 1e-5) > 2.5


# Bad input.


RULE = clipping.Abadi(1.0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"clipping": 1.0}, TypeError, "clipping"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": lambda k: -0.1 * k}, ValueError, "learning_rate must be a schedule"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be at least 0"),
        ({"noise_multiplier": None}, TypeError, "noise_multiplier"),
        ({"trainable": ()}, ValueError, "trainable must hold at least one group"),
        ({"trainable": "head"}, TypeError, "trainable must be a sequence of names"),
    ],
)
def test_bad_phases_are_named(wrong: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Phase(**({"steps": 2, "clipping": RULE, "learning_rate": 0.1} | wrong))


@pytest.mark.parametrize("phases", [[], Phase(1, RULE, 0.1), [0.1], 3])
def test_what_is_no_sequence_of_phases_is_named(phases: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="phases must"):
        check_phases(phases)


def test_groups_that_do_not_exist_are_named_by_both_sides() -> None:
    phases = [Phase(2, RULE, 0.1), Phase(2, RULE, 0.1, trainable=("heads",))]
    message = "unknown group 'heads'; did you mean 'head'"
    with pytest.raises(ValueError, match=re.escape(message)):
        dp_sgd.run_phases(linear, PARAMS, X, Y, SQUARED, phases, key=KEY)
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_flow.recursion_phases(KERNEL, Y, SQUARED, phases, INITIAL[0])
    with pytest.raises(ValueError, match="names must hold at least one"):
        KERNEL.select([])
    several = Phase(2, clipping.Abadi(np.ones(2), scope="layerwise"), 0.1, trainable=("head",))
    for wrong in (
        partial(dp_sgd.run_phases, linear, PARAMS, X, Y, SQUARED, key=KEY),
        lambda phases: gradient_flow.recursion_phases(KERNEL, Y, SQUARED, phases, INITIAL[0]),
    ):
        with pytest.raises(ValueError, match="R has 2 entries for 1 parameter groups"):
            wrong([several])


def test_noise_needs_a_bound_on_both_sides() -> None:
    unbounded = [Phase(2, RULE, 0.1), Phase(2, clipping.NoClipping(), 0.1, 1.0)]
    with pytest.raises(ValueError, match="noise_multiplier must be 0 with NoClipping"):
        dp_sgd.run_phases(linear, PARAMS, X, Y, SQUARED, unbounded, key=KEY)
    with pytest.raises(ValueError, match="noise_multiplier must be 0 with NoClipping"):
        stochastic_flow.ensemble_phases(KERNEL, Y, SQUARED, unbounded, INITIAL[0], key=KEY)


def test_kernels_that_do_not_fit_are_named() -> None:
    frozen = [Phase(2, RULE, 0.1, trainable=("head",)), Phase(2, RULE, 0.1)]
    predict = partial(gradient_flow.recursion_phases, targets=Y, loss=SQUARED, phases=frozen)
    with pytest.raises(ValueError, match="kernel must be a LayerwiseKernel where a phase trains"):
        predict(KERNEL.total, initial=INITIAL[0])
    with pytest.raises(ValueError, match="test_kernel must be a LayerwiseKernel where"):
        predict(KERNEL, initial=INITIAL, test_kernel=TEST_KERNEL.total)
    with pytest.raises(ValueError, match="one for each of the 2 phases, got 3"):
        predict([KERNEL] * 3, initial=INITIAL[0])
    with pytest.raises(ValueError, match="targets must have one row a sample, 3"):
        predict([KERNEL, KERNEL.total[:3, :3]], initial=INITIAL[0])
    # An array does where nothing is frozen.
    mixed = predict([KERNEL, KERNEL.total], initial=INITIAL[0])
    assert_same(mixed, predict(KERNEL, initial=INITIAL[0]), rtol=1e-12)
    noisy = [Phase(2, RULE, 0.1, 1.0)]
    with pytest.raises(ValueError, match="noise_kernel must be the kernel of train and test"):
        stochastic_flow.ensemble_phases(
            KERNEL, Y, SQUARED, noisy, INITIAL, test_kernel=TEST_KERNEL, key=KEY
        )


@pytest.mark.parametrize(
    ("mechanisms", "delta", "error"),
    [
        ([], 1e-5, ValueError),
        (3, 1e-5, TypeError),
        ([(1.0, 1.0)], 1e-5, (TypeError, ValueError)),
        ([(1.0, 0.0, 3)], 1e-5, ValueError),
        ([(-1.0, 1.0, 3)], 1e-5, ValueError),
        ([(1.0, 1.0, 0)], 1e-5, ValueError),
        ([(1.0, 1.0, 3)], 1.0, ValueError),
    ],
)
def test_bad_mechanisms_are_refused(mechanisms: Any, delta: float, error: Any) -> None:
    with pytest.raises(error):
        privacy.composed_epsilon(mechanisms, delta)


# The page.


PAGE = Path(__file__).parents[2] / "docs" / "phases.md"


@pytest.mark.slow
def test_the_page_s_example_runs_and_says_what_it_claims() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "phases.md", "exec"), names)
    predicted, runs = names["predicted"], names["runs"]
    assert names["epsilon"] == pytest.approx(8.0, rel=1e-3)
    z = ntkdp.compare(predicted, runs).standardised_error
    assert z is not None
    assert np.max(np.abs(z[: names["probing"].steps])) < 3.5
    ends = [float(np.mean(path.loss[:, -1])) for path in (predicted, runs)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)
