"""Intervals of calibration measures, by the bootstrap."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, PRNGKeyArray
from ntkdp.calibration._probabilities import checked


class Interval(NamedTuple):
    """An estimate and the ends of its bootstrap interval. Made by :func:`bootstrap`."""

    estimate: Array
    low: Array
    high: Array


def bootstrap(
    metric: Callable[[Array, Array], Array],
    probs: ArrayLike,
    labels: ArrayLike,
    n_resamples: int = 1000,
    level: float = 0.95,
    *,
    key: PRNGKeyArray,
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
        In (0, 1]: the share of resamples that the interval spans; equal shares lie beyond its ends.
    key : PRNG key

    Returns
    -------
    Interval
        Its ``estimate`` is the metric of the sample itself.

    Raises
    ------
    ValueError, TypeError
        As for :func:`reliability_bins`; also if n_resamples is below 1 or the level is outside
        (0, 1].

    Notes
    -----
    Efron, *Bootstrap Methods*, 1979. The interval shows the spread, not the bias: a calibration
    error is biased upward, and biased once more in every resample. The maximum error, which is also
    noisy, is biased most. For these measures the estimate can lie near, or below, the lower end.

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
    all_probs, all_labels, key = jnp.asarray(probs), jnp.asarray(labels), validate.key(key=key)
    n_resamples = validate.count(n_resamples=n_resamples)
    level = validate.scalar(level=validate.fraction(level=level))
    n = all_labels.shape[0]

    def resampled(key: PRNGKeyArray) -> Array:
        drawn = jax.random.randint(key, (n,), 0, n)
        return jnp.asarray(metric(all_probs[drawn], all_labels[drawn]))

    metrics = lax.map(resampled, jax.random.split(key, n_resamples))
    ends = jnp.array([(1 - level) / 2, (1 + level) / 2], metrics.dtype)
    low, high = jnp.quantile(metrics, ends, axis=0)
    return Interval(jnp.asarray(metric(all_probs, all_labels)), low, high)
