"""Results under JAX's strict promotion of dtypes are those without it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkdp

FLOW = ntkdp.KernelFlow(
    jnp.eye(4), jnp.zeros((4, 1)), ntkdp.losses.SquaredError(), ntkdp.clipping.Abadi(1.0)
)
START = jnp.full((4, 1), 2.0)

CALLS: dict[str, Callable[[], Any]] = {
    "reliability_bins": lambda: ntkdp.calibration.reliability_bins(
        jnp.array([0.9, 0.8, 0.3]), jnp.array([1, 0, 0])
    ),
    "times_of_steps": lambda: ntkdp.trajectory.times_of_steps(0.3, np.arange(4)),
    "recursion": lambda: ntkdp.recursion(FLOW, START, learning_rate=0.1, steps=2).loss,
}


@pytest.mark.parametrize("name", CALLS)
def test_strict_promotion_changes_nothing(name: str) -> None:
    expected = CALLS[name]()
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"):
        found = CALLS[name]()
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
