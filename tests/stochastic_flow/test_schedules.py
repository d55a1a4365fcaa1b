"""Clipping norms and noise that change over the steps: by hand, key by key, and in law."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SQUARED, known, linear, often_or_slow

import ntkdp
from ntkdp import clipping, dp_sgd, optimizers, stochastic_flow
from ntkdp.batches import Cyclic, Poisson

N, D, K, STEPS, RATE = 12, 3, 2, 9, 0.4
KEYS = jax.random.split(jax.random.key(2), 3)
X, Y, W = (
    np.asarray(jax.random.normal(key, shape))
    for key, shape in zip(KEYS, [(N, D), (N, K), (D, K)], strict=True)
)
NORMS = np.linspace(3.0, 0.4, STEPS)
SIGMAS = np.geomspace(0.5, 2.0, STEPS)
TRAINING: dict[str, Any] = {"learning_rate": RATE, "steps": STEPS}
KERNEL = X @ X.T


def flow(rule: Any = None, **options: Any) -> ntkdp.KernelFlow:
    rule = clipping.Abadi(1.0) if rule is None else rule
    return ntkdp.KernelFlow(KERNEL, Y, SQUARED, rule, **options)


def linearised(rule: Any, **options: Any) -> ntkdp.LinearisedFlow:
    return ntkdp.LinearisedFlow(linear, W, X, Y, SQUARED, rule, **options)


def run(rule: Any = None, **options: Any) -> ntkdp.Trajectory:
    rule = clipping.Abadi(1.0) if rule is None else rule
    given = TRAINING | {"key": jax.random.key(0), "outputs": True} | options
    return dp_sgd.run(linear, W, X, Y, SQUARED, rule, **given)


def by_hand(norms: np.ndarray, factor: Callable[[Any, float], Any]) -> np.ndarray:
    """Outputs of clipped steps with a clipping norm for each, one sample at a time."""
    w, outputs = W.copy(), [X @ W]
    for R in norms:
        total = np.zeros_like(w)
        for x, y in zip(X, Y, strict=True):
            gradient = np.outer(x, x @ w - y)
            total += factor(np.linalg.norm(gradient), R) * gradient
        w = w - RATE * total / N
        outputs.append(X @ w)
    return np.stack(outputs)


def of_abadi(s: float, R: float) -> float:
    return min(1.0, R / s)


def of_automatic(s: float, R: float) -> float:
    # At R in place of 2, gamma moves in proportion too.
    return 2.0 / (s * 2.0 / R + 0.1)


@pytest.mark.parametrize(
    ("rule", "factor"),
    [(clipping.Abadi(1.0), of_abadi), (clipping.Automatic(2.0, gamma=0.1), of_automatic)],
)
def test_clipping_norms_are_those_of_the_steps(
    rule: clipping.ClippingRule, factor: Callable[[Any, float], Any]
) -> None:
    expected = by_hand(NORMS, factor)
    for gradients in ("structured", "vmap"):
        path = run(rule, clip_norm=NORMS, gradients=gradients)
        np.testing.assert_allclose(known(path.outputs), expected, rtol=1e-10, atol=1e-12)
    schedule = optax.linear_schedule(NORMS[0], NORMS[-1], STEPS - 1)
    path = ntkdp.recursion(flow(rule), X @ W, clip_norm=schedule, outputs=True, **TRAINING)
    np.testing.assert_allclose(known(path.outputs), expected, rtol=1e-10, atol=1e-12)
    moved = known(path.clip_norm)
    np.testing.assert_allclose(moved[:, 0], [*NORMS, NORMS[-1]], rtol=1e-12)


def test_noise_is_in_proportion_to_both_schedules() -> None:
    """Without a gradient the weights are the noise that was drawn."""
    still: dict[str, Any] = {"x": 0 * X, "targets": 0 * Y, "loss": SQUARED, "test_x": jnp.eye(D)}
    given = TRAINING | {
        "key": jax.random.key(0),
        "outputs": True,
        "test_targets": jnp.zeros((D, K)),
    }

    def moves(**options: Any) -> np.ndarray:
        path = dp_sgd.run(linear, W, clipping=clipping.Abadi(1.5), **still, **given, **options)
        return np.diff(np.asarray(known(path.test_outputs)), axis=0)

    once = moves(noise_multiplier=1.0)
    of_noise = moves(noise_multiplier=SIGMAS)
    np.testing.assert_allclose(of_noise, SIGMAS[:, None, None] * once, rtol=1e-9)
    of_both = moves(noise_multiplier=SIGMAS, clip_norm=lambda k: 3.0 - k / 4)
    sizes = SIGMAS * (3.0 - np.arange(STEPS) / 4) / 1.5
    np.testing.assert_allclose(of_both, sizes[:, None, None] * once, rtol=1e-9)


BOTH: dict[str, Any] = {"noise_multiplier": SIGMAS, "clip_norm": NORMS}
LAYERS = np.stack([NORMS, NORMS[::-1]], axis=1)
GROUPS = {"a": W, "b": np.asarray(W[::-1])}
CASES: list[dict[str, Any]] = [
    {**BOTH, "batches": Poisson(0.5), "optimizer": optimizers.SGD(momentum=0.6)},
    {**BOTH, "optimizer": optimizers.Adam(correct_noise=True), "learning_rate": 0.1},
    {**BOTH, "sharpness_aware": ntkdp.SharpnessAware(0.2), "batches": Cyclic(3)},
    {"noise_multiplier": SIGMAS, "zeroth_order": ntkdp.ZerothOrder(2), "learning_rate": 0.05},
]


@pytest.mark.parametrize("options", often_or_slow(CASES, CASES[:1]), ids=lambda o: "-".join(o))
def test_a_linearised_model_is_the_run_of_the_same_key(options: dict[str, Any]) -> None:
    rule = clipping.Abadi(1.0)
    given = TRAINING | {"key": jax.random.key(5), "outputs": True} | options
    observed = run(rule, **given)
    predicted = stochastic_flow.ensemble(linearised(rule), W, **given)
    np.testing.assert_allclose(known(predicted.outputs), known(observed.outputs), rtol=1e-8)
    compared = ntkdp.compare(predicted, observed)
    assert compared.sup_relative_error < 1e-8


def test_clipping_norms_of_layers() -> None:
    def apply(w: Any, x: Any) -> Any:
        return x @ w["a"] + x**2 @ w["b"]

    rule = clipping.Abadi(1.0, scope="layerwise")
    given = TRAINING | {"key": jax.random.key(5), "outputs": True, "noise_multiplier": SIGMAS}
    given |= {"clip_norm": LAYERS, "noise_per_group": True}
    observed = dp_sgd.run(apply, GROUPS, X, Y, SQUARED, rule, **given)
    exact = ntkdp.LinearisedFlow(apply, GROUPS, X, Y, SQUARED, rule)
    predicted = stochastic_flow.ensemble(exact, GROUPS, **given)
    np.testing.assert_allclose(known(predicted.outputs), known(observed.outputs), rtol=1e-8)
    np.testing.assert_allclose(known(observed.clip_norm)[:-1], LAYERS)


#: The squared loss under gradients that stay below all clipping norms.
WIDE = np.linspace(80.0, 120.0, STEPS)
QUIET = SIGMAS / 50


def loss_without_clipping(sizes: np.ndarray) -> np.ndarray:
    """Mean loss of steps f <- f - eta H (f - y)/n + eta J z s/n, by modes of the kernel."""
    squares, modes = np.linalg.eigh(KERNEL)
    squares = np.maximum(squares, 0.0)
    shrink = 1 - RATE * squares / N
    mean, variance = modes.T @ (X @ W - Y), np.zeros(N)
    losses = [(mean**2).sum() / (2 * N)]
    for size in sizes:
        mean = shrink[:, None] * mean
        variance = shrink**2 * variance + squares * (RATE * size / N) ** 2
        losses.append(((mean**2).sum() + K * variance.sum()) / (2 * N))
    return np.array(losses)


def test_moments_and_ensembles_under_schedules_are_those_of_the_modes() -> None:
    given = TRAINING | {"noise_multiplier": QUIET, "clip_norm": WIDE}
    wide = flow(clipping.Abadi(100.0))
    expected = loss_without_clipping(QUIET * WIDE)
    predicted = stochastic_flow.moments(wide, X @ W, **given)
    np.testing.assert_allclose(predicted.loss, expected, rtol=1e-9)
    low_rank = stochastic_flow.moments(wide, X @ W, rank=4, **given)
    np.testing.assert_allclose(low_rank.loss, expected, rtol=1e-6)
    head = ntkdp.KernelFlow(ntkdp.ntk.FeatureKernel(X), Y, SQUARED, clipping.Abadi(100.0))
    keys = jax.random.split(jax.random.key(7), 4000)
    for drawn_from in (wide, head):
        drawn = np.asarray(stochastic_flow.ensemble(drawn_from, X @ W, key=keys, **given).loss)
        errors = drawn.std(axis=0)[1:] / np.sqrt(len(keys))
        assert np.abs((drawn.mean(axis=0)[1:] - expected[1:]) / errors).max() < 4
        assert float(predicted.loss_std[-1]) == pytest.approx(drawn[:, -1].std(), rel=0.06)


@pytest.mark.slow
def test_moments_of_clipped_steps_under_schedules() -> None:
    given = TRAINING | {"noise_multiplier": SIGMAS, "clip_norm": NORMS, "sample_rate": 0.5}
    predicted = stochastic_flow.moments(flow(), X @ W, **given)
    keys = jax.random.split(jax.random.key(8), 4000)
    drawn = stochastic_flow.ensemble(flow(), X @ W, key=keys, **given)
    np.testing.assert_allclose(predicted.loss, drawn.loss.mean(axis=0), rtol=0.03)
    observed = run(**given, key=keys)
    np.testing.assert_allclose(observed.loss.mean(axis=0), drawn.loss.mean(axis=0), rtol=0.03)


def same(**options: Any) -> list[np.ndarray]:
    """What runs and predictions make of the options."""
    key = jax.random.split(jax.random.key(1), 3)
    noise_free = {name: part for name, part in options.items() if name == "clip_norm"}
    return [
        np.asarray(known(part))
        for part in (
            run(key=key, **options).outputs,
            ntkdp.recursion(flow(), X @ W, **TRAINING, **noise_free).loss,
            stochastic_flow.ensemble(flow(), X @ W, key=key, **TRAINING, **options).loss,
            stochastic_flow.moments(flow(), X @ W, **TRAINING, **options).loss_std,
        )
    ]


def test_constant_schedules_change_no_bit() -> None:
    usual = same(noise_multiplier=0.7)
    scheduled = same(noise_multiplier=optax.constant_schedule(0.7), clip_norm=np.ones(STEPS))
    for ours, theirs in zip(scheduled, usual, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_steps_of_ones_own_take_schedules_without_knowing_their_number() -> None:
    build = partial(dp_sgd.build, linear, X, Y, SQUARED, clipping.Abadi(1.0), learning_rate=RATE)
    usual = build(noise_multiplier=0.7)
    scheduled = build(noise_multiplier=lambda k: 0.7 + 0 * k, clip_norm=lambda k: 1.0 + 0 * k)
    states = usual.init(W), scheduled.init(W)
    moving = build(noise_multiplier=SIGMAS, clip_norm=lambda k: jnp.asarray(NORMS)[k])
    state = moving.init(W)
    expected = run(**BOTH)
    for k in range(STEPS):
        own = jax.random.fold_in(jax.random.key(0), k)
        states = usual.step(own, states[0])[0], scheduled.step(own, states[1])[0]
        np.testing.assert_allclose(states[1].params, states[0].params, rtol=1e-13)
        np.testing.assert_allclose(X @ state.params, known(expected.outputs)[k], rtol=1e-10)
        state = moving.compile()(own, state)[0] if k == 0 else moving.step(own, state)[0]
    # Past the end of an array its last number holds.
    after = moving.step(own, state)[0]
    assert np.all(np.isfinite(after.params))


def test_what_changes_is_compared() -> None:
    key = jax.random.split(jax.random.key(3), 4)
    observed = run(key=key, **BOTH)
    same_training = stochastic_flow.ensemble(flow(), X @ W, key=key, **TRAINING, **BOTH)
    assert not ntkdp.compare(same_training, observed).differences
    constant = stochastic_flow.ensemble(flow(), X @ W, key=key, noise_multiplier=1.0, **TRAINING)
    with pytest.raises(ValueError, match="noise_multiplier") as caught:
        ntkdp.compare(constant, observed)
    for words in ("clipping", "Scheduled(3, 2.675", "noise_multiplier", "1 predicted, 0.5, 0.594"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": NORMS[1:]}, "clip_norm must be a schedule with one number for each of 9"),
        ({"clip_norm": -NORMS}, "clip_norm must be at least 0"),
        ({"clip_norm": 0 * NORMS}, "clip_norm must be positive in all steps, got 0"),
        ({"clip_norm": np.ones((STEPS, 3)) * NORMS[:, None]}, "or one for each of 1 groups, got 3"),
        ({"clip_norm": NORMS, "adaptive": clipping.Adaptive(0.5)}, "must be None with adaptive"),
        ({"noise_multiplier": SIGMAS, "adaptive": clipping.Adaptive(0.5)}, "one number with adap"),
        ({"noise_multiplier": -SIGMAS}, "noise_multiplier must be at least 0"),
        ({"noise_multiplier": SIGMAS[:, None] * np.ones(2)}, "must be one number in each step"),
        (
            {"noise_multiplier": SIGMAS, "noise": ntkdp.noise.Correlated([1.0, 0.5])},
            "independent with a schedule of noise_multiplier, .* got Correlated",
        ),
        (
            {"clip_norm": NORMS, "noise": ntkdp.noise.Correlated([1.0, 0.5])},
            "independent with a schedule of clip_norm",
        ),
        ({"clip_norm": NORMS, "zeroth_order": ntkdp.ZerothOrder(2)}, "clip_norm must be None"),
    ],
)
def test_what_cannot_change_is_named(options: dict[str, Any], message: str) -> None:
    given = TRAINING | {"key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        dp_sgd.run(linear, W, X, Y, SQUARED, clipping.Abadi(1.0), **given)
    with pytest.raises(ValueError, match=message):
        stochastic_flow.ensemble(flow(), X @ W, **given)


def test_rules_and_predictions_without_schedules_are_named() -> None:
    number: Any = 1.0
    with pytest.raises(ValueError, match="clip_norm must be None with NoClipping"):
        run(clipping.NoClipping(), clip_norm=NORMS)
    for options in (BOTH | {"noise_multiplier": 1.0}, {"noise_multiplier": SIGMAS}):
        with pytest.raises(ValueError, match=r"(clip_norm|noise_multiplier) must be .* individual"):
            run(individual=True, **options)
    with pytest.raises(TypeError, match="a constant one is the R of the rule"):
        clipping.moving_norm(None, number, clipping.Abadi(1.0), STEPS)
    with pytest.raises(TypeError, match=r"must be one number here, got a schedule; dp_sgd.run, "):
        ntkdp.privacy.as_noise_multiplier(optax.constant_schedule(1.0), STEPS)
    layered = ntkdp.LayerwiseKernel(("a", "b"), jnp.stack([KERNEL, KERNEL]))
    rule = clipping.Abadi(1.0, scope="layerwise")
    by_layer = ntkdp.KernelFlow(layered, Y, SQUARED, rule)
    for predict in (stochastic_flow.moments, partial(stochastic_flow.ensemble, key=KEYS[0])):
        with pytest.raises(ValueError, match="noise_per_group must be False"):
            predict(by_layer, X @ W, clip_norm=NORMS, noise_per_group=True, **TRAINING)


HALVES = (slice(0, 4), slice(4, STEPS))


def in_phases(**options: Any) -> list[ntkdp.Phase]:
    return [
        ntkdp.Phase(
            len(NORMS[half]), clipping.Abadi(1.0), RATE,
            **{name: schedule[half] for name, schedule in options.items()},
        )
        for half in HALVES
    ]  # fmt: skip


def test_schedules_go_on_from_phase_to_phase() -> None:
    """Two phases with the halves of a schedule are one run with the whole."""
    key = jax.random.split(jax.random.key(4), 3)
    phases = in_phases(**BOTH)
    data = (linear, W, X, Y, SQUARED)
    parts = dp_sgd.run_phases(*data, phases, key=key, outputs=True)
    whole = run(key=key, **BOTH)
    np.testing.assert_allclose(known(parts.outputs), known(whole.outputs), rtol=1e-12)
    np.testing.assert_allclose(known(parts.clip_norm), known(whole.clip_norm), rtol=1e-12)
    predicted = stochastic_flow.ensemble_phases(KERNEL, Y, SQUARED, phases, X @ W, key=key)
    at_once = stochastic_flow.ensemble(flow(), X @ W, key=key, **TRAINING, **BOTH)
    # The covariance has rank 3 of 12, and roots of zero round.
    np.testing.assert_allclose(predicted.loss, at_once.loss, rtol=1e-7)
    norms = in_phases(clip_norm=NORMS)
    stepped = ntkdp.gradient_flow.recursion_phases(KERNEL, Y, SQUARED, norms, X @ W)
    once = ntkdp.recursion(flow(), X @ W, clip_norm=NORMS, **TRAINING)
    np.testing.assert_allclose(stepped.loss, once.loss, rtol=1e-12)
    mechanisms = [phase.mechanism() for phase in phases]
    assert ntkdp.privacy.composed_epsilon(mechanisms, 1e-5) == pytest.approx(
        ntkdp.privacy.epsilon(SIGMAS, 1.0, STEPS, 1e-5), rel=1e-9
    )
    with pytest.raises(ValueError, match="use recursion_phases"):
        ntkdp.gradient_flow.solve_phases(KERNEL, Y, SQUARED, norms, X @ W)


def test_a_clipping_norm_adapts_within_a_phase() -> None:
    """The first phase is a run that adapts, the second has the rule's own norm."""
    adaptive = clipping.Adaptive(0.5, rate=0.3, count_noise=4.0)
    rule = clipping.Abadi(3.0)
    key = jax.random.split(jax.random.key(4), 3)
    phases = [
        ntkdp.Phase(5, rule, RATE, noise_multiplier=0.5, adaptive=adaptive),
        ntkdp.Phase(2, rule, RATE, noise_multiplier=0.5),
    ]
    parts = dp_sgd.run_phases(linear, W, X, Y, SQUARED, phases, key=key)
    once = run(rule, adaptive=adaptive, noise_multiplier=0.5, key=key, steps=5)
    np.testing.assert_array_equal(parts.loss[:, :6], once.loss)
    np.testing.assert_array_equal(known(parts.clip_norm)[:, :5], known(once.clip_norm)[:, :5])
    np.testing.assert_array_equal(known(parts.clip_norm)[:, 5:], 3.0)
    predicted = stochastic_flow.ensemble_phases(KERNEL, Y, SQUARED, phases, X @ W, key=key)
    drawn = stochastic_flow.ensemble(
        flow(rule), X @ W, adaptive=adaptive, noise_multiplier=0.5, key=key,
        learning_rate=RATE, steps=5,
    )  # fmt: skip
    np.testing.assert_array_equal(predicted.loss[:, :6], drawn.loss)
    assert not ntkdp.compare(predicted, parts).differences
