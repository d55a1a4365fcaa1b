"""Pictures of what limits training, looked at as numbers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ntkdp import plotting
from ntkdp.advisor import StepTerms

TIMES = np.array([0.0, 1.0, 2.0])
TERMS = StepTerms(
    jnp.array([2.0, 1.0, -0.5]),
    jnp.array([1.0, 0.5, 0.25]),
    jnp.zeros(3),
    jnp.array([3.0, 3.0, 3.0]),
    "mean",
)


def test_gains_losses_and_rates_are_drawn() -> None:
    upper, lower = plotting.step_terms(TERMS, TIMES, learning_rate=0.1)
    lines: Any = {line.get_label(): line for line in (*upper.lines, *lower.lines)}
    drawn = {name: np.asarray(line.get_ydata()) for name, line in lines.items()}
    # A step that adds to the loss is a gap on a logarithmic axis.
    np.testing.assert_allclose(drawn["descent"], [0.2, 0.1, np.nan])
    np.testing.assert_allclose(drawn["curvature"], 0.005 * np.array([1.0, 0.5, 0.25]))
    np.testing.assert_allclose(drawn["privacy"], 0.015)
    np.testing.assert_allclose(drawn["all against it"], 0.005 * np.array([4.0, 3.5, 3.25]))
    np.testing.assert_allclose(drawn["best for a step"], [0.5, 1 / 3.5, np.nan])
    np.testing.assert_allclose(drawn["used, 0.1"], 0.1)
    assert "sampling" not in drawn


@pytest.mark.parametrize(
    ("times", "rate", "words"),
    [
        (TIMES[:2], 0.1, r"terms must have shape \(2,\) as times"),
        (TIMES[::-1], 0.1, "times must be strictly increasing"),
        (TIMES, 0.0, "learning_rate must be positive"),
    ],
)
def test_bad_input(times: Any, rate: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plotting.step_terms(TERMS, times, learning_rate=rate)
