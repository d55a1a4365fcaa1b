"""Ends of training of wide networks under noise, for many cells at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SQUARED

from ntkdp import clipping, models
from ntkdp._backend import memory
from ntkdp.stochastic_flow import TwoTimeFlow, two_time_ensemble, two_time_final_outputs

X = jax.random.normal(jax.random.key(0), (5, 4))
X_TEST, Y = X[:3] + 0.1, jnp.sin(X[:, :2])
START = (jnp.cos(X[:, :2]), jnp.cos(X_TEST[:, :2]))
MODEL = models.mlp([8], 2, activation="erf")
KEYS = jax.random.split(jax.random.key(1), 3)


def flow(rule: Any) -> TwoTimeFlow:
    return TwoTimeFlow(MODEL, X, Y, SQUARED, rule, test_x=X_TEST, test_targets=Y[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "per_group"),
    [("flat", False), ("layerwise", True)],
)
def test_a_cell_is_a_run_of_its_own(
    scope: Any, per_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise of two sizes, cells in no order, and room for two at once.
    rates, norms, sigmas = (0.1, 0.4, 0.2, 0.4, 0.2), (0.8, 0.2, 0.4, 0.8, 0.4), (4, 4, 4, 4, 0.0)
    monkeypatch.setattr(memory, "available_bytes", lambda: 400_000)
    options: Any = {
        "steps": 8, "sample_rate": 0.7, "nodes": 4, "noise_per_group": per_group, "key": KEYS,
    }  # fmt: skip
    found = two_time_final_outputs(
        flow(clipping.Abadi(1.0, scope=scope)), START, learning_rates=rates, clip_norms=norms,
        noise_multipliers=sigmas, **options,
    )  # fmt: skip
    assert found.train.shape == (5, 3, 5, 2)
    monkeypatch.undo()
    for cell in (1, 4):
        run = two_time_ensemble(
            flow(clipping.Abadi(norms[cell], scope=scope)), START, learning_rate=rates[cell],
            noise_multiplier=sigmas[cell], outputs=True, **options,
        )  # fmt: skip
        assert run.outputs is not None
        assert run.test_outputs is not None
        np.testing.assert_allclose(found.train[cell], run.outputs[:, -1], rtol=1e-9)
        assert found.test is not None
        np.testing.assert_allclose(found.test[cell], run.test_outputs[:, -1], rtol=1e-9)


def test_one_key_gives_no_axis_of_seeds() -> None:
    found = two_time_final_outputs(
        TwoTimeFlow(MODEL, X, Y, SQUARED, clipping.Abadi(1.0)), START[0], learning_rates=0.1,
        clip_norms=[0.5, 1.0], steps=3, noise_multipliers=0.5, key=KEYS[0],
    )  # fmt: skip
    assert found.train.shape == (2, 5, 2)
    assert found.test is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": clipping.NoClipping()}, ValueError, "flow must have a rule with a clipping norm"),
        ({"learning_rates": [0.1, 0.2, 0.3]}, ValueError, r"have one shape \(C,\)"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"nodes": 1}, ValueError, "nodes must be at least 2"),
        ({"sample_rate": 2.0}, ValueError, "sample_rate must be in"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, error: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "learning_rates": [0.1, 0.2], "clip_norms": [1.0, 2.0], "steps": 3, "key": KEYS,
    } | change  # fmt: skip
    rule = arguments.pop("rule", clipping.Abadi(1.0))
    with pytest.raises(error, match=message):
        two_time_final_outputs(flow(rule), START, **arguments)
