"""NaN on purpose, for numbers that do not exist."""

import jax
import jax.numpy as jnp

from ntkdp._backend.types import Array


def nan_unless(present: Array, values: Array) -> Array:
    """The values that are present, and NaN in place of the others.

    With ``jax_debug_nans`` such a NaN is no error. That switch checks the results of compiled
    programs, so this function must be called outside of them.
    """
    with jax.debug_nans(False):
        return jnp.where(present, values, jnp.nan)
