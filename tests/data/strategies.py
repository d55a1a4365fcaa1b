"""Write strategies.json: sensitivities and optimal strategies as jax-privacy computes them.

It needs jax-privacy, in an environment of its own: `python tests/data/strategies.py`. It uses
nothing of ntkdp.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import matrix_factorization as mf

jax.config.update("jax_enable_x64", True)

RNG = np.random.default_rng(8)


def matrix(strategy: np.ndarray, steps: int) -> jax.Array:
    """A strategy as a matrix, of coefficients or as it is."""
    if strategy.ndim == 2:
        return jnp.asarray(strategy)
    return mf.toeplitz.materialize_lower_triangular(jnp.asarray(strategy), steps)


def cyclic(strategy: np.ndarray, steps: int, period: int) -> float:
    """Sensitivity of samples that take part in every so many steps."""
    return mf.sensitivity.fixed_epoch_sensitivity(matrix(strategy, steps), steps // period)


def once(strategy: np.ndarray, steps: int) -> float:
    """Sensitivity of samples that take part once."""
    return float(mf.sensitivity.single_participation_sensitivity(matrix(strategy, steps)))


def apart(strategy: np.ndarray, steps: int, separation: int, most: int | None) -> float:
    """Sensitivity of samples whose steps lie apart, banded or with decreasing coefficients."""
    if strategy.ndim == 1 and len(strategy) > separation:
        square = mf.toeplitz.minsep_sensitivity_squared(
            jnp.asarray(strategy), separation, most, steps
        )
        return float(jnp.sqrt(square))
    return mf.sensitivity.get_sensitivity_banded(matrix(strategy, steps), separation, most)


def sensitivities() -> list[dict[str, Any]]:
    """Twenty strategies, each with a pattern of participation."""
    found = []
    by_pattern: dict[str, Callable[..., float]] = {"once": once, "cyclic": cyclic, "apart": apart}

    def add(pattern: str, strategy: np.ndarray, steps: int, **given: int | None) -> None:
        value = by_pattern[pattern](strategy, steps, **given)
        found.append(
            {"pattern": pattern, "strategy": strategy.tolist(), "steps": steps}
            | {"given": given, "sensitivity": value}
        )

    root = np.asarray(mf.toeplitz.optimal_max_error_strategy_coefs(24))
    signs = np.array([1.0, -0.4, 0.2, -0.1])
    rounded = np.round(RNG.normal(size=(12, 12)), 3)
    dense = np.tril(rounded, -1) + np.diag(1 + np.abs(np.diagonal(rounded)))
    banded = np.triu(dense, -2)
    optimal = np.asarray(mf.dense.optimize(12, epochs=3))
    for strategy, steps in ((root, 24), (root[:4], 24), (signs, 20), (dense, 12), (banded, 12)):
        add("once", strategy, steps)
    for strategy, steps, period in (
        (root, 24, 24), (root, 24, 6), (root[:4], 24, 4), (root[:4], 24, 2), (signs, 20, 1),
        (signs, 20, 5), (dense, 12, 3), (banded, 12, 2), (banded, 12, 6), (optimal, 12, 4),
    ):  # fmt: skip
        add("cyclic", strategy, steps, period=period)
    for strategy, steps, separation, most in (
        (root, 24, 5, None), (root, 24, 5, 2), (root[:4], 24, 4, 3), (signs, 20, 4, None),
        (banded, 12, 3, 3),
    ):  # fmt: skip
        add("apart", strategy, steps, separation=separation, most=most)
    return found


def optima() -> list[dict[str, Any]]:
    """Banded Toeplitz strategies for running sums, with their mean squared error if used once."""
    found = []
    for steps, bands in ((32, 4), (100, 8), (100, 100), (256, 32)):
        coefficients = mf.toeplitz.optimize_banded_toeplitz(steps, bands)
        error = mf.toeplitz.per_query_error(strategy_coef=coefficients, n=steps)
        square = mf.toeplitz.sensitivity_squared(coefficients, steps)
        found.append(
            {"steps": steps, "bands": bands, "coefficients": np.asarray(coefficients).tolist()}
            | {"error": float(jnp.mean(error) * square)}
        )
    return found


def buffered() -> dict[str, Any]:
    """A buffered strategy of least mean squared error, for sums of 60 steps in five epochs."""
    best = mf.buffered_toeplitz.optimize(
        n=60, min_sep=12, max_participations=5, error="mean", max_buffers=3
    )
    return {
        "steps": 60,
        "period": 12,
        "decays": np.asarray(best.buf_decay).tolist(),
        "weights": np.asarray(best.output_scale).tolist(),
    }


if __name__ == "__main__":
    content = {"sensitivities": sensitivities(), "optima": optima(), "buffered": buffered()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content) + "\n")
