"""What the noise of the steps does to the numbers that matter: the rows of a workload."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike, Float, LearningRate, ScalarLike

#: A direction of the responses with less of their square than this share of the largest's is left
#: out.
_ROUNDING = 1e-14
#: Modes whose responses are computed at once.
_AT_ONCE = 64
#: Eigenvalues of a kernel above this share of the largest, downwards, are rounding.
_NEGATIVE = -1e-6


class Workload(NamedTuple):
    r"""What the noise of a step does some steps later, and how much each lag counts.

    Noise :math:`C^{-1} Z` of a Toeplitz strategy has the error
    :math:`\sum_m \sum_i v_i (r_m / c)_i^2`, where :math:`r_m / c` is a quotient of power series,
    r are the responses and v the weights of the lags.
    """

    responses: Float[np.ndarray, "m T"]
    lag_weights: Float[np.ndarray, " T"]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.lag_weights)


def of_sums(steps: int, momentum: float) -> Workload:
    """The mean square, over the steps, of all noise until then behind heavy-ball momentum."""
    response = (1 - momentum ** np.arange(1, steps + 1)) / (1 - momentum)
    return Workload(response[None], 1 - np.arange(steps) / steps)


def of_kernel(
    kernel: ArrayLike,
    weights: ArrayLike | None,
    scale: ScalarLike | None,
    learning_rate: LearningRate,
    steps: int,
    momentum: float,
) -> Workload:
    """The weighted squares, after the last step, of the modes of a kernel."""
    given = np.asarray(validate.real(kernel=kernel), np.float64)
    validate.finite(kernel=given)
    eigenvalues = _eigenvalues(given)
    counted = eigenvalues if weights is None else _checked_weights(weights, given)
    factor = 1.0 if given.ndim == 1 else 1 / len(given)
    if scale is not None:
        factor = float(validate.positive_number(scale=scale))
    rates = _learning_rates(learning_rate, steps)
    found = np.empty((0, steps))
    for first in range(0, len(eigenvalues), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        with np.errstate(over="ignore", invalid="ignore"):
            responses = _responses(factor * eigenvalues[part], rates, momentum)
            weighted = np.sqrt(counted[part])[:, None] * responses
        if not np.all(np.isfinite(weighted)):
            raise ValueError(
                "learning_rate must be stable under the kernel, whose largest eigenvalue times "
                f"scale is {factor * eigenvalues.max():g}, got {rates.max():g}"
            )
        found = _independent(np.concatenate([found, weighted]))
    if not len(found):
        raise ValueError(
            "kernel, weights and learning_rate must let noise reach the loss, got zeros"
        )
    return Workload(found, np.ones(steps))


def of_rows(rows: ArrayLike) -> Workload:
    """The sum of squares of some numbers, by what noise of each step does to them."""
    given = np.asarray(validate.real(rows=rows), np.float64)
    validate.finite(rows=given)
    if given.ndim != 2 or given.size == 0:
        raise ValueError(f"rows must have shape (m, T), one for each number, got {given.shape}")
    found = np.empty((0, given.shape[1]))
    for first in range(0, len(given), _AT_ONCE):
        found = _independent(np.concatenate([found, given[first : first + _AT_ONCE, ::-1]]))
    if not len(found):
        raise ValueError("rows must let noise reach a number, got zeros")
    return Workload(found, np.ones(given.shape[1]))


def _independent(rows: Float[np.ndarray, "m T"]) -> Float[np.ndarray, "r T"]:
    """Rows with the same products of columns, as many as there are directions in them."""
    squares, directions = np.linalg.eigh(rows @ rows.T)
    kept: np.ndarray = directions[:, squares > _ROUNDING * squares[-1]].T @ rows
    return kept


def _eigenvalues(kernel: np.ndarray) -> Float[np.ndarray, " m"]:
    """Those of a matrix or of blocks, or as they are given; none is negative."""
    shape = kernel.shape
    if kernel.ndim == 4 and shape[0] == shape[1] and shape[2] == shape[3]:
        size = shape[0] * shape[2]
        kernel = kernel.swapaxes(1, 2).reshape(size, size)
    if kernel.size == 0 or kernel.ndim not in (1, 2) or len(set(kernel.shape)) > 1:
        raise ValueError(
            "kernel must be a matrix (n, n), blocks (n, n, K, K) or eigenvalues (m,), "
            f"got shape {shape}"
        )
    eigenvalues = np.linalg.eigvalsh(kernel) if kernel.ndim == 2 else kernel
    if eigenvalues.min() < _NEGATIVE * max(eigenvalues.max(), 0.0):
        raise ValueError(
            f"kernel must have no negative eigenvalue, got {float(eigenvalues.min()):g}"
        )
    positive: np.ndarray = np.maximum(eigenvalues, 0.0)
    return positive


def _checked_weights(weights: ArrayLike, kernel: np.ndarray) -> Float[np.ndarray, " m"]:
    if kernel.ndim != 1:
        raise ValueError("weights must be None unless kernel is eigenvalues, one for each")
    checked = np.asarray(validate.non_negative(weights=validate.real(weights=weights)), np.float64)
    if checked.shape != kernel.shape:
        raise ValueError(
            f"weights must have the shape {kernel.shape} of the eigenvalues, got {checked.shape}"
        )
    return checked


def _learning_rates(learning_rate: LearningRate, steps: int) -> Float[np.ndarray, " T"]:
    if not callable(learning_rate):
        rate = validate.positive_number(learning_rate=learning_rate)
        return np.full(steps, float(rate))
    rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(steps)), np.float64)
    return np.asarray(validate.non_negative(learning_rate=rates))


def _responses(
    rates: Float[np.ndarray, " m"], learning_rates: Float[np.ndarray, " T"], momentum: float
) -> Float[np.ndarray, "m T"]:
    r"""The last f by the noise x of each step, backwards.

    A mode is :math:`v^+ = \beta v + \lambda f + x`, :math:`f^+ = f - \eta v^+`.
    """
    responses = np.empty((len(rates), len(learning_rates)))
    of_f, of_v = np.ones(len(rates)), np.zeros(len(rates))
    for lag, eta in enumerate(learning_rates[::-1]):
        of_x = of_v - eta * of_f
        responses[:, lag] = of_x
        of_f, of_v = of_f + rates * of_x, momentum * of_x
    return responses
