"""How far a sample moves the steps of a run, seen through a strategy."""

import numpy as np

from ntkdp._backend.types import Float
from ntkdp.batches import Batches, Cyclic, Full, Shuffled


def of_batches(strategy: Float[np.ndarray, "T T"], batches: Batches) -> float:
    """Sensitivity under the steps in which a sample may take part."""
    steps = len(strategy)
    if isinstance(batches, Full):
        return _every(strategy, 1)
    if isinstance(batches, Cyclic):
        return _every(strategy, min(batches.n_batches, steps))
    if isinstance(batches, Shuffled):
        return _once_in_each(strategy, min(batches.n_batches, steps))
    raise ValueError(
        "batches must be Full, Cyclic or Shuffled, of which it is certain when a sample takes "
        f"part, got {batches!r}; independent noise has an accountant for the others"
    )


def _every(strategy: Float[np.ndarray, "T T"], period: int) -> float:
    """A sample takes part in every so many steps; the worst first step."""
    sums = []
    for first in range(period):
        columns = strategy[:, first::period]
        sums.append(np.abs(columns.T @ columns).sum())
    return float(np.sqrt(max(sums)))


def _once_in_each(strategy: Float[np.ndarray, "T T"], period: int) -> float:
    """A sample takes part once in each epoch, at any step of it: an upper bound."""
    inner = np.abs(strategy.T @ strategy)
    starts = np.arange(0, len(strategy), period)
    largest = np.maximum.reduceat(np.maximum.reduceat(inner, starts, axis=0), starts, axis=1)
    # In one epoch it takes part once, which is a column with itself.
    within = np.maximum.reduceat(np.diagonal(inner), starts)
    np.fill_diagonal(largest, within)
    return float(np.sqrt(largest.sum()))


def with_separation(
    strategy: Float[np.ndarray, "T T"], separation: int, participations: int | None = None
) -> float:
    """A sample takes part at most so often, with so many steps from one time to the next."""
    steps = len(strategy)
    most = -(-steps // separation)
    most = most if participations is None else min(participations, most)
    inner = strategy.T @ strategy
    bands = _bands(strategy)
    if bands <= separation:
        return float(np.sqrt(_largest_sum(np.diagonal(inner), separation, most)))
    if _is_decreasing_toeplitz(strategy):
        chosen = np.arange(most) * separation
        return float(np.sqrt(inner[np.ix_(chosen, chosen)].sum()))
    raise ValueError(
        f"the sensitivity of a strategy with {bands} bands is known for samples that take part "
        f"at most every {bands} steps, or if it is Toeplitz with coefficients that are positive "
        f"and do not grow; got separation={separation}"
    )


def _bands(strategy: Float[np.ndarray, "T T"]) -> int:
    rows, columns = np.nonzero(strategy)
    return int((rows - columns).max()) + 1


def _largest_sum(values: np.ndarray, separation: int, most: int) -> float:
    """The largest sum of so many entries that lie so far apart, entry by entry."""
    # best[k]: with k entries among those so far; a window of the last ones is kept.
    best = np.zeros((len(values) + 1, most + 1))
    for i, value in enumerate(values):
        before = best[max(i + 1 - separation, 0)]
        best[i + 1] = best[i]
        best[i + 1, 1:] = np.maximum(best[i, 1:], before[:-1] + value)
    return float(best[-1, -1])


def _is_decreasing_toeplitz(strategy: Float[np.ndarray, "T T"]) -> bool:
    from scipy.linalg import toeplitz

    first = strategy[:, 0]
    is_toeplitz = np.array_equal(np.tril(toeplitz(first)), strategy)
    return is_toeplitz and bool(np.all(first >= 0) and np.all(np.diff(first) <= 0))
