"""Strict numerics for every test: float64, and shapes checked at run time."""

from pathlib import Path

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)

#: Typer reads the signatures of the command line itself.
_UNCHECKED = {"__init__", "_neural_tangents", "cli"}
_PACKAGE = Path(__file__).parent.parent / "ntkdp"

install_import_hook(
    [f"ntkdp.{path.stem}" for path in _PACKAGE.glob("*.py") if path.stem not in _UNCHECKED],
    "strict_types.check",
)
