"""How far a sample moves the steps of a run, seen through a strategy."""

import numpy as np

from ntkdp._backend.types import Float
from ntkdp.batches import Batches, Cyclic, Full, Shuffled


def of_batches(strategy: Float[np.ndarray, "T T"], batches: Batches) -> float:
    """Sensitivity under the steps in which a sample may take part."""
    known = check(batches)
    steps = len(strategy)
    if isinstance(known, Full):
        return _every(strategy, 1)
    if isinstance(known, Cyclic):
        return _every(strategy, min(known.n_batches, steps))
    return _once_in_each(strategy, min(known.n_batches, steps))


def check(batches: Batches) -> Full | Cyclic | Shuffled:
    """The batches, if a sensitivity is known for them."""
    if isinstance(batches, Full | Cyclic | Shuffled):
        return batches
    if not isinstance(batches, Batches):
        raise TypeError(f"batches must be one of ntkdp.batches, got {type(batches).__name__}")
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
    return float(np.sqrt(inner[worst_pairs(inner, period)].sum()))


def worst_pairs(inner: Float[np.ndarray, "T T"], period: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of epochs the steps, one of each, whose columns have the largest product."""
    steps = len(inner)
    epochs = -(-steps // period)
    missing = epochs * period - steps
    padded = np.pad(inner, (0, missing), constant_values=-1.0)
    blocks = padded.reshape(epochs, period, epochs, period).swapaxes(1, 2)
    best = blocks.reshape(epochs, epochs, period**2).argmax(axis=-1)
    # In one epoch it takes part once, which is a column with itself.
    own = np.diagonal(padded).reshape(epochs, period).argmax(axis=-1)
    np.fill_diagonal(best, own * (period + 1))
    firsts = period * np.arange(epochs)
    return firsts[:, None] + best // period, firsts + best % period


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
