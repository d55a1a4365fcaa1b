"""Statistics over the seeds of repeated runs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import ArrayLike
from ntkdp.trajectory._training_set import Measurement
from ntkdp.trajectory._trajectory import Trajectory


class Band(NamedTuple):
    """Statistics over seeds, each ``(T,)``; ``quantiles`` is ``(n_levels, T)``.

    Made by :func:`ntkdp.comparison.band`.
    """

    mean: np.ndarray
    standard_deviation: np.ndarray
    standard_error: np.ndarray
    quantiles: np.ndarray


def band(values: ArrayLike, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> Band:
    r"""Mean and spread over the leading seed axis.

    Parameters
    ----------
    values : array
        ``(S, T)``, e.g. the loss of a run with S keys.
    levels : sequence of float
        Levels of the quantiles, in [0, 1].

    Returns
    -------
    Band
        The standard deviation is the unbiased one (divisor S - 1) and the standard error is it over
        :math:`\sqrt{S}`; both are NaN for a single seed.

    Raises
    ------
    ValueError
        If there is no seed axis, or a level is outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from ntkdp.comparison import band
    >>> spread = band(np.array([[1.0, 4.0], [3.0, 4.0]]))
    >>> spread.mean.tolist(), spread.standard_error.tolist()
    ([2.0, 4.0], [1.0, 0.0])
    """
    array = np.asarray(validate.real(values=values), np.float64)
    if array.ndim != 2 or array.shape[0] == 0:
        raise ValueError(f"values must have shape (S, T) with S >= 1, got {array.shape}")
    at = np.asarray(validate.real(levels=levels), np.float64)
    if not np.all((at >= 0) & (at <= 1)):
        raise ValueError(f"levels must be in [0, 1], got {levels!r}")
    n_seeds = array.shape[0]
    deviation = np.full(array.shape[1], np.nan)
    with np.errstate(invalid="ignore"):  # of runs that diverged
        if n_seeds > 1:
            deviation = np.std(array, axis=0, ddof=1)
        return Band(
            mean=np.mean(array, axis=0),
            standard_deviation=deviation,
            standard_error=deviation / np.sqrt(n_seeds),
            quantiles=np.quantile(array, at, axis=0),
        )


def mean_over_seeds(trajectory: Trajectory, name: str) -> np.ndarray | None:
    """One quantity, averaged over the seeds; None if it was not recorded."""
    value = getattr(trajectory, name)
    if value is None:
        return None
    array = np.asarray(value, np.float64)
    if name == "clip_fraction" and _is_unrecorded(array, np.asarray(trajectory.loss)):
        return None
    with np.errstate(invalid="ignore"):  # infinities of both signs: NaN
        return np.mean(array, axis=0) if trajectory.loss.ndim == 2 else array


def _is_unrecorded(clip_fraction: np.ndarray, loss: np.ndarray) -> bool:
    """Whether clip fractions are NaN throughout, though the run did not diverge."""
    return bool(np.all(np.isnan(clip_fraction)) and np.any(np.isfinite(loss)))


def last_value(trajectory: Trajectory, name: str) -> float | None:
    """The last ``name`` of a ``trajectory``, the mean over its seeds; None if it has none.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> run = ntkdp.Trajectory(jnp.arange(3.0), loss=jnp.arange(3.0), clip_fraction=jnp.zeros(3))
    >>> ntkdp.comparison.last_value(run, "loss"), ntkdp.comparison.last_value(run, "accuracy")
    (2.0, None)
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory must be a Trajectory, got {type(trajectory).__name__}")
    value = mean_over_seeds(trajectory, validate.choice(Measurement._fields, name=name))
    return None if value is None or value.ndim > 1 else float(value[-1])
