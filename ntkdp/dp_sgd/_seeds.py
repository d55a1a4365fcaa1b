"""The loop of DP-SGD, compiled, with what it records."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ntkdp import clipping
from ntkdp._backend import program_memory
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Key, Params, PRNGKeyArray
from ntkdp.dp_sgd._algorithm import Algorithm, State
from ntkdp.trajectory import Measurement, Stepping


def trained(
    algorithm: Algorithm,
    params: Params,
    per_seed: bool,
    keys: Key[Array, "*seeds"],
    stepping: Stepping,
    outputs: bool,
    listener: Listener,
) -> tuple[Params, Measurement]:
    """The same as :func:`run`, if there is room for it."""
    of_one = jax.tree.map(lambda leaf: leaf[0], params) if per_seed else params

    def measure(params: Params, outputs: bool) -> list[Array]:
        data = (algorithm.x, algorithm.test_x)
        return [algorithm.apply_fn(params, x) for x in data if x is not None]

    found: tuple[Params, Measurement] = program_memory.call(
        run, algorithm, params, per_seed, keys, stepping, outputs, listener,
        what=f"training {keys.size:,} runs of {stepping.steps:,} steps",
        ways_out="train fewer runs at a time (keys), set a microbatch_size, record fewer steps or "
        "without outputs, or use float32",
        results=stepping.bytes_of_record(measure, of_one, outputs),
        work=program_memory.bytes_of(of_one), n_runs=keys.size,
    )  # fmt: skip
    return found


@eqx.filter_jit
def run(
    algorithm: Algorithm,
    params: Params,
    per_seed: bool,
    keys: Key[Array, "*seeds"],
    stepping: Stepping,
    outputs: bool,
    listener: Listener,
) -> tuple[Params, Measurement]:
    """Parameters at the end and what was measured, from parameters of all seeds or of each."""
    full_batch = algorithm.sample_rate >= 1
    record_every = stepping.record_every

    def observe(params: Params) -> tuple[Array, Array]:
        _, train, _, factors, _ = algorithm._clipped_sum(params, None)
        return train, clipping.clip_fraction(factors)

    def one_run(key: PRNGKeyArray, params: Params) -> tuple[Params, Measurement]:
        def key_of(step: Any) -> PRNGKeyArray:
            return jax.random.fold_in(key, stepping.number(step))

        def proceed(state: State, start: Any, count: int) -> State:
            if not count:
                return state  # A loop of no steps is compiled like any other.

            # A fixed count, so that reverse-mode differentiation works.
            def step(j: Any, state: State) -> State:
                return algorithm.step(key_of(start + j), state)[0]

            return lax.fori_loop(0, count, step, state)

        def record(state: State, start: Any, count: int) -> tuple[State, Measurement]:
            params = state.params
            if not full_batch:
                measured = algorithm.measure(params, *observe(params), outputs)
                return proceed(state, start, count), measured
            # The step computes the outputs of all samples anyway.
            state, info, train, _ = algorithm._step(key_of(start), state)
            measured = algorithm.measure(params, train, info.clip_fraction, outputs)
            return proceed(state, start + 1, count - 1), measured

        def record_and_tell(state: State, start: Array) -> tuple[State, Measurement]:
            if listener is not None:
                stepping.tell(listener, start)
            return record(state, start, record_every)

        full, rest = divmod(stepping.steps, record_every)
        state = algorithm.start(params)
        state, measured = lax.scan(record_and_tell, state, record_every * jnp.arange(full))
        ends = []
        if rest:
            state, one = record(state, full * record_every, rest)
            ends.append(one)
        ends.append(algorithm.measure(state.params, *observe(state.params), outputs))
        return state.params, jax.tree.map(
            lambda path, *one: jnp.concatenate([path, jnp.stack(one)]), measured, *ends
        )

    if keys.ndim == 0:
        return one_run(keys, params)
    return jax.vmap(one_run, in_axes=(0, 0 if per_seed else None))(keys, params)
