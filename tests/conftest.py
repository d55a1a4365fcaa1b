"""Strict numerics for every test: float64, and shapes checked at run time."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)

install_import_hook("ntkdp", "beartype.beartype")
