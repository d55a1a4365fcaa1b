"""What each sample adds to a step, over the sensitivity."""

import jax.numpy as jnp

from ntkdp._backend.schedules import is_schedule
from ntkdp._backend.types import Array
from ntkdp.batches import Full, Poisson
from ntkdp.clipping import Adaptive
from ntkdp.dp_sgd._algorithm import Algorithm, Info, State
from ntkdp.noise import Independent
from ntkdp.privacy import Sensitivities


def check_individual(algorithm: Algorithm) -> None:
    """Raise unless what a step costs a sample follows from the norm of its clipped gradient."""
    wrong: list[tuple[str, object]] = []
    if not isinstance(algorithm.batches, Full | Poisson):
        wrong.append(("batches must be full ones or Poisson sampling", algorithm.batches))
    if not isinstance(algorithm.noise, Independent):
        wrong.append(("noise must be independent", type(algorithm.noise).__name__))
    if not algorithm.clipping.bounds_each_sample:
        rule = type(algorithm.clipping).__name__
        wrong.append(("clipping must bound each sample, e.g. Abadi,", rule))
    if algorithm.moving is not None:
        name = "adaptive" if isinstance(algorithm.moving, Adaptive) else "clip_norm"
        wrong.append((f"{name} must be None", algorithm.moving.in_words))
    if is_schedule(algorithm.noise_multiplier):
        wrong.append(("noise_multiplier must be one number", "a schedule"))
    for name in ("zeroth_order", "sharpness_aware"):
        if getattr(algorithm, name) is not None:
            wrong.append((f"{name} must be None", getattr(algorithm, name)))
    for needed, found in wrong:
        raise ValueError(f"{needed} with individual=True, got {found}")


def start_of_record(algorithm: Algorithm) -> Sensitivities:
    """The record before the first step."""
    return Sensitivities.start(algorithm.x.shape[0], jnp.result_type(float))


def sensitivities(algorithm: Algorithm, state: State, info: Info) -> tuple[Array, Array]:
    """What each sample adds to a step, or would if it were drawn, over the sensitivity ``(n,)``.

    The second result is the share of its groups that are clipped.
    """
    norms = info.norms
    if not algorithm.batches.takes_all:
        # Whether it is drawn or not: the coin is part of the mechanism.
        _, _, norms, _, _ = algorithm.clipped_sum(state.params, None)
    rule, by_group = algorithm.clipping, jnp.atleast_2d(norms)
    clipped = jnp.mean(rule.by_group(by_group) < 1, axis=0)
    return rule.shares(by_group, algorithm.noise_per_group), clipped
