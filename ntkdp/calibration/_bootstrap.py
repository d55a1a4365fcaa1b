"""Intervals of calibration measures, by the bootstrap."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ntkdp._backend import validate
from ntkdp._backend.types import Array
from ntkdp.calibration._probabilities import checked

if TYPE_CHECKING:
    pass


class Interval(NamedTuple):
    """An estimate and the ends of its bootstrap interval, of :func:`bootstrap`."""

    estimate: Array
    low: Array
    high: Array


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
