"""Discrete steps, some of which are recorded."""

from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import compiled, memory, progress, validate
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, LearningRate, PyTree, ScalarLike, is_traced

#: Steps are counted in 32 bits, by optimizers and where a step draws its own noise.
MOST_STEPS = 2**31 - 1
#: Bytes that times, losses and their like take at a recorded step.
_RECORDED = 64


def check_steps(steps: int) -> int:
    """A number of steps that can be counted."""
    number = validate.count(steps=steps)
    if number > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS:,}, got {number:,}")
    return number


class Stepping(eqx.Module):
    """How many steps, how long each is, and which are recorded; a pytree.

    Parameters
    ----------
    learning_rate : float or optax schedule
        Positive; a schedule maps the step number to it.
    steps, record_every : int
        At least 1. Every ``record_every`` steps are recorded, and the last.
    done, total : int
        Steps that came before these, and in all; by default none, and these.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    MemoryError
        If the record does not fit.
    """

    learning_rate: LearningRate
    steps: int = eqx.field(static=True)
    record_every: int = eqx.field(static=True)
    done: Array
    total: Array

    def __init__(
        self,
        learning_rate: LearningRate,
        steps: int,
        record_every: int,
        done: int = 0,
        total: int | None = None,
    ) -> None:
        self.steps = check_steps(steps)
        self.record_every = validate.count(record_every=record_every)
        n_recorded = -(-self.steps // self.record_every) + 1
        schedule_bytes = self.steps * np.dtype(float).itemsize if callable(learning_rate) else 0
        memory.require(
            n_recorded * _RECORDED + schedule_bytes,
            f"a record of {n_recorded:,} of {self.steps:,} steps",
            "raise record_every, or make fewer steps",
        )
        rate = check_learning_rate(learning_rate, self.steps)
        # Arrays, so that another rate or number meets the same compiled program.
        self.learning_rate = rate if callable(rate) else jnp.asarray(rate, jnp.result_type(float))
        self.done = jnp.asarray(done)
        self.total = jnp.asarray(self.steps if total is None else total)

    @property
    def recorded(self) -> np.ndarray:
        """Numbers of the recorded steps, from 0 to the last."""
        return recorded_steps(self.steps, self.record_every)

    @property
    def times(self) -> Array:
        """The running sum of the learning rate at the recorded steps."""
        return times_of_steps(self.learning_rate, self.recorded)

    def bytes_of_record(self, measure: Callable[..., PyTree], state: PyTree, outputs: bool) -> int:
        """Bytes of all that ``measure(state, outputs)`` returns at the recorded steps."""
        n_recorded = -(-self.steps // self.record_every) + 1
        return compiled.bytes_of_record(n_recorded, measure, state, outputs)

    def rate(self, k: Array | int) -> ScalarLike:
        """Learning rate of step k."""
        if not callable(self.learning_rate):
            return self.learning_rate
        # As optimizers count, in 32 bits: schedules divide by it, and so round in its precision.
        return self.learning_rate(jnp.asarray(k, jnp.int32))

    def number(self, k: Array | int) -> Array:
        """Number of step k among all steps, which decides its random draws."""
        return self.done + k

    def tell(self, listener: Array, k: Array | int) -> None:
        """Tell the listener of progress, from inside compiled code, that step k begins."""
        due = k % max(self.record_every, self.steps // 100) < self.record_every
        share = self.number(k) / self.total
        lax.cond(due, lambda: progress.report(listener, share), lambda: None)

    def walk(
        self,
        step: Callable[[Array, PyTree], PyTree],
        measure: Callable[[PyTree], PyTree],
        state: PyTree,
        listener: Listener,
    ) -> PyTree:
        """Measurements of the recorded states, stacked along a leading axis.

        ``step(k, state)`` is the state after step k. A ``listener`` is told of progress.
        """
        return self.walk_to_end(step, measure, state, listener)[1]

    def walk_to_end(
        self,
        step: Callable[[Array, PyTree], PyTree],
        measure: Callable[[PyTree], PyTree],
        state: PyTree,
        listener: Listener,
        step_and_measure: Callable[[Array | int, PyTree], tuple[PyTree, PyTree]] | None = None,
    ) -> tuple[PyTree, PyTree]:
        """The state after the last step, and the measurements.

        ``step_and_measure(k, state)`` is the state after step k and the measurement before it, for
        steps that find on the way what is measured.
        """
        steps, record_every = self.steps, self.record_every

        def proceed(state: PyTree, start: Array | int, count: int) -> PyTree:
            if not count:
                return state  # A loop of no steps is compiled like any other.
            # A fixed count, so that reverse-mode differentiation works.
            return lax.fori_loop(0, count, lambda j, state: step(start + j, state), state)

        def record(state: PyTree, start: Array | int, count: int) -> tuple[PyTree, PyTree]:
            if step_and_measure is None:
                return proceed(state, start, count), measure(state)
            state, measured = step_and_measure(start, state)
            return proceed(state, start + 1, count - 1), measured

        def tell_and_record(state: PyTree, start: Array) -> tuple[PyTree, PyTree]:
            if listener is not None:
                self.tell(listener, start)
            return record(state, start, record_every)

        full, rest = divmod(steps, record_every)
        end, measured = lax.scan(tell_and_record, state, record_every * jnp.arange(full))
        ends = []
        if rest:
            end, last = record(end, full * record_every, rest)
            ends.append(last)
        ends.append(measure(end))
        return end, jax.tree.map(
            lambda path, *last: jnp.concatenate([path, jnp.stack(last)]), measured, *ends
        )


def recorded_steps(steps: int, record_every: int) -> np.ndarray:
    """Numbers of the recorded steps: 0, every ``record_every``-th, and the last of ``steps``.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.trajectory.recorded_steps(7, 3).tolist()
    [0, 3, 6, 7]
    """
    steps, record_every = validate.count(steps=steps), validate.count(record_every=record_every)
    return np.append(np.arange(0, steps, record_every), steps)


def times_of_steps(learning_rate: LearningRate, recorded: np.ndarray) -> Array:
    """The running sum of ``learning_rate``, a number or a schedule, at the ``recorded`` steps.

    Examples
    --------
    >>> import numpy as np, ntkdp
    >>> ntkdp.trajectory.times_of_steps(0.5, np.array([0, 2, 4])).tolist()
    [0.0, 1.0, 2.0]
    """
    if not callable(learning_rate):
        dtype = jnp.result_type(float)
        return jnp.asarray(recorded, dtype) * jnp.asarray(learning_rate, dtype)
    rates = cast(Array, jax.vmap(learning_rate)(jnp.arange(recorded[-1])))
    elapsed = jnp.concatenate([jnp.zeros(1, rates.dtype), jnp.cumsum(rates)])
    return elapsed[recorded]


def check_learning_rate(learning_rate: LearningRate, steps: int) -> LearningRate:
    """``learning_rate`` if it is positive, or a schedule that is at every one of ``steps`` steps.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.trajectory.check_learning_rate(0.5, 10)
    0.5
    """
    if not callable(learning_rate):
        rate: ScalarLike = validate.positive(learning_rate=learning_rate)
        return rate
    rates = cast(Array, jax.vmap(learning_rate)(jnp.arange(steps)))
    if getattr(rates, "shape", None) != (steps,):
        raise ValueError(
            "learning_rate must be a schedule that maps a step to one number, got "
            f"{'None' if rates is None else rates} for {steps} steps"
        )
    if not is_traced(rates) and not bool(jnp.all(jnp.isfinite(rates) & (rates >= 0))):
        raise ValueError(
            f"learning_rate must be a schedule of finite values of at least 0, "
            f"got {float(rates[jnp.argmin(jnp.where(jnp.isfinite(rates), rates, -jnp.inf))])}"
        )
    return learning_rate
