"""Clipping norms that move during a run: what all ways of moving share."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Bool

from ntkdp._backend.types import Array, Float, PRNGKeyArray, ScalarLike
from ntkdp.clipping._rule import ClippingRule


class MovingNorm(eqx.Module):
    """How the clipping norm moves from step to step. Subclasses are final."""

    @property
    @abstractmethod
    def in_words(self) -> str:
        """How it moves, for comparisons."""

    @abstractmethod
    def sum_noise_multiplier(self, noise_multiplier: ScalarLike, n_groups: int = 1) -> ScalarLike:
        """Noise multiplier of the summed gradient, for one of all that a step releases."""

    @abstractmethod
    def of_sum(self, noise_multiplier: ScalarLike, n_groups: int) -> ScalarLike:
        """The same, not checked."""

    def start(self, rule: ClippingRule, n_groups: int) -> Float[Array, " R"]:
        """The clipping norms of the groups before the first step: those of the rule."""
        return jnp.asarray(rule.group_norms(n_groups), jnp.result_type(float))

    @abstractmethod
    def next(
        self,
        clip_norm: Float[Array, " R"],
        norms: Float[Array, "R n"],
        present: Bool[Array, " n"] | None = None,
        batch_size: float | None = None,
        key: PRNGKeyArray | None = None,
        number: Array | int = 0,
    ) -> Float[Array, " R"]:
        """The clipping norms of step ``number``, from those before it and what was seen there."""
