"""Epsilon, delta and the noise multiplier of DP-SGD, one from the others."""

from collections.abc import Iterable
from typing import Any

from ntkdp._backend import validate
from ntkdp._backend.schedules import Schedule, is_schedule
from ntkdp._backend.types import ScalarLike
from ntkdp.privacy import _bounds
from ntkdp.privacy._arguments import (
    ACCOUNTANTS,
    Accountant,
    Sampling,
    checked_mechanism,
    number,
    probability,
)
from ntkdp.privacy._mechanism import Mechanism
from ntkdp.privacy._schedules import numbers_of, pieces


def epsilon(
    noise_multiplier: float | Schedule,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    *,
    sampling: Sampling = "poisson",
) -> float:
    r"""Epsilon of DP-SGD at a given delta: an upper bound.

    Parameters
    ----------
    noise_multiplier : float, callable or array
        :math:`\sigma \ge 0`: standard deviation of the summed gradient's noise over the
        sensitivity. Zero gives infinity. A function of the step, or an array with a number for each
        step, is composed: with full batches :math:`\mu^2 = \sum_k \sigma_k^{-2}`, with sampling
        as by :func:`composed_epsilon`, where more than 64 different numbers are rounded down to 64.
    sample_rate : float
        q in (0, 1]: 1 for full batches, below it the share of the samples in a batch.
    steps : int
        At least 1.
    delta : float
        In (0, 1).
    accountant : {"pld", "rdp"}
    sampling : {"poisson", "fixed_size"}
        Each sample with probability q, and neighbours by adding or removing one; or q n of the n
        samples without replacement, and neighbours by replacing one.

    Returns
    -------
    float
        It falls as :math:`\sigma` or delta grows, and grows with q and steps, to 1e-9 of itself.
        ``"pld"`` is within about 0.1% of the figure of a finer grid, from above, or a few per cent
        if epsilon is due to draws far rarer than delta. It is never above ``"rdp"``, nor above full
        batches, and beyond a million it is the bound of ``"rdp"``. The rounding error of sums and
        transforms is taken off delta.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Notes
    -----
    Doroshenko et al. 2207.04380 (PLD), Mironov et al. 1908.10530 (RDP). One epoch is 1/q steps.
    Batches of a fixed size: Dong, Roth, Su 1905.02383, section 4, with the Gaussian mechanism of
    :math:`\mu = 2/\sigma`, since a sum moves by twice the sensitivity. For one step no
    smaller epsilon holds. For many steps it is an upper bound: in the example it is at most 1.29
    times too high, and below the bound of Wang, Balle, Kasiviswanathan 1808.00087, which is 5.24.

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.epsilon(1.1, 256 / 60000, 14063, 1e-5), 2)
    2.38
    >>> round(ntkdp.privacy.epsilon(1.1, 256 / 60000, 14063, 1e-5, accountant="rdp"), 3)
    2.597
    >>> round(ntkdp.privacy.epsilon(2.2, 256 / 60000, 14063, 1e-5, sampling="fixed_size"), 2)
    3.07
    """
    delta = probability(delta=delta)
    validate.choice(ACCOUNTANTS, accountant=accountant)
    of_steps = _steps_of(noise_multiplier, sample_rate, steps, sampling)
    return _bounds.epsilon_of(of_steps, delta, accountant)


def delta(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    epsilon: float,
    accountant: Accountant = "pld",
    *,
    sampling: Sampling = "poisson",
) -> float:
    r"""Delta of DP-SGD at a given epsilon: an upper bound.

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, accountant, sampling
        As for :func:`epsilon`; without noise delta is one.
    epsilon : float
        At least 0; 0 bounds the total variation distance.

    Returns
    -------
    float
        In [0, 1], within about 1% of the figure of a finer grid, from above; like epsilon it falls
        as :math:`\sigma` grows, and grows with q and steps.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Notes
    -----
    As for :func:`epsilon`.

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.delta(1.0, 1.0, 1, 1.0), 6)
    0.126937
    """
    mechanism = checked_mechanism(noise_multiplier, sample_rate, steps, sampling)
    epsilon = number(epsilon=validate.non_negative(epsilon=epsilon))
    validate.choice(ACCOUNTANTS, accountant=accountant)
    return _bounds.delta_of(mechanism, epsilon, accountant)


def noise_multiplier(
    epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    *,
    sampling: Sampling = "poisson",
) -> float:
    r"""Noise multiplier that keeps an epsilon, never breaking it.

    Parameters
    ----------
    epsilon : float
        The budget, positive.
    sample_rate, steps, delta, accountant, sampling
        As for :func:`epsilon`.

    Returns
    -------
    float
        :math:`\sigma` with ``epsilon(sigma, ...) <= epsilon``, at most about 0.1% above the
        smallest such number; not below 1e-4, even where delta alone would do.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, or no noise keeps the budget.

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.noise_multiplier(3.0, 256 / 60000, 14063, 1e-5, "rdp"), 3)
    1.014
    """
    of_one = checked_mechanism(1.0, sample_rate, steps, sampling)
    steps = of_one.steps
    budget = number(epsilon=validate.positive(epsilon=epsilon))
    delta = probability(delta=delta)
    validate.choice(ACCOUNTANTS, accountant=accountant)

    found = _bounds.noise_for(budget, [of_one], delta, accountant)
    if found is None:
        other = ", or use accountant='pld'" if accountant == "rdp" else ""
        raise ValueError(
            f"epsilon = {budget:g} cannot be kept with delta = {delta:g} over {steps} steps: "
            f"noise_multiplier would exceed {_bounds.LARGEST_SIGMA:g}; allow a larger epsilon "
            f"or delta, or train for fewer steps{other}"
        )
    return found


def composed_epsilon(
    mechanisms: Iterable[tuple[ScalarLike | Schedule, float, int]],
    delta: float,
    accountant: Accountant = "pld",
    *,
    sampling: Sampling = "poisson",
) -> float:
    r"""Epsilon of several pieces of DP-SGD on the same data, one after another: an upper bound.

    With full batches it is exact: :math:`\mu`-GDP with :math:`\mu^2 = \sum_p K_p/\sigma_p^2`, four
    times that if a sample is replaced.

    Parameters
    ----------
    mechanisms : sequence of (noise_multiplier, sample_rate, steps)
        :math:`\sigma_p`, :math:`q_p` and :math:`K_p` of each piece, as for :func:`epsilon`, where
        :math:`\sigma_p` may be a schedule;
        ``phase.mechanism(sample_rate)`` is the triple of a :class:`ntkdp.Phase`. Their order does
        not matter.
    delta, accountant, sampling
        As for :func:`epsilon`; sampling is that of all pieces, which share a relation of
        neighbours.

    Returns
    -------
    float
        Within :func:`epsilon`'s tolerance. It falls as a piece's noise multiplier or delta grows,
        and grows with its sampling rate and steps.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, or there is no mechanism.

    Notes
    -----
    A later piece may be chosen by the outcome of an earlier one, but its noise, sampling rate and
    number of steps must be settled beforehand. PLD: Doroshenko et al. 2207.04380; RDP: Mironov et
    al. 1908.10530; Gaussian: Dong, Roth, Su 1905.02383.

    Examples
    --------
    >>> import ntkdp
    >>> probing, tuning = (20.0, 1.0, 100), (40.0, 1.0, 1200)
    >>> round(ntkdp.privacy.composed_epsilon([probing, tuning], 1e-5), 3)
    4.377
    """
    if not isinstance(mechanisms, Iterable):
        raise TypeError(
            "mechanisms must be a sequence of (noise_multiplier, sample_rate, steps), "
            f"got {mechanisms!r}"
        )
    found: list[Mechanism] = []
    for piece in mechanisms:
        if not isinstance(piece, tuple | list) or len(piece) != 3:
            raise ValueError(
                "mechanisms must hold (noise_multiplier, sample_rate, steps) of each piece, "
                f"got {piece!r}"
            )
        found += _steps_of(*piece, sampling)
    if not found:
        raise ValueError("mechanisms must hold at least one piece, got none")
    delta = probability(delta=delta)
    validate.choice(ACCOUNTANTS, accountant=accountant)
    return _bounds.epsilon_of(found, delta, accountant)


def _steps_of(
    noise_multiplier: Any, sample_rate: Any, steps: Any, sampling: Any
) -> list[Mechanism]:
    """The mechanisms of steps whose noise multiplier may change."""
    if not is_schedule(noise_multiplier):
        return [checked_mechanism(noise_multiplier, sample_rate, steps, sampling)]
    of_one = checked_mechanism(1.0, sample_rate, steps, sampling)
    sigmas = numbers_of(of_one.steps, noise_multiplier=noise_multiplier)
    return pieces(sigmas, of_one.q, sampling)
