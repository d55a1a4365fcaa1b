"""Strict numerics for every test: float64, and shapes checked at run time."""

import os
from pathlib import Path

# The tests compile far more than they compute; this takes a fifth off, and changes rounding only.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)

# The first example compiles; the same examples every time, so that a failure is one for everybody.
hypothesis.settings.register_profile("ntkdp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ntkdp")

#: Typer reads the signatures of the command line itself.
_UNCHECKED = {"__init__", "_neural_tangents", "cli"}
_PACKAGE = Path(__file__).parent.parent / "ntkdp"

install_import_hook(
    [f"ntkdp.{path.stem}" for path in _PACKAGE.glob("*.py") if path.stem not in _UNCHECKED],
    "strict_types.check",
)
