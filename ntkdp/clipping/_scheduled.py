"""A clipping norm that is set for each step beforehand."""

from typing import final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from ntkdp._backend import schedules as _schedules
from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import Array, Float, PRNGKeyArray, ScalarLike, is_traced
from ntkdp.clipping._adaptive import Adaptive, check_adaptive
from ntkdp.clipping._moving import MovingNorm
from ntkdp.clipping._rule import ClippingRule


@final
class Scheduled(MovingNorm):
    """A clipping norm by step, one number or one for each group.

    It reveals nothing of the data, so that the noise of the sum costs what it costs without it.
    """

    norms: Schedule

    @property
    def in_words(self) -> str:
        """The clipping norms of some steps, for comparisons."""
        return f"Scheduled({_schedules.in_words(self.norms)})"

    def sum_noise_multiplier(self, noise_multiplier: ScalarLike, n_groups: int = 1) -> ScalarLike:
        """The same noise multiplier."""
        return noise_multiplier

    def of_sum(self, noise_multiplier: ScalarLike, n_groups: int) -> ScalarLike:
        """The same noise multiplier."""
        return noise_multiplier

    def start(self, rule: ClippingRule, n_groups: int) -> Float[Array, " R"]:
        """The clipping norms of the first step."""
        return self.of_step(0, n_groups)

    def next(
        self,
        clip_norm: Float[Array, " R"],
        norms: Float[Array, "R n"],
        present: Bool[Array, " n"] | None = None,
        batch_size: float | None = None,
        key: PRNGKeyArray | None = None,
        number: Array | int = 0,
    ) -> Float[Array, " R"]:
        """The clipping norms of step ``number``."""
        return self.of_step(number, len(clip_norm))

    def of_step(self, number: Array | int, n_groups: int) -> Float[Array, " R"]:
        """The clipping norms of a step, one for each group; past the last one, its own."""
        norms = jnp.asarray(_schedules.at(self.norms, number), jnp.result_type(float))
        if norms.ndim > 1 or (norms.ndim == 1 and norms.size != n_groups):
            raise ValueError(
                f"clip_norm must have one number in each step, or one for each of {n_groups} "
                f"groups, got {norms.size}"
            )
        return jnp.broadcast_to(norms, (n_groups,))


def moving_norm(
    adaptive: object, clip_norm: object, rule: ClippingRule, steps: int | None
) -> MovingNorm | None:
    """How the clipping norm of the rule moves, or None if it does not.

    Raises
    ------
    ValueError, TypeError
        If it moves in two ways, the rule bounds no single sample, or a norm is not positive.
    """
    moving: Adaptive | None = check_adaptive(adaptive, rule)
    if clip_norm is None:
        return moving
    if moving is not None:
        raise ValueError(
            "clip_norm must be None with adaptive, which moves the clipping norm itself, got both"
        )
    if not rule.bounds_each_sample:
        raise ValueError(
            f"clip_norm must be None with {type(rule).__name__}, which has no norm to which each "
            "sample is clipped; take another rule, e.g. Abadi"
        )
    if not _schedules.is_schedule(clip_norm):
        raise TypeError(
            "clip_norm must be a function of the step, or an array with a number for each step, "
            f"got {clip_norm!r}; a constant one is the R of the rule"
        )
    if steps is None and callable(clip_norm):
        return Scheduled(clip_norm)
    norms = _schedules.values(steps, clip_norm=clip_norm)
    if not is_traced(norms) and not bool(jnp.all(norms > 0)):
        raise ValueError(f"clip_norm must be positive in all steps, got {float(jnp.min(norms))}")
    same = _schedules.constant(norms)
    if same is not None and not is_traced(rule.R) and np.all(same == np.asarray(rule.R)):
        return None  # The rule as it is, to the last bit.
    return Scheduled(norms)
