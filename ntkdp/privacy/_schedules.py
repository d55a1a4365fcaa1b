"""Steps whose noise differs, as accounting sees them."""

import math
from collections.abc import Sequence

import numpy as np

from ntkdp._backend import schedules, validate
from ntkdp._backend.schedules import Schedule
from ntkdp._backend.types import Float
from ntkdp.batches import Batches, Cyclic, Shuffled
from ntkdp.privacy import _bounds
from ntkdp.privacy._arguments import Sampling, checked_mechanism
from ntkdp.privacy._central_limit import mu_of_step
from ntkdp.privacy._mechanism import Mechanism

#: The most noise multipliers that are told apart with sampling; more are rounded down to so many.
_MOST = 64


def numbers_of(steps: int, **named: Schedule) -> Float[np.ndarray, " T"]:
    """The numbers of all steps, at least 0."""
    ((name, _),) = named.items()
    found = np.asarray(schedules.values(validate.count(steps=steps), **named), np.float64)
    if found.ndim > 1:
        raise ValueError(f"{name} must be one number in each step, got an array {found.shape}")
    return found


def pieces(sigmas: Float[np.ndarray, " T"], q: float, sampling: Sampling) -> list[Mechanism]:
    """The steps as mechanisms, each noise multiplier once, at most as large as it is."""
    values, counts = np.unique(sigmas, return_counts=True)
    if len(values) > _MOST and values[0] > 0 and q < 1:
        rounded = np.geomspace(values[0], values[-1], _MOST)
        # Never up: rounding may leave the last one above the largest number.
        below = np.maximum(np.searchsorted(rounded, values, side="right") - 1, 0)
        sums = np.bincount(below, weights=counts, minlength=_MOST)
        values, counts = np.minimum(rounded, values[-1]), sums
    return [
        checked_mechanism(float(sigma), q, int(count), sampling)
        for sigma, count in zip(values, counts, strict=True)
        if count
    ]


def sensitivity(relative: Float[np.ndarray, " T"], batches: Batches) -> float:
    """The most that a sample moves a run whose noise has these multipliers, over that noise.

    It takes part in every step, in every so many, or, of shuffled batches, in the step of each
    epoch that has least noise, which is an upper bound.
    """
    with np.errstate(divide="ignore"):
        squares = 1 / relative**2
    if isinstance(batches, Shuffled):
        ends = range(0, len(squares), batches.n_batches)
        return math.sqrt(sum(squares[first : first + batches.n_batches].max() for first in ends))
    period = min(batches.n_batches, len(squares)) if isinstance(batches, Cyclic) else 1
    return math.sqrt(max(squares[first::period].sum() for first in range(period)))


def scale_for_mu(mu: float, of_one: Sequence[Mechanism]) -> float | None:
    """What all noise multipliers are multiplied by, so that steps are worth mu together."""

    def together(scale: float) -> float:
        of_steps = (
            math.sqrt(m.steps) * mu_of_step(m._replace(sigma=scale * m.sigma)) for m in of_one
        )
        return math.hypot(*of_steps)

    return _bounds.least_sigma(together, mu, 1.0)
