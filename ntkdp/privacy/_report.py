"""The central limit theorem of privacy, and all figures of a mechanism in one report."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ntkdp.privacy import _bounds
from ntkdp.privacy._arguments import ACCOUNTANTS, Sampling, checked_mechanism, number, probability
from ntkdp.privacy._central_limit import mu_of_step
from ntkdp.privacy._neighbours import of_sampling


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
        """How far the figure is a guarantee."""
        if self.is_guarantee:
            return "exact for full batches"
        return "central limit theorem, not a guarantee"

    def __str__(self) -> str:
        return f"mu = {self.mu:.4g}, epsilon = {self.epsilon:.4g} ({self.note})"


def gaussian_dp(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    *,
    sampling: Sampling = "poisson",
) -> GaussianDP:
    r"""The mu of Gaussian differential privacy; with sampling, NOT A GUARANTEE.

    Full batches: :math:`\mu = \sqrt{K} / \sigma` after K steps, exact. Poisson sampling: the
    central limit theorem's :math:`\mu = q \sqrt{K (e^{1/\sigma^2} - 1)}`, the limit of
    :math:`K \to \infty` at fixed :math:`q \sqrt K` and :math:`\sigma`; at finite K it may lie far
    below the truth. If a sample is replaced, a step is worth :math:`\mu_1 = 2/\sigma`: full batches
    have :math:`\mu_1 \sqrt K`, and batches of a fixed size the limit

    .. math:: \mu = q \sqrt{2 K (e^{\mu_1^2} \Phi(3\mu_1/2) + 3 \Phi(-\mu_1/2) - 2)}.

    Epsilon follows from the Gaussian mechanism's

    .. math:: \delta = \Phi(\mu/2 - \varepsilon/\mu) - e^\varepsilon \Phi(-\mu/2 - \varepsilon/\mu).

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, delta, sampling
        As for :func:`epsilon`.

    Returns
    -------
    GaussianDP
        ``mu``, ``epsilon`` and ``is_guarantee``, which is False with sampling.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Notes
    -----
    Dong, Roth, Su 1905.02383; sampling: Bu, Dong, Long, Su 1911.11607, both kinds; the formula:
    Balle and Wang 1805.06530. The SNLI experiment of Bu et al. (TMLR 2023) reports epsilon 1.25:
    that is this limit at :math:`\sigma = 0.4`, where PLD gives 5.13 and RDP 6.50. It understates
    epsilon by a factor of about four.

    Examples
    --------
    >>> import ntkdp
    >>> print(ntkdp.privacy.gaussian_dp(0.4, 32 / 550152, 51576, 1 / 550152))
    mu = 0.3004, epsilon = 1.254 (central limit theorem, not a guarantee)
    >>> print(ntkdp.privacy.gaussian_dp(10.0, 1.0, 100, 1e-5))
    mu = 1, epsilon = 4.377 (exact for full batches)
    """
    mechanism = checked_mechanism(noise_multiplier, sample_rate, steps, sampling)
    delta = probability(delta=delta)
    mu = math.sqrt(mechanism.steps) * mu_of_step(mechanism)
    return GaussianDP(mu, _bounds.gaussian_epsilon(mu, delta), mechanism.q == 1)


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
    sampling: Sampling = "poisson"

    @property
    def neighbours(self) -> str:
        """What neighbouring data sets differ in."""
        return of_sampling(self.sampling)

    def rows(self) -> list[tuple[str, float, str]]:
        """Each method with its epsilon, and a note on how far that is a guarantee."""
        return [
            ("PLD", self.pld, "guarantee, nearly tight"),
            ("RDP", self.rdp, "guarantee"),
            (f"GDP, mu = {self.gaussian.mu:.4g}", self.gaussian.epsilon, self.gaussian.note),
        ]

    def as_dict(self) -> dict[str, Any]:
        """All fields plain, with the neighbours and the note on the Gaussian figure."""
        own = asdict(self) | {"neighbours": self.neighbours}
        own["gaussian"]["note"] = self.gaussian.note
        return own

    @property
    def setting(self) -> str:
        """The mechanism and the neighbours that the figures are for, on one line."""
        batches = "full batches" if self.sample_rate == 1 else f"q = {self.sample_rate:.4g}"
        if self.sample_rate < 1 and self.sampling == "fixed_size":
            batches = f"batches of a fixed size, {batches}"
        return (
            f"sigma = {self.noise_multiplier:.5g}, {batches}, {self.steps} steps, "
            f"delta = {self.delta:.4g}, {self.neighbours}"
        )

    def __str__(self) -> str:
        lines = [self.setting]
        lines += [f"{name:<18} epsilon = {e:<8.4g} {note}" for name, e, note in self.rows()]
        return "\n".join(lines)


def report(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    *,
    sampling: Sampling = "poisson",
) -> PrivacyReport:
    r"""PLD, RDP and Gaussian figures side by side; the last is not a guarantee with sampling.

    Parameters
    ----------
    noise_multiplier, sample_rate, steps, delta, sampling
        As for :func:`epsilon`.

    Returns
    -------
    PrivacyReport
        With a field for each method; it prints as below.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range.

    Examples
    --------
    >>> import ntkdp
    >>> print(ntkdp.privacy.report(10.0, 1.0, 100, 1e-5))
    sigma = 10, full batches, 100 steps, delta = 1e-05, add or remove one sample
    PLD                epsilon = 4.377    guarantee, nearly tight
    RDP                epsilon = 4.729    guarantee
    GDP, mu = 1        epsilon = 4.377    exact for full batches
    """
    mechanism = checked_mechanism(noise_multiplier, sample_rate, steps, sampling)
    delta = probability(delta=delta)
    pld, rdp = (_bounds.epsilon_of([mechanism], delta, method) for method in ACCOUNTANTS)
    return PrivacyReport(
        number(noise_multiplier=noise_multiplier),
        mechanism.q,
        mechanism.steps,
        delta,
        pld,
        rdp,
        gaussian_dp(noise_multiplier, sample_rate, steps, delta, sampling=sampling),
        sampling,
    )
