r"""Accounting: what epsilon a noise multiplier buys, and what noise an epsilon costs.

One step releases :math:`\sum_{i \in batch} C_i g_i + \sigma S z` with :math:`z \sim N(0, I)`; the
batch is the whole data set (``sample_rate=1``) or takes every sample on its own with probability
``sample_rate`` (Poisson sampling). All steps together are :math:`(\varepsilon, \delta)`-private for
data sets that differ by **adding or removing one sample**.

Epsilon does not depend on the clipping rule, its norm R or the groups: the noise is in proportion
to the sensitivity S (R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise), so :math:`\sigma` is all.
Learning rate, optimizer and reduction come after the noise and cost nothing. Where samples are
*replaced*, S doubles: with full batches halve :math:`\sigma`; with Poisson sampling use group
privacy, :math:`(2\varepsilon, (1 + e^\varepsilon)\delta)`.

==========  ==================================================================  =================
accountant  method                                                              epsilon
==========  ==================================================================  =================
``"pld"``   privacy loss distribution, exact formula for full batches (Balle    an upper bound,
            and Wang 2018), else discretised pessimistically (Doroshenko et     nearly tight
            al. 2207.04380)
``"rdp"``   Renyi divergence (Mironov 2017; sampling: Mironov, Talwar, Zhang    an upper bound
            1908.10530), made into epsilon by Google's ``dp-accounting``
==========  ==================================================================  =================

Both fall as :math:`\sigma` or delta grows, and grow with the sampling rate and the steps.
:func:`gaussian_dp` has the central limit theorem's figure, which is **not a guarantee** for sampled
batches. What differs from step to step, as in phases of
training, is counted by :func:`composed_epsilon`. A :class:`Budget` may stand where a run or a
prediction asks for :math:`\sigma`, which then follows from the number of steps.
"""

import math
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

import numpy as np

from ntkdp import _accounting
from ntkdp._backend import validate
from ntkdp._composition import composed_epsilon as composed_epsilon
from ntkdp._mechanism import ACCOUNTANTS, Accountant, number, probability
from ntkdp._mechanism import mechanism as _mechanism


def epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
) -> float:
    r"""Epsilon of DP-SGD at a given delta: an upper bound.

    Parameters
    ----------
    noise_multiplier : float
        :math:`\sigma \ge 0`: standard deviation of the summed gradient's noise over the
        sensitivity. Zero gives infinity.
    sample_rate : float
        q in (0, 1]: 1 for full batches, below it Poisson sampling.
    steps : int
        At least 1.
    delta : float
        In (0, 1).
    accountant : {"pld", "rdp"}

    Returns
    -------
    float
        For neighbours by adding or removing one sample, not for replacing it. It falls as
        :math:`\sigma` or delta grows, and grows with q and steps, to 1e-9 of itself. ``"pld"`` is
        within about 0.1% of what a finer grid would give, from above, a few per cent where epsilon
        is left to draws far rarer than delta; it is never above ``"rdp"``, nor above full batches,
        and beyond a million it is the bound of ``"rdp"``. What sums and transforms may round is
        taken off delta.

    Raises
    ------
    ValueError, TypeError
        An argument out of its range.

    Notes
    -----
    Doroshenko et al. 2207.04380 (PLD), Mironov et al. 1908.10530 (RDP). One epoch is 1/q steps.

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.epsilon(1.1, 256 / 60000, 14063, 1e-5), 2)
    2.38
    >>> round(ntkdp.privacy.epsilon(1.1, 256 / 60000, 14063, 1e-5, accountant="rdp"), 3)
    2.597
    """
    sigma, q, steps = _mechanism(noise_multiplier, sample_rate, steps)
    delta = probability(delta=delta)
    validate.choice(ACCOUNTANTS, accountant=accountant)
    return _accounting.epsilon_of(sigma, q, steps, delta, accountant)


def delta(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    epsilon: float,
    accountant: Accountant = "pld",
) -> float:
    r"""Delta of DP-SGD at a given epsilon: an upper bound.

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, accountant
        As for :func:`epsilon`; no noise gives one.
    epsilon : float
        At least 0; 0 bounds the total variation distance.

    Returns
    -------
    float
        In [0, 1], within about 1% of what a finer grid would give, from above; like epsilon it
        falls as :math:`\sigma` grows, and grows with q and steps.

    Raises
    ------
    ValueError, TypeError
        An argument out of its range.

    Notes
    -----
    Doroshenko et al. 2207.04380 (PLD), Mironov et al. 1908.10530 (RDP).

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.delta(1.0, 1.0, 1, 1.0), 6)
    0.126937
    """
    sigma, q, steps = _mechanism(noise_multiplier, sample_rate, steps)
    epsilon = number(epsilon=validate.non_negative(epsilon=epsilon))
    validate.choice(ACCOUNTANTS, accountant=accountant)
    return _accounting.delta_of(sigma, q, steps, epsilon, accountant)


def noise_multiplier(
    epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
) -> float:
    r"""Noise multiplier that keeps an epsilon, never breaking it.

    Parameters
    ----------
    epsilon : float
        The budget, positive.
    sample_rate, steps, delta, accountant
        As for :func:`epsilon`.

    Returns
    -------
    float
        :math:`\sigma` with ``epsilon(sigma, ...) <= epsilon``, at most about 0.1% above the
        smallest such number; not below 1e-4, even where delta alone would do.

    Raises
    ------
    ValueError, TypeError
        An argument out of its range, or a budget that no noise keeps.

    Examples
    --------
    >>> import ntkdp
    >>> round(ntkdp.privacy.noise_multiplier(3.0, 256 / 60000, 14063, 1e-5, "rdp"), 3)
    1.014
    """
    _, q, steps = _mechanism(1.0, sample_rate, steps)
    budget = number(epsilon=validate.positive(epsilon=epsilon))
    delta = probability(delta=delta)
    validate.choice(ACCOUNTANTS, accountant=accountant)

    found = _accounting.noise_for(budget, q, steps, delta, accountant)
    if found is None:
        other = ", or use accountant='pld'" if accountant == "rdp" else ""
        raise ValueError(
            f"epsilon = {budget:g} cannot be kept with delta = {delta:g} over {steps} steps: "
            f"noise_multiplier would exceed {_accounting.LARGEST_SIGMA:g}; allow a larger epsilon "
            f"or delta, or train for fewer steps{other}"
        )
    return found


@dataclass(frozen=True)
class Budget:
    r"""What may be spent on privacy, in place of a noise multiplier.

    ``dp_sgd.run`` and, of :mod:`ntkdp.stochastic_flow`, ``ensemble``, ``moments``,
    ``two_time_ensemble`` and ``weight_noise_variance`` take one as their ``noise_multiplier``; they
    know the number of steps. ``fixed_privacy_flow`` takes one as ``mu``, ``two_time_flow`` as
    ``variance``.

    Parameters
    ----------
    epsilon, delta : float
        :math:`(\varepsilon, \delta)`, positive, delta below 1.
    mu : float
        :math:`\mu`-GDP, positive, in place of the two. Of an :math:`(\varepsilon, \delta)` budget
        the attribute is the :math:`\mu` of the Gaussian mechanism that has this epsilon at this
        delta.
    accountant : {"pld", "rdp"}
        How :math:`(\varepsilon, \delta)` is counted.

    Raises
    ------
    ValueError, TypeError
        Not one of the two kinds of budget, or a number out of its range.

    Notes
    -----
    For neighbours by adding or removing one sample. Dong, Roth, Su 1905.02383; sampling: Bu, Dong,
    Long, Su 1911.11607; what :math:`\mu` is worth: Balle and Wang 1805.06530, theorem 8,
    :math:`\delta = \Phi(\mu/2 - \varepsilon/\mu) - e^\varepsilon \Phi(-\mu/2 - \varepsilon/\mu)`.

    Examples
    --------
    >>> import ntkdp
    >>> budget = ntkdp.privacy.Budget(3.0, 1e-5)
    >>> round(budget.noise_multiplier(steps=14063, sample_rate=256 / 60000), 3)
    0.969
    >>> round(budget.mu, 4), ntkdp.privacy.Budget(mu=0.5).noise_multiplier(steps=100)
    (0.7191, 20.0)
    """

    epsilon: float | None = None
    delta: float | None = None
    _: KW_ONLY
    mu: float | None = None
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        given = tuple(value is not None for value in (self.epsilon, self.delta, self.mu))
        if given not in ((True, True, False), (False, False, True)):
            raise ValueError(
                "give epsilon and delta, or mu alone, "
                f"got epsilon={self.epsilon!r}, delta={self.delta!r}, mu={self.mu!r}"
            )
        validate.choice(ACCOUNTANTS, accountant=self.accountant)
        if self.mu is None:
            epsilon = number(epsilon=validate.positive(epsilon=self.epsilon))
            mu = _accounting.gaussian_mu(epsilon, probability(delta=self.delta))
        else:
            mu = number(mu=validate.positive(mu=self.mu))
        object.__setattr__(self, "mu", mu)

    def noise_multiplier(self, steps: int, sample_rate: float = 1.0) -> float:
        r"""Noise multiplier that spends the budget on so many steps.

        An :math:`(\varepsilon, \delta)` budget is kept, by the accountant. A :math:`\mu` budget is
        met exactly with full batches, :math:`\sigma = \sqrt K/\mu`; with Poisson sampling by the
        central limit theorem, :math:`\mu = q \sqrt{K (e^{1/\sigma^2} - 1)}`, which is NOT A
        GUARANTEE.

        Parameters
        ----------
        steps : int
            K, at least 1.
        sample_rate : float
            q in (0, 1]: 1 for full batches, below it Poisson sampling.

        Raises
        ------
        ValueError, TypeError
            An argument out of its range, or a budget that no noise keeps.
        """
        _, q, steps = _mechanism(1.0, sample_rate, steps)
        if self.epsilon is not None and self.delta is not None:
            return noise_multiplier(self.epsilon, q, steps, self.delta, self.accountant)
        assert self.mu is not None
        of_step = self.mu / (q * math.sqrt(steps))
        if of_step * _accounting.LARGEST_SIGMA < 1:
            raise ValueError(
                f"mu = {self.mu:g} cannot be kept over {steps} steps: noise_multiplier would "
                f"exceed {_accounting.LARGEST_SIGMA:g}; allow a larger mu, or train for fewer steps"
            )
        if q == 1:
            return 1 / of_step
        return float(np.logaddexp(0.0, 2 * math.log(of_step))) ** -0.5


def as_noise_multiplier(noise_multiplier: Any, steps: int | None, sample_rate: float = 1.0) -> Any:
    """What a :class:`Budget` asks for in ``steps`` steps at ``sample_rate``; any other
    ``noise_multiplier`` as it is.

    Raises
    ------
    TypeError
        A budget where the number of steps is not known (None).

    Examples
    --------
    >>> from ntkdp import privacy
    >>> privacy.as_noise_multiplier(privacy.Budget(mu=0.5), 100)
    20.0
    """
    if not isinstance(noise_multiplier, Budget):
        return noise_multiplier
    if steps is None:
        raise TypeError(
            "noise_multiplier must be a number where the number of steps is not known, got "
            f"{noise_multiplier}; use its .noise_multiplier(steps, sample_rate)"
        )
    return noise_multiplier.noise_multiplier(steps, sample_rate)


@dataclass(frozen=True)
class GaussianDP:
    """Gaussian differential privacy: mu, its epsilon, and whether they are a guarantee.

    Made by :func:`gaussian_dp`.
    """

    mu: float
    epsilon: float
    is_guarantee: bool

    @property
    def note(self) -> str:
        """What the figure is worth."""
        if self.is_guarantee:
            return "exact for full batches"
        return "central limit theorem, not a guarantee"

    def __str__(self) -> str:
        return f"mu = {self.mu:.4g}, epsilon = {self.epsilon:.4g} ({self.note})"


def gaussian_dp(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> GaussianDP:
    r"""The mu of Gaussian differential privacy; with sampling, NOT A GUARANTEE.

    Full batches: :math:`\mu = \sqrt{K} / \sigma` after K steps, exact. Poisson sampling: the
    central limit theorem's :math:`\mu = q \sqrt{K (e^{1/\sigma^2} - 1)}`, the limit of
    :math:`K \to \infty` at fixed :math:`q \sqrt K` and :math:`\sigma`; at finite K it may lie far
    below the truth. Epsilon follows from the Gaussian mechanism's

    .. math:: \delta = \Phi(\mu/2 - \varepsilon/\mu) - e^\varepsilon \Phi(-\mu/2 - \varepsilon/\mu).

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, delta
        As for :func:`epsilon`.

    Returns
    -------
    GaussianDP
        ``mu``, ``epsilon`` and ``is_guarantee``, which is False with sampling.

    Raises
    ------
    ValueError, TypeError
        An argument out of its range.

    Notes
    -----
    Dong, Roth, Su 1905.02383; sampling: Bu, Dong, Long, Su 1911.11607; the formula: Balle and Wang
    1805.06530. The SNLI experiment of Bu et al. (TMLR 2023) reports epsilon 1.25: that is this
    limit at :math:`\sigma = .4`, where PLD gives 5.13 and RDP 6.50. It understates epsilon
    about fourfold.

    Examples
    --------
    >>> import ntkdp
    >>> print(ntkdp.privacy.gaussian_dp(0.4, 32 / 550152, 51576, 1 / 550152))
    mu = 0.3004, epsilon = 1.254 (central limit theorem, not a guarantee)
    >>> print(ntkdp.privacy.gaussian_dp(10.0, 1.0, 100, 1e-5))
    mu = 1, epsilon = 4.377 (exact for full batches)
    """
    sigma, q, steps = _mechanism(noise_multiplier, sample_rate, steps)
    delta = probability(delta=delta)
    if sigma == 0:
        return GaussianDP(math.inf, math.inf, q == 1)
    if q == 1:
        mu = math.sqrt(steps) / sigma
    else:
        with np.errstate(over="ignore"):
            mu = q * math.sqrt(steps * float(np.expm1(np.float64(sigma) ** -2)))
    return GaussianDP(mu, _accounting.gaussian_epsilon(mu, delta), q == 1)


@dataclass(frozen=True)
class PrivacyReport:
    """Epsilon by every method, for one mechanism and delta; ``print`` shows a table.

    Made by :func:`report`.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    pld: float
    rdp: float
    gaussian: GaussianDP

    def rows(self) -> list[tuple[str, float, str]]:
        """Method, epsilon and what it is worth."""
        return [
            ("PLD", self.pld, "guarantee, nearly tight"),
            ("RDP", self.rdp, "guarantee"),
            (f"GDP, mu = {self.gaussian.mu:.4g}", self.gaussian.epsilon, self.gaussian.note),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers, with the note on what the Gaussian figure is worth."""
        own = asdict(self)
        own["gaussian"]["note"] = self.gaussian.note
        return own

    @property
    def setting(self) -> str:
        """What the figures are for, on one line."""
        sampling = "full batches" if self.sample_rate == 1 else f"q = {self.sample_rate:.4g}"
        return (
            f"sigma = {self.noise_multiplier:.5g}, {sampling}, {self.steps} steps, "
            f"delta = {self.delta:.4g}, add or remove one sample"
        )

    def __str__(self) -> str:
        lines = [self.setting]
        lines += [f"{name:<18} epsilon = {e:<8.4g} {note}" for name, e, note in self.rows()]
        return "\n".join(lines)


def report(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> PrivacyReport:
    r"""PLD, RDP and Gaussian figures side by side; the last is not a guarantee with sampling.

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, delta
        As for :func:`epsilon`.

    Returns
    -------
    PrivacyReport
        A field a method; it prints as below.

    Raises
    ------
    ValueError, TypeError
        An argument out of its range.

    Examples
    --------
    >>> import ntkdp
    >>> print(ntkdp.privacy.report(10.0, 1.0, 100, 1e-5))
    sigma = 10, full batches, 100 steps, delta = 1e-05, add or remove one sample
    PLD                epsilon = 4.377    guarantee, nearly tight
    RDP                epsilon = 4.729    guarantee
    GDP, mu = 1        epsilon = 4.377    exact for full batches
    """
    sigma, q, steps = _mechanism(noise_multiplier, sample_rate, steps)
    delta = probability(delta=delta)
    pld, rdp = (_accounting.epsilon_of(sigma, q, steps, delta, method) for method in ACCOUNTANTS)
    return PrivacyReport(sigma, q, steps, delta, pld, rdp, gaussian_dp(sigma, q, steps, delta))
