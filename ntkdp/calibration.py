r"""Calibration: do predicted probabilities come true as often as they say.

Probabilities are ``(n, K)``, rows that sum to one, or, for two classes, ``(n,)`` or ``(n, 1)``
meaning P(y = 1); labels are integers ``(n,)`` in ``0 .. K-1`` (two classes: 0 or 1, or bool). The
**top label** of a sample is the class of the largest probability, the lower one of a tie, and that
probability is its **confidence**; for P(y = 1) = p the confidence is max(p, 1 - p), never below
one half.

Bin edges are closed above, ``(lo, hi]``; the first bin also holds its lower edge, hence confidence
0. Everything measured works under ``jit``, ``vmap`` and, almost everywhere, ``grad`` with a fixed
number of bins. A probability that is outside [0, 1] by rounding alone counts as 0 or 1. One that is
further outside raises if the array is known before the program runs; inside ``jit`` it makes the
result NaN. Probabilities in half precision are measured in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import validate
from ntkdp._backend.missing import nan_unless
from ntkdp._backend.types import Array, Float
from ntkdp._probabilities import checked
from ntkdp._recalibration import (
    Platt,
    Temperature,
    fit_platt,
    fit_platt_privately,
    fit_temperature,
    fit_temperature_privately,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Bins",
    "Interval",
    "Platt",
    "Temperature",
    "bootstrap",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "fit_platt",
    "fit_platt_privately",
    "fit_temperature",
    "fit_temperature_privately",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_bins",
    "reliability_diagram",
]

Binning: TypeAlias = Literal["width", "mass"]
Norm: TypeAlias = Literal["l1", "l2", "max"]

BINNINGS = ("width", "mass")
NORMS = ("l1", "l2", "max")


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


class Interval(NamedTuple):
    """An estimate and the ends of its bootstrap interval, of :func:`bootstrap`."""

    estimate: Array
    low: Array
    high: Array


def reliability_bins(
    probs: Any, labels: Any, n_bins: int = 15, *, binning: Binning = "width"
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
        Bins of one width on [0, 1]; or bins of as equal counts as samples of one confidence, which
        share a bin, allow: bin k ends at the ceil(k n / n_bins)-th smallest confidence.

    Returns
    -------
    Bins

    Raises
    ------
    ValueError, TypeError
        Probabilities that are not in [0, 1] or do not sum to 1, NaN, labels that are no classes,
        sizes that differ, no samples, n_bins below 1, an unknown binning.

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
    n_bins, binning = _checked_binning(n_bins, binning)
    bins = _reliability_bins(*_top_label(probs, labels), n_bins, binning)
    means = [nan_unless(bins.counts > 0, mean) for mean in (bins.confidence, bins.accuracy)]
    return Bins(bins.edges, bins.counts, *means)


def expected_calibration_error(
    probs: Any,
    labels: Any,
    n_bins: int = 15,
    *,
    binning: Binning = "width",
    norm: Norm = "l1",
) -> Float[Array, ""]:
    r"""How far confidence and accuracy of the top label are apart, over bins of confidence.

    .. math::
        \mathrm{ECE} = \sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|

    with ``norm="l1"``; with ``"l2"`` the root of the same sum of squares, with ``"max"`` the
    largest gap of a bin that is not empty.

    Parameters
    ----------
    probs, labels, n_bins, binning
        As for :func:`reliability_bins`.
    norm : {"l1", "l2", "max"}

    Returns
    -------
    scalar
        In [0, 1]. Of a finite sample it is biased upward, the more the fewer samples a bin holds.

    Raises
    ------
    ValueError, TypeError
        As for :func:`reliability_bins`; an unknown norm.

    Notes
    -----
    Naeini, Cooper, Hauskrecht, *Obtaining Well Calibrated Probabilities Using Bayesian Binning*,
    2015; "l2": Kumar, Liang, Ma, *Verified Uncertainty Calibration*, 2019.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.array([0.9, 0.9, 0.9, 0.9]), jnp.array([1, 1, 0, 1])
    >>> round(ntkdp.calibration.expected_calibration_error(probs, labels).item(), 6)
    0.15
    """
    probs, labels = checked(probs, labels)
    n_bins, binning = _checked_binning(n_bins, binning)
    validate.choice(NORMS, norm=norm)
    return _calibration_error(*_top_label(probs, labels), n_bins, binning, norm)


def maximum_calibration_error(
    probs: Any, labels: Any, n_bins: int = 15, *, binning: Binning = "width"
) -> Float[Array, ""]:
    r"""The largest gap of a bin, :math:`\max_b |\mathrm{acc}_b - \mathrm{conf}_b|`, none empty.

    One sample can make it: with a few samples in some bin it is noisy and biased upward. Look at
    the counts of :func:`reliability_bins`, or use ``binning="mass"``. Arguments, errors and source
    as for :func:`expected_calibration_error`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.array([0.9, 0.9, 0.9, 0.6]), jnp.array([1, 1, 1, 0])
    >>> round(ntkdp.calibration.maximum_calibration_error(probs, labels).item(), 6)
    0.6
    """
    return expected_calibration_error(probs, labels, n_bins, binning=binning, norm="max")


def classwise_calibration_error(
    probs: Any,
    labels: Any,
    n_bins: int = 15,
    *,
    binning: Binning = "width",
    norm: Norm = "l1",
) -> Float[Array, ""]:
    r"""Mean over classes of the calibration error of each class's own probability.

    For class k the samples are binned by :math:`p_k` and its mean is held against the share of
    samples of class k. Two classes given as P(y = 1) count as two columns. Arguments and errors:
    as for :func:`expected_calibration_error`.

    Notes
    -----
    Kull et al., *Beyond Temperature Scaling*, 2019; Nixon et al., *Measuring Calibration in Deep
    Learning*, 2019.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs = jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    >>> error = ntkdp.calibration.classwise_calibration_error(probs, jnp.array([0, 1]))
    >>> round(error.item(), 6)  # (0 + 0.2 + 0.2) / 3
    0.133333
    """
    probs, labels = checked(probs, labels)
    n_bins, binning = _checked_binning(n_bins, binning)
    validate.choice(NORMS, norm=norm)
    errors = jax.vmap(lambda p, hit: _calibration_error(p, hit, n_bins, binning, norm), 1)
    return jnp.mean(errors(probs, jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)))


def brier_score(probs: Any, labels: Any) -> Float[Array, ""]:
    r"""Mean squared distance of the probabilities from the labels.

    :math:`\tfrac1n \sum_i \sum_k (p_{ik} - 1[y_i = k])^2`, in [0, 2]; for two classes half of it,
    :math:`\tfrac1n \sum_i (p_i - y_i)^2`, in [0, 1], as scikit-learn has it. Arguments and errors
    as for :func:`reliability_bins`.

    Notes
    -----
    Brier, *Verification of Forecasts Expressed in Terms of Probability*, 1950.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.calibration.brier_score(jnp.array([1.0, 0.5]), jnp.array([1, 1])).item()
    0.125
    """
    probs, labels = checked(probs, labels)
    targets = jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)
    score = jnp.mean(jnp.sum((probs - targets) ** 2, axis=1))
    return score / 2 if probs.shape[1] == 2 else score


def negative_log_likelihood(probs: Any, labels: Any) -> Float[Array, ""]:
    r"""Mean of :math:`-\ln p_{i y_i}`, in nats; infinite if a label was given no probability.

    From logits :class:`ntkdp.losses.SoftmaxCrossEntropy` and :class:`ntkdp.losses.Logistic` are
    more accurate. Arguments and errors as for :func:`reliability_bins`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> nll = ntkdp.calibration.negative_log_likelihood(jnp.array([0.5, 0.5]), jnp.array([1, 0]))
    >>> round(nll.item(), 4)
    0.6931
    """
    probs, labels = checked(probs, labels)
    return -jnp.mean(jnp.log(jnp.take_along_axis(probs, labels[:, None], axis=1)))


def bootstrap(
    metric: Callable[[Array, Array], Any],
    probs: Any,
    labels: Any,
    n_resamples: int = 1000,
    level: float = 0.95,
    *,
    key: Any,
) -> Interval:
    """Percentile interval of a metric over samples drawn again with replacement.

    Parameters
    ----------
    metric : callable
        ``metric(probs, labels)``, an array; bind its options, e.g. with ``functools.partial``.
    probs, labels : array
        As for :func:`reliability_bins`.
    n_resamples : int
    level : float
        In (0, 1]: the share of resamples that the interval spans, as much cut off at either end.
    key : PRNG key

    Returns
    -------
    Interval
        ``estimate`` is the metric of the sample itself.

    Raises
    ------
    ValueError, TypeError
        As for :func:`reliability_bins`; n_resamples below 1, a level outside (0, 1].

    Notes
    -----
    Efron, *Bootstrap Methods*, 1979. The interval tells the spread, not the bias: a calibration
    error is biased upward and is so once more in every resample, the maximum error, which is
    noisy besides, most of all. For these the estimate can lie near, or below, the lower end.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.full(100, 0.8), jnp.arange(100) % 5 > 0
    >>> interval = ntkdp.calibration.bootstrap(
    ...     ntkdp.calibration.brier_score, probs, labels, key=jax.random.key(0))
    >>> bool(interval.low < 0.16 < interval.high)
    True
    """
    if not callable(metric):
        raise TypeError(f"metric must be a function (probs, labels) -> array, got {metric!r}")
    checked(probs, labels)
    probs, labels, key = jnp.asarray(probs), jnp.asarray(labels), validate.key(key=key)
    n_resamples = validate.count(n_resamples=n_resamples)
    level = validate.scalar(level=validate.fraction(level=level))
    n = labels.shape[0]

    def resampled(key: Any) -> Array:
        drawn = jax.random.randint(key, (n,), 0, n)
        return jnp.asarray(metric(probs[drawn], labels[drawn]))

    found = lax.map(resampled, jax.random.split(key, n_resamples))
    ends = jnp.array([(1 - level) / 2, (1 + level) / 2], found.dtype)
    low, high = jnp.quantile(found, ends, axis=0)
    return Interval(jnp.asarray(metric(probs, labels)), low, high)


def reliability_diagram(
    probs: Any,
    labels: Any,
    *,
    n_bins: int = 15,
    binning: Binning = "width",
    ax: "Axes | None" = None,
) -> "Axes":
    """Accuracy of the top label over its confidence, with the gaps to the diagonal.

    A bar reaches up to the accuracy of its bin; the gap between it and the bin's mean confidence
    is hatched, in one colour where the network is over-confident and in another where it is
    under-confident. The expected calibration error and n stand in the picture.

    Parameters
    ----------
    probs, labels, n_bins, binning
        As for :func:`reliability_bins`.
    ax : Axes, optional
        Where to draw; by default on a new figure, ``.figure`` of what is returned.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError, TypeError
        As for :func:`reliability_bins`; ``ax`` is no Axes.

    Notes
    -----
    DeGroot, Fienberg, *The Comparison and Evaluation of Forecasters*, 1983; drawn as in Guo et al.,
    2017.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.array([0.9, 0.9, 0.8, 0.6]), jnp.array([1, 0, 1, 1])
    >>> ax = ntkdp.calibration.reliability_diagram(probs, labels, n_bins=10)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('confidence', 'accuracy')
    """
    from ntkdp import _reliability_plot

    bins = reliability_bins(probs, labels, n_bins, binning=binning)
    error = expected_calibration_error(probs, labels, n_bins, binning=binning)
    return _reliability_plot.draw(bins, error, ax)


def _checked_binning(n_bins: Any, binning: Any) -> tuple[int, Binning]:
    return validate.count(n_bins=n_bins), validate.choice(BINNINGS, binning=binning)


@jax.jit
def _top_label(probs: Array, labels: Array) -> tuple[Array, Array]:
    """Confidence of the top label, and one where it is right, zero where not."""
    correct = jnp.argmax(probs, axis=1).astype(labels.dtype) == labels
    return jnp.max(probs, axis=1), correct.astype(probs.dtype)


def _binned(confidence: Array, n_bins: int, binning: Binning) -> tuple[Array, Array]:
    """Edges ``(n_bins + 1,)`` and the bin of each sample."""
    if binning == "width":
        edges = jnp.asarray(np.linspace(0.0, 1.0, n_bins + 1), confidence.dtype)
    else:
        n = confidence.shape[0]
        last = [max(-(-k * n // n_bins) - 1, 0) for k in range(n_bins + 1)]
        edges = lax.stop_gradient(jnp.sort(confidence)[np.array(last)])
    return edges, jnp.searchsorted(edges[1:-1], confidence, side="left")


def _sums(confidence: Array, correct: Array, index: Array, n_bins: int) -> tuple[Array, ...]:
    """Counts, summed confidences and numbers of right ones by bin."""
    # Sums of about sqrt(n) terms, then their sums: float32 loses digits in a single long one.
    n = index.shape[0]
    parts = int(np.ceil(np.sqrt(n)))
    segment = index * parts + jnp.arange(n, dtype=index.dtype) % parts
    return tuple(
        jax.ops.segment_sum(v, segment, n_bins * parts).reshape(n_bins, parts).sum(axis=1)
        for v in (jnp.ones(n, jnp.int32), confidence, correct)
    )


@partial(jax.jit, static_argnames=("n_bins", "binning"))
def _reliability_bins(confidence: Array, correct: Array, n_bins: int, binning: Binning) -> Bins:
    """The bins, with zero as the means of empty ones."""
    edges, index = _binned(confidence, n_bins, binning)
    counts, sure, right = _sums(confidence, correct, index, n_bins)
    counted = jnp.maximum(counts, 1).astype(sure.dtype)
    return Bins(edges, counts, sure / counted, right / counted)


@partial(jax.jit, static_argnames=("n_bins", "binning", "norm"))
def _calibration_error(
    confidence: Array, correct: Array, n_bins: int, binning: Binning, norm: Norm
) -> Float[Array, ""]:
    _, index = _binned(confidence, n_bins, binning)
    counts, sure, right = _sums(confidence, correct, index, n_bins)
    counts = counts.astype(sure.dtype)
    gaps = jnp.abs(right - sure) / jnp.maximum(counts, 1)  # zero in an empty bin
    if norm == "max":
        return jnp.max(gaps)
    weights = counts / confidence.shape[0]
    if norm == "l1":
        return jnp.sum(weights * gaps)
    squares = jnp.sum(weights * gaps**2)
    # The derivative of the root is infinite at zero.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
