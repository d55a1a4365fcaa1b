"""Banded Toeplitz strategies of least error at equal privacy."""

import numpy as np

from ntkdp._backend.types import Float
from ntkdp.batches import Batches, Cyclic, Shuffled
from ntkdp.noise import _sensitivity
from ntkdp.noise._workload import Workload

#: The minimum is sought from the best of the roots of these decays: 0 is independent noise, and 1
#: the square root of sums. So it is never worse than any of them.
_DECAYS = (0.0, 0.5, 0.9, 0.99, 1.0)
#: What stands for the logarithm of an error that overflows.
_OVERFLOW = 1e4


def root(decay: float, n_bands: int) -> Float[np.ndarray, " b"]:
    r"""The first coefficients of :math:`(1 - a z)^{-1/2}`."""
    k = np.arange(1, n_bands)
    coefficients: np.ndarray = np.cumprod(np.append(1.0, decay * (k - 0.5) / k))
    return coefficients


def coefficients(workload: Workload, n_bands: int, batches: Batches) -> Float[np.ndarray, " b"]:
    """Toeplitz coefficients, none of them negative, that make privacy times error least."""
    from scipy.optimize import Bounds, minimize

    _sensitivity.check(batches)
    size = min(n_bands, workload.steps)

    def objective(tail: np.ndarray) -> tuple[float, np.ndarray]:
        c = np.append(1.0, tail)
        with np.errstate(over="ignore", invalid="ignore"):
            error, of_error = _error(c, workload)
        if not np.isfinite(error) or not np.all(np.isfinite(of_error)):
            return _OVERFLOW, np.zeros_like(tail)
        square, of_square = squared_sensitivity(c, workload.steps, batches)
        gradient = of_error / error + of_square / square
        return float(np.log(error) + np.log(square)), gradient[1:]

    tails = [root(decay, size)[1:] for decay in _DECAYS]
    best = min(tails, key=lambda tail: objective(tail)[0])
    if size == 1:
        return np.ones(1)
    options = {"maxfun": 200, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(
        objective, best, jac=True, method="L-BFGS-B", bounds=Bounds(0.0), options=options
    )
    return np.append(1.0, found.x)


def squared_sensitivity(
    c: Float[np.ndarray, " b"], steps: int, batches: Batches
) -> tuple[float, Float[np.ndarray, " b"]]:
    """Its value for coefficients of which none is negative, and its derivatives."""
    if isinstance(batches, Shuffled):
        from scipy.linalg import toeplitz

        strategy = np.tril(toeplitz(np.pad(c, (0, steps - len(c)))))
        inner = strategy.T @ strategy
        pairs = _sensitivity.worst_pairs(inner, min(batches.n_batches, steps))
        counts = np.zeros_like(inner)
        np.add.at(counts, pairs, 1.0)
        moved_by = strategy @ counts.T
        gradient = [2 * np.trace(moved_by, -lag) for lag in range(len(c))]
        return float(np.sum(counts * inner)), np.array(gradient)
    # The first step and every one that follows it at the period: others see less of the strategy.
    takes_part = np.zeros(steps)
    takes_part[:: batches.n_batches if isinstance(batches, Cyclic) else 1] = 1.0
    moved = np.convolve(c, takes_part)[:steps]
    gradient = [2 * moved[lag:] @ takes_part[: steps - lag] for lag in range(len(c))]
    return float(moved @ moved), np.array(gradient)


def _error(c: Float[np.ndarray, " b"], workload: Workload) -> tuple[float, Float[np.ndarray, " b"]]:
    """The error of a workload at one unit of noise, and its derivatives."""
    from scipy.signal import lfilter

    left: np.ndarray = lfilter([1.0], c, workload.responses)
    twice = lfilter([1.0], c, left)
    weighted = workload.lag_weights * left
    steps = workload.steps
    gradient = [-2 * np.sum(weighted[:, lag:] * twice[:, : steps - lag]) for lag in range(len(c))]
    return float(np.sum(weighted * left)), np.array(gradient)
