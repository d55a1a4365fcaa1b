"""Strict numerics for every test: float64, and shapes checked at run time."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The tests compile far more than they compute; this takes a fifth off, and changes rounding only.
# Without XLA's fusion emitters it would be half, but lookups by short indices come out wrong.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import equinox as eqx
import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)

# The first example compiles; the same examples every time, so that a failure is one for everybody.
hypothesis.settings.register_profile("ntkdp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ntkdp")

#: Typer reads the signatures of the command line itself.
_UNCHECKED = {"__init__", "_neural_tangents", "cli"}
_PACKAGE = Path(__file__).parent.parent / "ntkdp"

install_import_hook(
    [f"ntkdp.{path.stem}" for path in _PACKAGE.iterdir() if path.stem not in _UNCHECKED],
    "strict_types.check",
)


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, str, Any], None]]:
    """Patch, with nothing compiled before or left behind."""

    def patch(owner: Any, name: str, wrong: Any) -> None:
        monkeypatch.setattr(owner, name, wrong)
        jax.clear_caches()
        eqx.clear_caches()

    yield patch
    monkeypatch.undo()
    jax.clear_caches()
    eqx.clear_caches()
