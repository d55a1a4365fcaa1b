"""Progress reaches the function of its own run, and an exception in it reaches the caller."""

import concurrent.futures
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import linear

import ntkdp
from ntkdp._backend import progress as _progress

SQUARED, RULE = ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)


def train(progress: Any, seed: int = 0, apply_fn: Any = linear) -> ntkdp.Trajectory:
    return ntkdp.dp_sgd.run(
        apply_fn, jnp.ones((3, 1)), jnp.ones((4, 3)), jnp.zeros((4, 1)), SQUARED, RULE,
        learning_rate=0.1, steps=2000, record_every=10, progress=progress,
        key=jax.random.key(seed),
    )  # fmt: skip


FLOW = ntkdp.KernelFlow(jnp.eye(2), jnp.zeros((2, 1)), SQUARED, RULE)
START = jnp.ones((2, 1))
STEPS: dict[str, Any] = {"learning_rate": 0.1, "steps": 9}

WORK: dict[str, Callable[[Any], Any]] = {
    "dp_sgd.run": train,
    "solve": lambda progress: ntkdp.solve(FLOW, START, [0.0, 9.0], progress=progress),
    "recursion": lambda progress: ntkdp.recursion(FLOW, START, **STEPS, progress=progress),
    "ensemble": lambda progress: ntkdp.stochastic_flow.ensemble(
        FLOW, START, **STEPS, progress=progress, key=jax.random.key(0)
    ),
    "moments": lambda progress: ntkdp.stochastic_flow.moments(
        FLOW, START, **STEPS, progress=progress
    ),
    "final_outputs": lambda progress: ntkdp.stochastic_flow.final_outputs(
        FLOW, START, learning_rates=0.1, clip_norms=1.0, steps=9, progress=progress
    ),
}


def test_each_of_two_that_listen_at_once_hears_its_own() -> None:
    tell: Any = jax.jit(_progress.report)
    heard: tuple[list[float], ...] = ([], [])
    with (
        _progress.listening(heard[0].append, "first") as first,
        _progress.listening(heard[1].append, "second") as second,
    ):
        for done in (0.1, 0.2, 0.3):
            tell(first, done)
        tell(second, 0.5)
    assert heard[0] == pytest.approx([0.1, 0.2, 0.3, 1.0])
    assert heard[1] == pytest.approx([0.5, 1.0])


def test_runs_in_two_threads_hear_what_each_would_alone() -> None:
    alone: list[float] = []
    train(alone.append)
    assert len(alone) == 101
    heard: list[list[float]] = [[], []]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: train(heard[seed].append, seed), range(2)))
    assert heard == [alone, alone]


def test_fractions_never_fall() -> None:
    """Not even where several devices, or phases, tell theirs."""
    tell: Any = jax.jit(_progress.report)
    heard: list[float] = []
    with _progress.listening(heard.append, "work") as listener:
        for done in (0.25, 0.5, 0.25, 0.5, 0.75):
            tell(listener, done)
    assert heard == [0.25, 0.5, 0.75, 1.0]


def test_another_run_compiles_no_other_program() -> None:
    traces: list[int] = []

    def counted(params: Any, x: jax.Array) -> jax.Array:
        if isinstance(params, jax.core.Tracer):
            traces.append(1)
        return linear(params, x)

    train(lambda done: None, apply_fn=counted)
    before = len(traces)
    assert before > 0
    heard: list[float] = []
    train(heard.append, apply_fn=counted)
    assert heard[-1] == 1.0
    assert len(traces) == before


@pytest.mark.parametrize("name", WORK)
def test_an_exception_in_a_progress_function_is_the_callers(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[float] = []
    mine, cause = RuntimeError("mine"), KeyError("why")

    def fail(done: float) -> None:
        heard.append(done)
        raise mine from cause

    with pytest.raises(RuntimeError, match="mine") as caught:
        WORK[name](fail)
    assert caught.value is mine
    assert caught.value.__cause__ is cause
    assert len(heard) == 1
    assert not caplog.records
    assert capfd.readouterr().err == ""
    after: list[float] = []
    WORK[name](after.append)
    assert after[-1] == 1.0


ALONE = """
import jax, jax.numpy as jnp, ntkdp

def train(error):
    def stop(done):
        raise error
    try:
        ntkdp.dp_sgd.run(
            lambda w, x: x @ w, jnp.ones((3, 1)), jnp.ones((4, 3)), jnp.zeros((4, 1)),
            ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0), learning_rate=1e-9,
            steps=2_000_000_000, record_every=2_000_000, progress=stop, key=jax.random.key(0))
    except BaseException as caught:
        print(caught is error)

train(RuntimeError("mine"))
train(KeyboardInterrupt())
"""


def test_an_exception_ends_a_run_on_one_device_at_once() -> None:
    """Two thousand million steps would take hours."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={"PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True"]
    assert done.stderr == ""
