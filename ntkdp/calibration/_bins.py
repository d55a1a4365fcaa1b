"""Samples grouped by confidence."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import compiled, validate
from ntkdp._backend.compiled import nan_unless
from ntkdp._backend.types import Array, ArrayLike
from ntkdp.calibration._probabilities import checked

Binning: TypeAlias = Literal["width", "mass"]
BINNINGS: tuple[Binning, ...] = ("width", "mass")


class Bins(NamedTuple):
    """Samples grouped by confidence.

    ``edges`` ``(n_bins + 1,)``, ``counts`` ``(n_bins,)`` of samples, ``confidence`` ``(n_bins,)``
    their mean confidence and ``accuracy`` ``(n_bins,)`` the share of them whose top label is right,
    both NaN in an empty bin.

    Made by :func:`reliability_bins`.
    """

    edges: Array
    counts: Array
    confidence: Array
    accuracy: Array


def reliability_bins(
    probs: ArrayLike, labels: ArrayLike, n_bins: int = 15, *, binning: Binning = "width"
) -> Bins:
    """Counts, mean confidence and accuracy of samples binned by the confidence of the top label.

    Parameters
    ----------
    probs : array
        ``(n, K)``, or P(y = 1) as ``(n,)`` or ``(n, 1)``.
    labels : array of int
        ``(n,)``.
    n_bins : int
        At least 1.
    binning : {"width", "mass"}
        Bins of one width on [0, 1]; or bins of equal counts, as far as samples of one confidence
        allow, which share a bin: bin k ends at the ceil(k n / n_bins)-th smallest confidence.

    Returns
    -------
    Bins

    Raises
    ------
    ValueError, TypeError
        If probabilities are NaN, not in [0, 1] or do not sum to 1, if labels are no classes, if
        sizes differ, if there are no samples, if n_bins is below 1, or if the binning is unknown.

    Notes
    -----
    Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks*, 2017 (bins of one
    width); Nguyen, O'Connor, *Posterior Calibration and Exploratory Analysis*, 2015 (equal counts).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.array([0.9, 0.7, 0.8, 0.4]), jnp.array([1, 0, 1, 0])
    >>> bins = ntkdp.calibration.reliability_bins(probs, labels, n_bins=2, binning="mass")
    >>> bins.counts.tolist(), bins.accuracy.tolist()
    ([2, 2], [0.5, 1.0])
    """
    probs, labels = checked(probs, labels)
    n_bins, binning = checked_binning(n_bins, binning)
    bins = _reliability_bins(*top_label(probs, labels), n_bins, binning)
    means = [nan_unless(bins.counts > 0, mean) for mean in (bins.confidence, bins.accuracy)]
    return Bins(bins.edges, bins.counts, *means)


def checked_binning(n_bins: object, binning: object) -> tuple[int, Binning]:
    """Number and kind of the bins, or an error."""
    return validate.count(n_bins=n_bins), validate.choice(BINNINGS, binning=binning)


@compiled.jit()
def top_label(probs: Array, labels: Array) -> tuple[Array, Array]:
    """Confidence of the top label, and one where it is right, zero where it is not."""
    correct = jnp.argmax(probs, axis=1).astype(labels.dtype) == labels
    return jnp.max(probs, axis=1), correct.astype(probs.dtype)


def binned(confidence: Array, n_bins: int, binning: Binning) -> tuple[Array, Array]:
    """Edges ``(n_bins + 1,)`` and the bin of each sample."""
    if binning == "width":
        edges = jnp.asarray(np.linspace(0.0, 1.0, n_bins + 1), confidence.dtype)
    else:
        n = confidence.shape[0]
        last = [max(-(-k * n // n_bins) - 1, 0) for k in range(n_bins + 1)]
        edges = lax.stop_gradient(jnp.sort(confidence)[np.array(last)])
    return edges, jnp.searchsorted(edges[1:-1], confidence, side="left")


def sums(confidence: Array, correct: Array, index: Array, n_bins: int) -> tuple[Array, ...]:
    """Counts, summed confidences and numbers of right labels by bin."""
    # Sums of about sqrt(n) terms, then their sums: float32 loses digits in a single long sum.
    n = index.shape[0]
    parts = int(np.ceil(np.sqrt(n)))
    segment = index * parts + jnp.arange(n, dtype=index.dtype) % parts
    return tuple(
        jax.ops.segment_sum(v, segment, n_bins * parts).reshape(n_bins, parts).sum(axis=1)
        for v in (jnp.ones(n, jnp.int32), confidence, correct)
    )


@compiled.jit(static_argnames=("n_bins", "binning"))
def _reliability_bins(confidence: Array, correct: Array, n_bins: int, binning: Binning) -> Bins:
    """The bins; the means of empty ones are zero."""
    edges, index = binned(confidence, n_bins, binning)
    counts, sure, right = sums(confidence, correct, index, n_bins)
    counted = jnp.maximum(counts, 1).astype(sure.dtype)
    return Bins(edges, counts, sure / counted, right / counted)
