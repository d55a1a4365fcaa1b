"""A rule whose clipping norm has moved."""

from typing import ClassVar, final

import equinox as eqx
import jax.numpy as jnp

from ntkdp._backend.types import Array, Float
from ntkdp.clipping._rule import ByGroup, ClippingRule, Scope, over_samples


@final
class Rescaled(ClippingRule):
    r"""The factors of a rule at another clipping norm, :math:`w(s R_0/R)`.

    All that a rule compares norms with moves in proportion to R: Z of `Global`, gamma of
    `Automatic`, r of `PSAC`, the norms that a function of the user's own is given.
    """

    rule: ClippingRule
    R: ByGroup
    scope: Scope = eqx.field(static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        own = over_samples(self.rule.R, s)
        # In this order a quotient beyond the range is infinite, and such a sample is left out.
        # R is zero if it is below the range of the dtype.
        return self.rule._weight(jnp.where(s > 0, s / R * own, s), own)


def rescaled(rule: ClippingRule, clip_norm: Float[Array, " R"]) -> ClippingRule:
    """``rule``, which bounds each sample, at the clipping norms of its groups; flat has one."""
    return Rescaled(rule, clip_norm if rule.scope == "layerwise" else clip_norm[0], rule.scope)
