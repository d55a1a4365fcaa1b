"""The solver: orders, agreement of methods, results that say what went wrong, nothing retraced."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import known

import ntkdp
from ntkdp import clipping, losses
from ntkdp.gradient_flow import Flow
from ntkdp.trajectory import Measurement, Outcome

H = jnp.asarray(np.ones((3, 3)) + 0.1 * np.eye(3))
Y = np.array([-3.0, 1.0, 1.0])
START = np.zeros((3, 1))


def make(rule: Any, kernel: Any = H) -> ntkdp.KernelFlow:
    return ntkdp.KernelFlow(kernel, Y, losses.SquaredError(), rule, reduction="sum")


def exact(t: float) -> np.ndarray:
    """Outputs of the unclipped flow from zero, by eigenvectors."""
    values, vectors = np.linalg.eigh(H)
    return Y - vectors @ (np.exp(-values * t) * (vectors.T @ Y))


@pytest.mark.parametrize(
    "solver",
    [
        None,
        pytest.param(diffrax.Dopri8(), marks=pytest.mark.slow),
        pytest.param(diffrax.Kvaerno5(), marks=pytest.mark.slow),
    ],
)
def test_solvers_agree_with_the_closed_form(solver: Any) -> None:
    path = ntkdp.solve(
        make(clipping.NoClipping()),
        START,
        [0.0, 0.5, 2.0],
        solver=solver,
        rtol=1e-9,
        atol=1e-11,
        outputs=True,
    )
    assert path.successful
    assert path.message == "success"
    for t, f in zip(path.times, known(path.outputs), strict=True):
        np.testing.assert_allclose(f[:, 0], exact(float(t)), rtol=1e-7, atol=1e-8)


def test_discrete_steps_are_of_first_order() -> None:
    """Euler's method: the error at t = 2 against the closed form is proportional to the step."""
    etas = np.array([0.02, 0.01, 0.005])
    errors = []
    for eta in etas:
        path = ntkdp.recursion(
            make(clipping.NoClipping()),
            START,
            learning_rate=eta,
            steps=round(2 / eta),
            record_every=400,
            outputs=True,
        )
        errors.append(np.max(np.abs(known(path.outputs)[-1, :, 0] - exact(2.0))))
    slopes = np.diff(np.log(errors)) / np.diff(np.log(etas))
    assert np.all(np.abs(slopes - 1) < 0.02), slopes


def test_times_and_steps() -> None:
    flow = make(clipping.Abadi(1.0))
    path = ntkdp.solve(flow, START, [1.0, 1.5, 3.0], start=1.0)
    np.testing.assert_array_equal(path.times, [1.0, 1.5, 3.0])
    assert path.steps is None
    assert path.outputs is None
    # The flow is autonomous: only the differences of times matter.
    shifted = ntkdp.solve(flow, START, [-2.0, -1.5, 0.0], start=-2.0)
    np.testing.assert_allclose(shifted.loss, path.loss, rtol=1e-5)

    every = ntkdp.recursion(flow, START, learning_rate=0.1, steps=7)
    np.testing.assert_array_equal(every.steps, np.arange(8))
    np.testing.assert_allclose(every.times, 0.1 * np.arange(8), rtol=1e-12)
    some = ntkdp.recursion(flow, START, learning_rate=0.1, steps=7, record_every=3)
    np.testing.assert_array_equal(some.steps, [0, 3, 6, 7])
    np.testing.assert_allclose(some.loss, every.loss[some.steps], rtol=1e-12)
    few = ntkdp.recursion(flow, START, learning_rate=0.1, steps=7, record_every=100)
    np.testing.assert_array_equal(few.steps, [0, 7])
    np.testing.assert_allclose(few.loss, every.loss[few.steps], rtol=1e-12)


def test_a_log_that_begins_late_is_predicted_from_time_zero() -> None:
    flow = make(clipping.NoClipping())
    late = ntkdp.solve(flow, START, [1.0, 3.0], rtol=1e-9, atol=1e-11, outputs=True)
    np.testing.assert_array_equal(late.times, [1.0, 3.0])
    for t, f in zip(late.times, known(late.outputs), strict=True):
        np.testing.assert_allclose(f[:, 0], exact(float(t)), rtol=1e-7, atol=1e-8)
    own = ntkdp.solve(flow, START, [1.0, 3.0], start=0.5, rtol=1e-9, atol=1e-11, outputs=True)
    np.testing.assert_allclose(known(own.outputs)[-1, :, 0], exact(2.5), rtol=1e-7, atol=1e-8)


def test_a_late_log_has_the_error_of_the_whole() -> None:
    """Unclipped, the prediction is right to the last digits; the first time is predicted too."""
    flow = make(clipping.NoClipping())
    times = np.array([1.0, 2.0, 3.0])
    losses = [0.5 * np.sum((exact(t) - Y) ** 2) for t in times]
    log = ntkdp.Trajectory(jnp.asarray(times), jnp.asarray(losses), jnp.zeros(3))
    found = ntkdp.compare(ntkdp.solve(flow, START, log.times, rtol=1e-9, atol=1e-11), log)
    np.testing.assert_array_equal(found.times, times)
    assert found.sup_relative_error < 1e-6
    from_there = ntkdp.compare(ntkdp.solve(flow, START, log.times, start=log.times[0]), log)
    np.testing.assert_array_equal(from_there.times, times[1:])
    assert from_there.sup_relative_error > 0.05


def test_a_start_is_told_and_kept(tmp_path: Any) -> None:
    path = ntkdp.solve(make(clipping.Abadi(1.0)), START, [1.0, 2.0], start=0.5)
    path.rescale_time(4.0).save(tmp_path / "path.nc")
    assert float(known(ntkdp.Trajectory.load(tmp_path / "path.nc").start)) == 2.0
    begin = ntkdp.solve(make(clipping.Abadi(1.0)), START, [0.0, 0.5])
    with pytest.raises(ValueError, match=r"other must record its start, t = 0.5, .* from 1"):
        begin.then(path)
    joined = begin.then(ntkdp.solve(make(clipping.Abadi(1.0)), START, [0.5, 2.0], start=0.5))
    np.testing.assert_array_equal(joined.times, [0.0, 0.5, 2.0])


def test_times_before_the_start() -> None:
    flow = make(clipping.Abadi(1.0))
    message = r"times must not begin before start = 0, .*times\[0\] = -1; pass start=times\[0\]"
    with pytest.raises(ValueError, match=message):
        ntkdp.solve(flow, START, [-1.0, 2.0])
    with pytest.raises(ValueError, match=r"start = 2, .*got times\[0\] = 1"):
        ntkdp.solve(flow, START, [1.0, 2.0], start=2.0)
    for wrong in (np.nan, np.array([0.0])):
        with pytest.raises(ValueError, match="start must be"):
            ntkdp.solve(flow, START, [1.0, 2.0], start=wrong)
    wrong_type: Any = "now"
    with pytest.raises(TypeError, match="start"):
        ntkdp.solve(flow, START, [1.0, 2.0], start=wrong_type)
    traced = jax.jit(lambda start: ntkdp.solve(flow, START, [1.0, 2.0], start=start).loss)
    np.testing.assert_allclose(traced(0.5), ntkdp.solve(flow, START, [0.5, 1.5]).loss, rtol=1e-5)
    with pytest.raises(Exception, match="times must not begin before start"):
        jax.block_until_ready(traced(1.5))


def test_a_schedule_sets_steps_and_times() -> None:
    flow = make(clipping.Abadi(1.0))
    rates = np.array([0.1, 0.05, 0.025, 0.0125])
    path = ntkdp.recursion(
        flow, START, learning_rate=lambda k: 0.1 * 0.5**k, steps=4, record_every=3, outputs=True
    )
    np.testing.assert_allclose(path.times, [0.0, 0.175, 0.1875], rtol=1e-12)
    f = np.zeros(3)
    for rate in rates:
        a = f - Y
        factors = np.minimum(1, 1 / (np.sqrt(1.1) * np.abs(a)))
        f = f - rate * np.asarray(H) @ (factors * a)
    np.testing.assert_allclose(known(path.outputs)[-1, :, 0], f, rtol=1e-12)


def test_steps_used_up_is_a_result_with_advice() -> None:
    times = np.linspace(0.0, 2000.0, 5)
    path = ntkdp.solve(make(clipping.NoClipping()), START, times, max_steps=40)
    assert not path.successful
    assert int(path.outcome) == Outcome.MAX_STEPS
    assert "raise max_steps" in path.message
    assert "Kvaerno5" in path.message
    assert np.isfinite(path.loss[0])
    assert np.all(np.isnan(path.loss[1:]))


def test_blow_up_is_told() -> None:
    """f' = f^2 from 1 becomes infinite at t = 1: the step size shrinks to rounding there."""
    flow = ntkdp.KernelFlow(
        jnp.eye(1), np.zeros((1, 1)), lambda f, y: -jnp.sum(f**3) / 3, clipping.NoClipping()
    )
    path = ntkdp.solve(flow, np.ones((1, 1)), np.linspace(0.0, 2.0, 9), outputs=True)
    np.testing.assert_allclose(known(path.outputs)[:4, 0, 0], 1 / (1 - path.times[:4]), rtol=1e-4)
    assert np.all(np.isnan(path.loss[5:]))
    assert int(path.outcome) == Outcome.STEP_TOO_SMALL
    assert "may blow up" in path.message


def test_divergence_of_discrete_steps_is_told() -> None:
    path = ntkdp.recursion(make(clipping.NoClipping()), START, learning_rate=100.0, steps=200)
    assert not path.successful
    assert int(path.outcome) == Outcome.NON_FINITE
    assert "lower the learning rate" in path.message


def test_progress_rises_to_the_end() -> None:
    heard: list[float] = []
    ntkdp.solve(make(clipping.Abadi(1.0)), START, [0.0, 50.0], progress=heard.append)
    assert heard == sorted(heard)
    assert len(heard) > 3
    assert heard[-1] == 1.0
    heard.clear()
    ntkdp.recursion(
        make(clipping.Abadi(1.0)), START, learning_rate=0.1, steps=50, progress=heard.append
    )
    assert heard == sorted(heard)
    assert heard[0] == 0.0
    assert len(heard) == 51
    heard.clear()
    ntkdp.solve(make(clipping.Abadi(1.0)), START, [0.0, 50.0])
    assert heard == []


class Counted(Flow):
    """A flow that counts how often its velocity is traced."""

    flow: ntkdp.KernelFlow
    traces: Any

    def init(self, initial: Any) -> Any:
        return self.flow.init(initial)

    def velocity(self, state: Any) -> Any:
        self.traces.append(1)
        return self.flow.velocity(state)

    def measure(self, state: Any, outputs: bool) -> Measurement:
        return self.flow.measure(state, outputs)


class Traces(list[int]):
    """Hashed by identity, a static part of a flow."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_other_numbers_compile_nothing() -> None:
    traces = Traces()
    ntkdp.solve(Counted(make(clipping.Abadi(1.0)), traces), START, [0.0, 0.5, 1.0])
    first = len(traces)
    assert 0 < first <= 4
    other = make(clipping.Abadi(0.3), 2.0 * H)
    path = ntkdp.solve(Counted(other, traces), START + 1.0, [0.5, 1.0, 3.0])
    assert len(traces) == first
    # And the new numbers are used: f' = -H C a, C = R / (sqrt(H_ii) |a|).
    speed = float((path.loss[1] - path.loss[0]) / 0.5)
    assert speed != 0.0
    ntkdp.solve(Counted(other, traces), START, [0.0, 1.0])
    assert len(traces) > first


@pytest.mark.slow
def test_another_friction_compiles_nothing() -> None:
    traces = []

    def factor(s: jax.Array) -> jax.Array:
        traces.append(s)
        return 1 / (1 + s)

    flow = make(clipping.Custom(factor, 1.0))
    counts = [len(traces)]
    for friction in (0.3, 0.5):
        ntkdp.solve(ntkdp.HeavyBallFlow(flow, friction), START, [0.0, 0.5, 1.0])
        counts.append(len(traces))
    assert counts[0] < counts[1] == counts[2]


def final_loss(start: jax.Array, R: Any) -> jax.Array:
    return ntkdp.solve(make(clipping.Abadi(R)), start, [0.0, 0.5], rtol=1e-9, atol=1e-12).loss[-1]


def final_discrete_loss(start: jax.Array, R: Any, eta: Any = 0.1) -> jax.Array:
    flow = make(clipping.Abadi(R))
    return ntkdp.recursion(flow, start, learning_rate=eta, steps=5, record_every=2).loss[-1]


@pytest.mark.parametrize("final", [final_loss, final_discrete_loss])
def test_under_jit_vmap_and_grad(final: Any) -> None:
    start, R, h = jnp.asarray(START), 1.0, 1e-5
    several = jax.jit(jax.vmap(final, (None, 0)))(start, jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(several[1], final(start, R), rtol=1e-6)
    slopes = jax.jit(jax.grad(final, (0, 1)))(start, R)
    # Adaptive steps across the kinks leave some noise in the differences.
    difference = (final(start, R + h) - final(start, R - h)) / (2 * h)
    np.testing.assert_allclose(slopes[1], difference, rtol=1e-3)
    moved = start.at[0].add(h), start.at[0].add(-h)
    difference = (final(moved[0], R) - final(moved[1], R)) / (2 * h)
    np.testing.assert_allclose(slopes[0][0, 0], difference, rtol=1e-3)


def test_derivative_in_the_learning_rate() -> None:
    def loss(eta: Any) -> jax.Array:
        return final_discrete_loss(jnp.asarray(START), 1.0, eta)

    difference = (loss(0.1 + 1e-5) - loss(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(0.1), difference, rtol=1e-4)


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ([0.0, 1.0, 1.0], {}, r"times must be strictly increasing, got times\[1\] = 1.0 before"),
        ([0.0, 2.0, 1.0], {}, r"got times\[1\] = 2.0 before times\[2\] = 1.0"),
        ([0.0], {}, "times must be a one-dimensional array of two or more"),
        ([[0.0, 1.0]], {}, "times must be a one-dimensional array"),
        ([0.0, np.nan], {}, "times must be finite"),
        ([0.0, 1.0], {"rtol": 0.0}, "rtol must be positive and finite, got 0.0"),
        ([0.0, 1.0], {"atol": -1.0}, "atol must be positive and finite, got -1.0"),
        ([0.0, 1.0], {"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ([0.0, 1.0], {"solver": diffrax.Euler()}, "solver must be .*error estimate.*Euler"),
    ],
)
def test_bad_input_of_solve(times: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ntkdp.solve(make(clipping.Abadi(1.0)), START, times, **options)


def test_bad_input_of_the_recursion() -> None:
    flow = make(clipping.Abadi(1.0))
    for options, message in (
        ({"learning_rate": 0.0, "steps": 1}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": -0.1, "steps": 1}, "learning_rate must be positive.*got -0.1"),
        ({"learning_rate": float("nan"), "steps": 1}, "learning_rate must be positive.*got nan"),
        ({"learning_rate": lambda k: 1.0 - k, "steps": 3}, "schedule of finite values.*got -1.0"),
        ({"learning_rate": 0.1, "steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.1, "steps": 1, "record_every": 0}, "record_every must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ntkdp.recursion(flow, START, **options)
    ball = ntkdp.HeavyBallFlow(flow, 1.0)
    with pytest.raises(TypeError, match="KernelFlow"):
        ntkdp.recursion(ball, START, learning_rate=0.1, steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Flow"):
        ntkdp.solve("flow", START, [0.0, 1.0])  # type: ignore[arg-type]
