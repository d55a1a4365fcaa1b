"""The loop of DP-SGD, compiled, with what it records."""

from typing import TypeAlias

import equinox as eqx
import jax

from ntkdp import clipping
from ntkdp._backend import compiled
from ntkdp._backend.progress import Listener
from ntkdp._backend.types import Array, Key, Params, PRNGKeyArray
from ntkdp.dp_sgd._algorithm import Algorithm, State
from ntkdp.dp_sgd._individual import sensitivities, start_of_record
from ntkdp.privacy import Sensitivities
from ntkdp.trajectory import Measurement, Stepping

#: Parameters where steps begin or end, and their average if there is one.
Start: TypeAlias = tuple[Params, Params | None]
#: A state, and what samples have added to the steps before it.
_Walked: TypeAlias = tuple[State, Sensitivities | None]


def trained(
    algorithm: Algorithm,
    start: Start,
    per_seed: bool,
    keys: Key[Array, "*seeds"],
    stepping: Stepping,
    outputs: bool,
    individual: bool,
    listener: Listener,
) -> tuple[Start, Measurement, Sensitivities | None]:
    """The result of :func:`run`, or an error if there is no room for it."""
    single, _ = jax.tree.map(lambda leaf: leaf[0], start) if per_seed else start

    def measure(params: Params, outputs: bool) -> list[Array]:
        data = (algorithm.x, algorithm.test_x)
        return [algorithm.apply_fn(params, x) for x in data if x is not None]

    result: tuple[Start, Measurement, Sensitivities | None] = compiled.call(
        run, algorithm, start, per_seed, keys, stepping, outputs, individual, listener,
        what=f"training {keys.size:,} runs of {stepping.steps:,} steps",
        ways_out="train fewer runs at a time (keys), set a microbatch_size, record fewer steps or "
        "without outputs, or use float32",
        results=stepping.bytes_of_record(measure, single, outputs),
        work=compiled.bytes_of(single), n_runs=keys.size,
    )  # fmt: skip
    return result


@eqx.filter_jit
def run(
    algorithm: Algorithm,
    start: Start,
    per_seed: bool,
    keys: Key[Array, "*seeds"],
    stepping: Stepping,
    outputs: bool,
    individual: bool,
    listener: Listener,
) -> tuple[Start, Measurement, Sensitivities | None]:
    """Parameters at the end and what was measured, from parameters of all seeds or of each.

    The last part is what samples have added to the steps, if that is asked for.
    """

    def measure(walked: _Walked) -> Measurement:
        state, _ = walked
        now = algorithm.at_clip_norm(state.clip_norm)
        _, train, _, factors, _ = now.clipped_sum(state.params, None)
        return algorithm.measure(state, train, clipping.clip_fraction(factors), outputs)

    def one_run(key: PRNGKeyArray, start: Start) -> tuple[Start, Measurement, Sensitivities | None]:
        def key_of(k: Array | int) -> PRNGKeyArray:
            return jax.random.fold_in(key, stepping.number(k))

        def step(k: Array | int, walked: _Walked) -> _Walked:
            state, record = walked
            if record is None:
                return algorithm.step(key_of(k), state)[0], None
            after, info, _, _ = algorithm.step_with_outputs(key_of(k), state)
            return after, record.after(*sensitivities(algorithm, state, info))

        def step_and_measure(k: Array | int, walked: _Walked) -> tuple[_Walked, Measurement]:
            state, record = walked
            after, info, train, _ = algorithm.step_with_outputs(key_of(k), state)
            if record is not None:
                record = record.after(*sensitivities(algorithm, state, info))
            measured = algorithm.measure(state, train, info.clip_fraction, outputs)
            return (after, record), measured

        # A step by the gradient of the full batch computes the outputs of all samples anyway.
        at_weights = algorithm.zeroth_order is None and algorithm.sharpness_aware is None
        full_gradient = algorithm.batches.takes_all and at_weights
        (end, record), measured = stepping.walk_to_end(
            step,
            measure,
            (algorithm.start(*start), start_of_record(algorithm) if individual else None),
            listener,
            step_and_measure if full_gradient else None,
        )
        return (end.params, end.average), measured, record

    if keys.ndim == 0:
        return one_run(keys, start)
    return jax.vmap(one_run, in_axes=(0, 0 if per_seed else None))(keys, start)
