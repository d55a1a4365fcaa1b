"""A privacy budget that stands where a noise multiplier is asked for."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

from ntkdp._backend import validate
from ntkdp._backend.schedules import Schedule, is_schedule
from ntkdp.batches import Batches, Cyclic, FixedSize, Shuffled
from ntkdp.batches import resolve as resolve_batches
from ntkdp.noise import Independent, Noise
from ntkdp.noise import resolve as resolve_noise
from ntkdp.privacy import _bounds, _schedules
from ntkdp.privacy._arguments import (
    ACCOUNTANTS,
    Accountant,
    Sampling,
    checked_mechanism,
    number,
    probability,
)
from ntkdp.privacy._central_limit import sigma_of_step
from ntkdp.privacy._epsilon import epsilon, noise_multiplier


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
        :math:`\mu`-GDP, positive, in place of the two. For an :math:`(\varepsilon, \delta)` budget
        the attribute is the :math:`\mu` of the Gaussian mechanism that has this epsilon at this
        delta.
    accountant : {"pld", "rdp"}
        How :math:`(\varepsilon, \delta)` is counted.

    Raises
    ------
    ValueError, TypeError
        If it is not one of the two kinds of budget, or a number is out of its range.

    Notes
    -----
    The promise is for the neighbours that :func:`neighbours` names for the batches. Dong, Roth, Su
    1905.02383; sampling: Bu, Dong, Long, Su 1911.11607; what :math:`\mu` is worth: Balle and Wang
    1805.06530, theorem 8,
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
        if self.epsilon is not None and self.delta is not None:
            epsilon = number(epsilon=validate.positive(epsilon=self.epsilon))
            mu = _bounds.gaussian_mu(epsilon, probability(delta=self.delta))
        else:
            assert self.mu is not None
            mu = number(mu=validate.positive(mu=self.mu))
        object.__setattr__(self, "mu", mu)

    def noise_multiplier(
        self,
        steps: int,
        sample_rate: float = 1.0,
        *,
        batches: Batches | None = None,
        noise: Noise | None = None,
        n_samples: int | None = None,
        relative: Schedule | None = None,
    ) -> float:
        r"""Noise multiplier that spends the budget on so many steps.

        An :math:`(\varepsilon, \delta)` budget is kept, by the accountant. A :math:`\mu` budget is
        met exactly with full batches, :math:`\sigma = \sqrt K/\mu`; with sampling by the central
        limit theorem of :func:`gaussian_dp`, which is NOT A GUARANTEE.

        Parameters
        ----------
        steps : int
            K, at least 1.
        sample_rate : float
            q in (0, 1]: 1 for full batches, below it Poisson sampling.
        batches : batches.Batches, optional
            One of :mod:`ntkdp.batches`, in place of a sampling rate. They decide what neighbours
            differ in, see :func:`neighbours`.
        noise : noise.Noise, optional
            One of :mod:`ntkdp.noise`; by default independent.
        n_samples : int, optional
            Number of samples, of which batches of a fixed size are drawn. Others do not ask for it.
        relative : callable or array, optional
            A schedule :math:`r_k > 0` of noise, a function of the step or ``(steps,)``: the result
            is then the scale c for which the noise multipliers :math:`c\, r_k` spend the budget.

        Raises
        ------
        ValueError, TypeError
            If an argument is out of its range, no noise keeps the budget, or there is no accountant
            of these batches and this noise: correlated noise has none with random batches.

        Notes
        -----
        If it is certain in which steps a sample takes part, the whole run is one Gaussian
        mechanism: :math:`\sigma` is the sensitivity of the noise's strategy over :math:`\mu`. For
        shuffled batches that is an upper bound, without amplification. With a schedule a sample
        moves step k by :math:`1/r_k` of the noise: with full batches
        :math:`c = \sqrt{\sum_k r_k^{-2}}/\mu`. Sampled steps are composed, see
        :func:`composed_epsilon`.

        Examples
        --------
        >>> import ntkdp
        >>> budget = ntkdp.privacy.Budget(mu=0.5)
        >>> budget.noise_multiplier(100), budget.noise_multiplier(
        ...     100, batches=ntkdp.batches.Cyclic(25))
        (20.0, 4.0)
        >>> budget = ntkdp.privacy.Budget(3.0, 1e-5)
        >>> batches = ntkdp.batches.FixedSize(64)
        >>> round(budget.noise_multiplier(100, batches=batches, n_samples=1000), 2)
        2.62
        >>> budget.noise_multiplier(2, relative=[1.0, 2.0]) * budget.mu  # sqrt(1 + 1/4)
        1.118033988749895
        """
        drawn, added = resolve_batches(batches, sample_rate), resolve_noise(noise)
        if not _has_accountant(drawn, added):
            raise ValueError(
                f"there is no accountant of {drawn!r} with {type(added).__name__} noise; take "
                "independent noise, or full, cyclic or shuffled batches"
            )
        if relative is not None:
            return self._of_schedule(relative, drawn, added, n_samples, steps)
        if _is_one_mechanism(drawn, added):
            assert self.mu is not None
            return added.sensitivity(drawn, validate.count(steps=steps)) / self.mu
        return self._of_independent_noise(*_drawing(drawn, n_samples), steps)

    def _of_schedule(
        self, relative: Schedule, drawn: Batches, added: Noise, n_samples: int | None, steps: int
    ) -> float:
        assert self.mu is not None
        if not isinstance(added, Independent):
            raise ValueError(f"noise must be independent with relative, got {type(added).__name__}")
        numbers = _schedules.numbers_of(steps, relative=relative)
        if not numbers.all():
            raise ValueError("relative must be positive in all steps, got 0")
        if not drawn.is_random or isinstance(drawn, Shuffled):
            return _schedules.sensitivity(numbers, drawn) / self.mu
        sampling, q = _drawing(drawn, n_samples)
        of_one = _schedules.pieces(numbers, q, sampling)
        if self.epsilon is None or self.delta is None:
            scale = _schedules.scale_for_mu(self.mu, of_one)
        else:
            scale = _bounds.noise_for(self.epsilon, of_one, self.delta, self.accountant)
        if scale is None:
            raise ValueError(
                f"{self} cannot be kept over {steps} steps with this schedule: its scale would "
                f"exceed {_bounds.LARGEST_SIGMA:g}; allow more, or train for fewer steps"
            )
        return scale

    def _of_independent_noise(self, sampling: Sampling, q: float, steps: int) -> float:
        of_one = checked_mechanism(1.0, q, steps, sampling)
        if self.epsilon is not None and self.delta is not None:
            return noise_multiplier(
                self.epsilon, q, steps, self.delta, self.accountant, sampling=sampling
            )
        assert self.mu is not None
        step_mu = self.mu / math.sqrt(of_one.steps)
        if step_mu * _bounds.LARGEST_SIGMA < q:
            raise ValueError(
                f"mu = {self.mu:g} cannot be kept over {steps} steps: noise_multiplier would "
                f"exceed {_bounds.LARGEST_SIGMA:g}; allow a larger mu, or train for fewer steps"
            )
        return sigma_of_step(step_mu, of_one) / of_one.sigma


def spent(
    noise_multiplier: float | Schedule,
    steps: int,
    delta: float,
    *,
    batches: Batches,
    noise: Noise | None,
    n_samples: int,
) -> float:
    """Epsilon of a run with a given noise multiplier; infinite if no accountant knows it."""
    added = resolve_noise(noise)
    if not _has_accountant(batches, added):
        return math.inf
    if _is_one_mechanism(batches, added):
        if is_schedule(noise_multiplier):
            if not isinstance(added, Independent):
                return math.inf
            sigmas = _schedules.numbers_of(steps, noise_multiplier=noise_multiplier)
            moved = _schedules.sensitivity(sigmas, batches)
            return epsilon(1 / moved, 1.0, 1, delta)
        sigma = cast(float, noise_multiplier)
        return epsilon(sigma / added.sensitivity(batches, steps), 1.0, 1, delta)
    sampling, q = _drawing(batches, n_samples)
    return epsilon(noise_multiplier, q, steps, delta, sampling=sampling)


def _has_accountant(batches: Batches, noise: Noise) -> bool:
    certain = not batches.is_random or isinstance(batches, Shuffled)
    return certain or isinstance(noise, Independent)


def _is_one_mechanism(batches: Batches, noise: Noise) -> bool:
    """Whether steps are counted together, by the sensitivity of the noise's strategy."""
    return isinstance(batches, Cyclic | Shuffled) or not isinstance(noise, Independent)


def _drawing(batches: Batches, n_samples: int | None) -> tuple[Sampling, float]:
    """How batches are drawn and their share of the samples."""
    if not isinstance(batches, FixedSize):
        return "poisson", batches.share(1)
    if n_samples is None:
        raise TypeError(f"n_samples must be given with batches={batches!r}, got None")
    n_samples = validate.count(n_samples=n_samples)
    batches.check(n_samples)
    return "fixed_size", batches.share(n_samples)


def as_noise_multiplier(
    noise_multiplier: Any,
    steps: int | None,
    sample_rate: float = 1.0,
    *,
    batches: Batches | None = None,
    noise: Noise | None = None,
    n_samples: int | None = None,
    schedules: bool = False,
) -> Any:
    """The noise multiplier of a :class:`Budget` for ``steps`` steps at ``sample_rate``.

    A ``noise_multiplier`` that is not a budget is returned as it is; ``batches``, ``noise`` and
    ``n_samples`` are those of :meth:`Budget.noise_multiplier`.

    Raises
    ------
    TypeError
        If the number of steps of a budget is not known (None), or it is a schedule where
        ``schedules`` are not taken.

    Examples
    --------
    >>> from ntkdp import privacy
    >>> privacy.as_noise_multiplier(privacy.Budget(mu=0.5), 100)
    20.0
    """
    if callable(noise_multiplier) and not schedules:
        raise TypeError(
            "noise_multiplier must be one number here, got a schedule; dp_sgd.run, "
            "stochastic_flow.ensemble and stochastic_flow.moments take a number for each step"
        )
    if not isinstance(noise_multiplier, Budget):
        return noise_multiplier
    if steps is None:
        raise TypeError(
            "noise_multiplier must be a number where the number of steps is not known, got "
            f"{noise_multiplier}; use its .noise_multiplier(steps, sample_rate)"
        )
    return noise_multiplier.noise_multiplier(
        steps, sample_rate, batches=batches, noise=noise, n_samples=n_samples
    )
