"""Numbers that there are none of, shown as NaN on purpose."""

import jax
import jax.numpy as jnp

from ntkdp._backend.types import Array


def nan_unless(present: Array, values: Array) -> Array:
    """The values that are present, and NaN for the others.

    NaN that is meant is no error where ``jax_debug_nans`` looks for errors. It looks at what a
    compiled program returns, so this must be called outside of one to be let through.
    """
    with jax.debug_nans(False):
        return jnp.where(present, values, jnp.nan)
