"""Discrete steps, of which every so many are recorded."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import _progress, _validate
from ntkdp._types import Array, PyTree
from ntkdp.trajectory import check_learning_rate, recorded_steps, times_of_steps


class Stepping(eqx.Module):
    """How many steps, how long each is, and which are recorded; a pytree.

    Parameters
    ----------
    learning_rate : float or optax schedule
        Positive; a schedule maps the step number to it.
    steps, record_every : int
        At least 1. Every so many steps are recorded, and the last.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """

    learning_rate: Any
    steps: int = eqx.field(static=True)
    record_every: int = eqx.field(static=True)

    def __init__(self, learning_rate: Any, steps: Any, record_every: Any) -> None:
        self.steps = _validate.count(steps=steps)
        self.record_every = _validate.count(record_every=record_every)
        rate = check_learning_rate(learning_rate, self.steps)
        # An array, so that another rate meets the same compiled program.
        self.learning_rate = rate if callable(rate) else jnp.asarray(rate, jnp.result_type(float))

    @property
    def recorded(self) -> np.ndarray:
        """Numbers of the recorded steps, from 0 to the last."""
        return recorded_steps(self.steps, self.record_every)

    @property
    def times(self) -> Array:
        """The running sum of the learning rate at the recorded steps."""
        return times_of_steps(self.learning_rate, self.recorded)

    def rate(self, k: Any) -> Any:
        """Learning rate of step k."""
        return self.learning_rate(k) if callable(self.learning_rate) else self.learning_rate

    def walk(
        self,
        step: Callable[[Any, PyTree], PyTree],
        measure: Callable[[PyTree], PyTree],
        state: PyTree,
        shown: bool,
    ) -> PyTree:
        """Measurements of the recorded states, stacked along a leading axis.

        ``step(k, state)`` is the state after step k. ``shown`` tells the listener of progress.
        """
        steps, record_every = self.steps, self.record_every

        def proceed(state: PyTree, start: Any, count: int) -> PyTree:
            # A fixed count, so that reverse-mode differentiation works.
            return lax.fori_loop(0, count, lambda j, state: step(start + j, state), state)

        def record(state: PyTree, start: Array) -> tuple[PyTree, PyTree]:
            if shown:
                due = start % max(record_every, steps // 100) < record_every
                lax.cond(due, lambda: _progress.report(start / steps), lambda: None)
            return proceed(state, start, record_every), measure(state)

        full, rest = divmod(steps, record_every)
        end, measured = lax.scan(record, state, record_every * jnp.arange(full))
        ends = [measure(end)]
        if rest:
            ends.append(measure(proceed(end, full * record_every, rest)))
        return jax.tree.map(
            lambda path, *one: jnp.concatenate([path, jnp.stack(one)]), measured, *ends
        )
