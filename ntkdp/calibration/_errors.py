"""Errors and scores of predicted probabilities."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from ntkdp._backend import compiled, validate
from ntkdp._backend.types import Array, ArrayLike, Float
from ntkdp.calibration import _bins
from ntkdp.calibration._bins import Binning
from ntkdp.calibration._probabilities import checked

Norm: TypeAlias = Literal["l1", "l2", "max"]
NORMS = ("l1", "l2", "max")


def expected_calibration_error(
    probs: ArrayLike,
    labels: ArrayLike,
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
        In [0, 1]. It is biased upward, the more the fewer samples a bin holds.

    Raises
    ------
    ValueError, TypeError
        As for :func:`reliability_bins`; also if the norm is unknown.

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
    n_bins, binning = _bins.checked_binning(n_bins, binning)
    validate.choice(NORMS, norm=norm)
    error: Array = _calibration_error(*_bins.top_label(probs, labels), n_bins, binning, norm)
    return error


def maximum_calibration_error(
    probs: ArrayLike, labels: ArrayLike, n_bins: int = 15, *, binning: Binning = "width"
) -> Float[Array, ""]:
    r"""The largest gap of a bin with samples, :math:`\max_b |\mathrm{acc}_b - \mathrm{conf}_b|`.

    A single sample can decide it: if some bin has few samples, it is noisy and biased upward. Look
    at the counts of :func:`reliability_bins`, or use ``binning="mass"``. Arguments, errors and
    source are those of :func:`expected_calibration_error`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> probs, labels = jnp.array([0.9, 0.9, 0.9, 0.6]), jnp.array([1, 1, 1, 0])
    >>> round(ntkdp.calibration.maximum_calibration_error(probs, labels).item(), 6)
    0.6
    """
    return expected_calibration_error(probs, labels, n_bins, binning=binning, norm="max")


def classwise_calibration_error(
    probs: ArrayLike,
    labels: ArrayLike,
    n_bins: int = 15,
    *,
    binning: Binning = "width",
    norm: Norm = "l1",
) -> Float[Array, ""]:
    r"""Mean over classes of the calibration error of each class's own probability.

    For class k the samples are binned by :math:`p_k`, and its mean is compared with the share of
    samples of class k. Two classes given as P(y = 1) count as two columns. Arguments and errors are
    those of :func:`expected_calibration_error`.

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
    n_bins, binning = _bins.checked_binning(n_bins, binning)
    validate.choice(NORMS, norm=norm)

    def error(p: Array, hit: Array) -> Array:
        of_class: Array = _calibration_error(p, hit, n_bins, binning, norm)
        return of_class

    hits = jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)
    return jnp.mean(jax.vmap(error, 1)(probs, hits))


def brier_score(probs: ArrayLike, labels: ArrayLike) -> Float[Array, ""]:
    r"""Mean squared distance of the probabilities from the labels.

    :math:`\tfrac1n \sum_i \sum_k (p_{ik} - 1[y_i = k])^2`, in [0, 2]; for two classes half of it,
    :math:`\tfrac1n \sum_i (p_i - y_i)^2`, in [0, 1], as scikit-learn has it. Arguments and errors
    are those of :func:`reliability_bins`.

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


def negative_log_likelihood(probs: ArrayLike, labels: ArrayLike) -> Float[Array, ""]:
    r"""Mean of :math:`-\ln p_{i y_i}`, in nats; infinite if a label was given no probability.

    From logits :class:`ntkdp.losses.SoftmaxCrossEntropy` and :class:`ntkdp.losses.Logistic` are
    more accurate. Arguments and errors are those of :func:`reliability_bins`.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> nll = ntkdp.calibration.negative_log_likelihood(jnp.array([0.5, 0.5]), jnp.array([1, 0]))
    >>> round(nll.item(), 4)
    0.6931
    """
    probs, labels = checked(probs, labels)
    return -jnp.mean(jnp.log(jnp.take_along_axis(probs, labels[:, None], axis=1)))


@compiled.jit(static_argnames=("n_bins", "binning", "norm"))
def _calibration_error(
    confidence: Array, correct: Array, n_bins: int, binning: Binning, norm: Norm
) -> Float[Array, ""]:
    _, index = _bins.binned(confidence, n_bins, binning)
    counts, sure, right = _bins.sums(confidence, correct, index, n_bins)
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
