r"""Sums of privacy losses over steps, on a grid: the privacy curve delta(epsilon), from above.

Each atom of a step's loss distribution is split between the two grid points around it, with the
mass under both data sets kept: the pair of distributions becomes less private (Doroshenko et al.
2207.04380). On one and the same grid what is less private stays so, so that a bound there grows
with every step, with q, and with 1/sigma.

The distribution of the sum is the inverse transform of a power. Transforms round relative to the
largest masses, and delta is about the smallest. Hence masses are multiplied by
:math:`e^{\theta l}` first, which brings those that count to the top, and characteristic functions
are computed as :math:`1 + \psi` with :math:`\psi` to relative precision: the rounding error then
does not grow with the number of steps. A bound of it is added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkdp.privacy._mechanism import Mechanism
from ntkdp.privacy._sampled_gaussian import Array

#: Rounding error of a transform relative to the largest masses, in their root mean square.
_ROUNDING = 2e-15
#: Rounding error of the transform of masses far from 0, in each step.
_ROUNDING_OF_FAR = 1e-15
#: Grid points from 0 within which characteristic functions keep their digits at small angles.
_NEAR = 256
#: Part of delta that may be left out at each place, as a logarithm.
LOG_LEFT_OUT = math.log(1e-12)
#: Grid points for which there is memory.
_LARGEST_GRID = 2**24
#: Exponents of the bounds of tails, over the tilt.
_BEYOND = np.array([0.1, 0.3, 1.0, 3.0])


@dataclass(frozen=True)
class _Step:
    """Losses of one step on the grid, in one direction: masses from a first grid point on."""

    first: int
    masses: Array
    steps: int

    def places(self) -> Array:
        return np.arange(self.first, self.first + len(self.masses))

    def log_growth(self, tilt: float) -> float:
        """Log moment of all steps' sum, at a tilt in units of the grid."""
        exponents = tilt * self.places()
        low = exponents < 1
        with np.errstate(all="ignore"):
            gain = float(self.masses[low] @ np.expm1(exponents[low]))
            high = np.exp(np.log(self.masses[~low]) + exponents[~low]) - self.masses[~low]
            return self.steps * math.log1p(gain + float(high.sum()))

    def tilted(self, tilt: float) -> Array:
        with np.errstate(divide="ignore"):
            logs = np.log(self.masses) + tilt * self.places()
        masses: Array = np.exp(logs - self.log_growth(tilt) / self.steps)
        return masses

    def log_transform(self, tilt: float, size: int) -> tuple[Array, float]:
        """Log of the characteristic function of all steps' sum, tilted, at size/2 + 1 angles.

        The second result bounds its rounding error.
        """
        tilted, zero = self.tilted(tilt), -self.first
        angles = 2 * np.pi * np.arange(size // 2 + 1) / size
        turned = -2 * np.sin(angles / 2) ** 2 - 1j * np.sin(angles)
        near = slice(max(zero - _NEAR, 0), zero + _NEAR + 1)
        psi = _excess(tilted[zero + 1 : near.stop], turned, size)
        psi += _excess(tilted[near.start : zero][::-1], turned, size).conj()
        tilted[near] = 0
        psi += _excess_of_far(tilted, self.places(), size)
        rounding = _ROUNDING_OF_FAR * self.steps * float(np.linalg.norm(tilted))
        # NumPy's log1p of complex numbers loses the digits of small ones.
        with np.errstate(divide="ignore"):
            log_size = 0.5 * np.log1p(psi.real * (2 + psi.real) + psi.imag**2)
        angle = np.arctan2(psi.imag, 1 + psi.real)
        # Anything smaller is nothing after the exponential; an infinity would spoil the angle.
        return self.steps * (np.maximum(log_size, -1e3) + 1j * angle), rounding


def log_deltas(
    mechanisms: Sequence[Mechanism], interval: float, theta: float, log_delta: float
) -> Array:
    """Log of delta at epsilon of 0 and the multiples of an interval, from above.

    ``theta`` and ``log_delta`` are guesses of minus the slope of log delta, and of its value, where
    the curve will be used: precision is best there, and the bound holds everywhere. A curve that
    would not fit in memory is the bound of 1 alone.
    """
    count = sum(mechanism.steps for mechanism in mechanisms)
    log_left_out = log_delta + LOG_LEFT_OUT
    directions = _steps(mechanisms, interval, log_left_out - math.log(count))
    tilt = theta * interval
    windows = [_window(steps, tilt, log_left_out) for steps in directions]
    above, below = (max(ends) for ends in zip(*windows, strict=True))
    if above + below > _LARGEST_GRID:
        return np.zeros(1)
    curves = [_log_deltas(steps, interval, tilt, above, below) for steps in directions]
    from_above: Array = np.logaddexp(np.max(curves, axis=0), log_left_out + math.log(4))
    return from_above


def _steps(
    mechanisms: Sequence[Mechanism], interval: float, log_left_out: float
) -> list[list[_Step]]:
    """Steps on the grid for removing the sample and for adding it; replacing it is one of both."""
    removed, added = [], []
    for mechanism in mechanisms:
        losses, present, absent = mechanism.atoms(log_left_out, interval)
        places, steps = losses / interval, mechanism.steps
        removed.append(_Step(*_split(places, present, interval), steps))
        added.append(_Step(*_split(-places, absent, interval), steps))
    return [removed] if all(mechanism.replaced for mechanism in mechanisms) else [removed, added]


def _split(places: Array, masses: Array, interval: float) -> tuple[int, Array]:
    """Atoms at places in units of the grid, moved to its points, which include 0."""
    below = np.floor(places)
    up = masses * (np.expm1(-interval * (places - below)) / math.expm1(-interval))
    index = below.astype(np.int64)
    first = min(int(index.min()), 0)
    size = max(int(index.max()), 0) - first + 2
    moved = np.bincount(index - first, masses - up, size)
    moved += np.bincount(index - first + 1, up, size)
    return first, moved


def _excess(masses: Array, turned: Array, size: int) -> Array:
    r""":math:`\sum_l p_l (e^{-iwl} - 1)` for masses at 1, 2, ..., to relative precision.

    With :math:`E = e^{-iw} - 1` and tails of tails T it is :math:`E (\sum_l l p_l + E \hat T)`.
    """
    from scipy import fft

    if len(masses) == 0:
        return np.zeros_like(turned)
    tails = np.cumsum(masses[::-1])[::-1]
    tails_of_tails = np.cumsum(tails[:0:-1])[::-1]
    wrapped = np.bincount(np.arange(len(tails_of_tails)) % size, tails_of_tails, size)
    excess: Array = turned * (tails.sum() + turned * fft.rfft(wrapped))
    return excess


def _excess_of_far(masses: Array, places: Array, size: int) -> Array:
    """The sum of :func:`_excess` for masses at any places, as a difference of transforms."""
    from scipy import fft

    transform = fft.rfft(np.bincount(places % size, masses, size))
    excess: Array = transform - transform[0]
    return excess


def _log_deltas(
    steps: Sequence[_Step], interval: float, tilt: float, above: int, below: int
) -> Array:
    from scipy import fft

    size = fft.next_fast_len(above + below, real=True)
    transforms, roundings = zip(*(step.log_transform(tilt, size) for step in steps), strict=True)
    masses = fft.irfft(np.exp(sum(transforms)), size)
    gains, largest_gain = _gains(masses[: size - below], interval, tilt)
    rounding = (_ROUNDING + sum(roundings)) * float(np.linalg.norm(masses)) * largest_gain
    growth = sum(step.log_growth(tilt) for step in steps)
    logs: Array = growth - tilt * np.arange(len(gains)) + np.log(np.maximum(gains, 0.0) + rounding)
    return logs


def _window(steps: Sequence[_Step], tilt: float, log_left_out: float) -> tuple[int, int]:
    """Grid points above and below 0 past which the sum has next to no mass, by Chernoff's bound.

    Transforms fold the mass above the window into it, with all of its weight.
    """
    exponents = tilt * _BEYOND
    up = np.array([sum(s.log_growth(tilt + t) for s in steps) for t in exponents])
    down = np.array([sum(s.log_growth(-t) for s in steps) for t in exponents])
    above, below = (float(np.nanmin((growth - log_left_out) / exponents)) for growth in (up, down))
    return max(math.ceil(above), 2), max(math.ceil(below), 2)


def _gains(masses: Array, interval: float, tilt: float) -> tuple[Array, float]:
    r""":math:`\sum_{l > i} p_l e^{-\theta(l-i)} (1 - e^{-(l-i)})` at all i, and a norm of weights.

    They come from two recursions with positive coefficients, so that no digits cancel.
    """
    from scipy.signal import lfilter

    first, second = math.exp(-tilt), math.exp(-tilt - interval)
    summed = lfilter([1.0], [1.0, -first], masses[::-1])
    summed = lfilter([1.0], [1.0, -second], summed)
    gains = -first * math.expm1(-interval) * np.append(summed[-2::-1], 0.0)
    theta = tilt / interval
    return gains, math.sqrt(min(1 / (2 * tilt), 1 / (4 * theta**2 * tilt)))
