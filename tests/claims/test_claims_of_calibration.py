"""The claims about calibration hold, and fail for implementations that are wrong on purpose."""

from typing import Any

import jax.numpy as jnp
import pytest

from ntkdp import calibration, claims, clipping
from ntkdp.calibration import _bins


def failing(name: str) -> list[str]:
    return [finding.quantity for finding in claims.verify(name).findings if not finding.holds]


@pytest.mark.slow
def test_c26_fails_with_twice_the_clipping_norm(mutate: Any) -> None:
    mutate(clipping.Abadi, "_weight", lambda self, s, R: 2 * R / jnp.maximum(s, 2 * R))
    assert "p (q = 0.7, tau = 0.5, weight flow)" in failing("C26")


@pytest.mark.slow
def test_c27_fails_if_gamma_is_never_zero(mutate: Any) -> None:
    mutate(clipping.Automatic, "_weight", lambda self, s, R: R / (s + 1e-3))
    assert "slope of ln logit in ln t (AUTO-V, flow)" in failing("C27")


@pytest.mark.slow
def test_c28_fails_with_bins_closed_below(mutate: Any) -> None:
    def closed_below(confidence: Any, n_bins: int, binning: str) -> Any:
        edges = jnp.linspace(0.0, 1.0, n_bins + 1)
        return edges, jnp.searchsorted(edges[1:-1], confidence, side="right")

    mutate(_bins, "binned", closed_below)
    assert "ECE by hand (three)" in failing("C28")


@pytest.mark.slow
def test_c28_fails_if_the_temperature_multiplies(mutate: Any) -> None:
    mutate(calibration.Temperature, "__call__", lambda self, logits: logits * self.temperature)
    assert "held-out NLL (digits)" in failing("C28")


@pytest.mark.slow
def test_c29_fails_if_the_norm_enters_beside_the_gradient(mutate: Any) -> None:
    mutate(clipping.Abadi, "_weight", lambda self, s, R: R / (s + R))
    assert "difference along anti-diagonals (recursion, flat)" in failing("C29")
