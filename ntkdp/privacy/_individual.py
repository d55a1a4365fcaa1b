"""What privacy costs each sample: mu and epsilon one by one."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.subgroups import Labels, subgroups
from ntkdp._backend.types import ArrayLike
from ntkdp.batches import Batches, Full, Poisson
from ntkdp.batches import resolve as resolve_batches
from ntkdp.privacy import _bounds
from ntkdp.privacy._arguments import number, probability
from ntkdp.privacy._mechanism import Mechanism
from ntkdp.privacy._sensitivities import LEVELS, Sensitivities

#: Bisections that bring an interval of epsilon to rounding.
_BISECTIONS = 60
#: Beyond this an exponential is infinite.
_LARGEST = 700.0


class GroupExposure(NamedTuple):
    """Means over subgroups, in the order of their sorted labels; NumPy arrays ``(G,)``.

    Made by :meth:`IndividualPrivacy.by_group`.

    Examples
    --------
    >>> import ntkdp
    >>> costs = ntkdp.privacy.individual([[1.0, 0.2, 0.4]], noise_multiplier=1.0)
    >>> costs.by_group(["rare", "common", "common"], 1e-5).mu.round(3).tolist()
    [0.3, 1.0]
    """

    labels: np.ndarray
    counts: np.ndarray
    mu: np.ndarray
    epsilon: np.ndarray


@dataclass(frozen=True, eq=False)
class IndividualPrivacy:
    """Mu and epsilon of each sample; made by :func:`individual`.

    ``mu`` is ``(n,)``, after a leading axis of seeds if there is one. ``is_guarantee`` says whether
    it is exact, for full batches, or the central limit theorem's. :meth:`epsilon` is an upper bound
    for both.
    """

    mu: np.ndarray
    is_guarantee: bool
    noise_multiplier: float
    sample_rate: float
    steps: int
    counts: np.ndarray

    def epsilon(self, delta: float, *, n_bounds: int = 32) -> np.ndarray:
        """Epsilon of each sample at a delta, in the shape of ``mu``; an upper bound.

        With full batches it is that of the Gaussian mechanism. With Poisson sampling, samples with
        similar mu share a bound: that of a sample which has in no step less than any of them.

        Parameters
        ----------
        delta : float
            In (0, 1).
        n_bounds : int
            How many bounds are computed at most. More are tighter, and each takes a moment.

        Raises
        ------
        ValueError, TypeError
            If an argument is out of its range.
        """
        delta = probability(delta=delta)
        n_bounds = validate.count(n_bounds=n_bounds)
        if self.is_guarantee:
            return _gaussian_epsilons(self.mu, delta)
        counts = self.counts.reshape(-1, len(LEVELS))
        found = np.zeros(self.mu.size)
        whole = Mechanism(self.noise_multiplier, self.sample_rate, self.steps)
        most = _bounds.epsilon_of([whole], delta, "pld")
        for members in _alike(self.mu.ravel(), n_bounds):
            found[members] = min(most, self._shared_epsilon(counts[members], delta))
        return found.reshape(self.mu.shape)

    def _shared_epsilon(self, counts: np.ndarray, delta: float) -> float:
        """Epsilon of a sample that has in no step less than any of those with these counts."""
        at_least = np.cumsum(counts[:, ::-1], axis=1).max(axis=0)
        steps = np.diff(at_least, prepend=0)[::-1]
        pieces = [
            Mechanism(self.noise_multiplier / level, self.sample_rate, int(many))
            for level, many in zip(LEVELS, steps, strict=True)
            if many
        ]
        return _bounds.epsilon_of(pieces, delta, "pld") if pieces else 0.0

    def most_exposed(self, count: int = 1) -> np.ndarray:
        """Indices of the samples with the largest mu, averaged over seeds, from the top."""
        return self._order()[::-1][: validate.count(count=count)]

    def least_exposed(self, count: int = 1) -> np.ndarray:
        """Indices of the samples with the smallest mu, averaged over seeds, from the bottom."""
        return self._order()[: validate.count(count=count)]

    def _order(self) -> np.ndarray:
        order: np.ndarray = np.argsort(_over_seeds(self.mu), kind="stable")
        return order

    def by_group(self, labels: Labels, delta: float) -> GroupExposure:
        """Mean mu and epsilon by subgroup, such as classes; ``labels`` is ``(n,)``.

        Raises
        ------
        ValueError, TypeError
            If there is not a label for each sample, or delta is out of its range.
        """
        groups = subgroups(labels, self.mu.shape[-1])
        mu, epsilon = (_over_seeds(values) for values in (self.mu, self.epsilon(delta)))
        return GroupExposure(groups.labels, groups.counts, groups.means(mu), groups.means(epsilon))


def individual(
    sensitivities: ArrayLike | Sensitivities,
    *,
    noise_multiplier: float,
    sample_rate: float = 1.0,
    batches: Batches | None = None,
    steps: ArrayLike | None = None,
) -> IndividualPrivacy:
    r"""What a run, or a prediction of one, costs each sample.

    The accountant counts every sample as if it were clipped in every step. With
    :math:`s_{ik} = C_{ik} \|g_{ik}\| / S \le 1`, what sample i adds to step k over the sensitivity
    S, full batches cost it

    .. math:: \mu_i^2 = \sum_k s_{ik}^2 / \sigma^2,

    which is :math:`\mu = \sqrt K / \sigma` for a sample that is clipped in all K steps, and less
    for others. With Poisson sampling, step k is the mechanism of noise multiplier
    :math:`\sigma / s_{ik}`, and epsilon that of all steps, by their loss distributions.

    Parameters
    ----------
    sensitivities : array or Sensitivities
        ``dp_sgd.run(..., individual=True).sensitivities``; or :math:`s_{ik}`, an array ``(T, n)``,
        in which rows are states, as ``KernelFlow.sensitivities`` predicts them from recorded
        outputs. Both may have a leading axis of seeds.
    noise_multiplier : float
        :math:`\sigma`, positive.
    sample_rate : float
        q in (0, 1]: 1 for full batches, below it Poisson sampling.
    batches : batches.Batches, optional
        Full ones or Poisson sampling, in place of a sampling rate.
    steps : array, optional
        ``(T,)``, the step number of each state, as ``Trajectory.steps``. A state's sensitivities
        then hold until the next state, and those of the last one, after which no step comes, are
        left out. By default each row is a step.

    Returns
    -------
    IndividualPrivacy
        With mu and epsilon of each sample, the most and the least exposed ones, and means by group.
        With sampling mu is the central limit theorem's,
        :math:`\mu_i^2 = q^2 \sum_k (e^{s_{ik}^2 / \sigma^2} - 1)`, which is NOT A GUARANTEE, and
        sensitivities are rounded up to a factor of :math:`2^{1/8}`, so that epsilon is never too
        low for them.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range, or shapes do not fit.

    Notes
    -----
    Yu, Kamath, Kulkarni, Liu, Yin, Zhang 2206.02617; the form of full batches is *derived* (claim
    C44). It is a guarantee for add or remove one sample, given the models that came out: another
    run has other gradients, and so other numbers.

    .. warning::
       Each number is computed from its own sample and from all others, and no noise is added.
       Whoever learns it learns something about them: who is typical, whose label is wrong. Do not
       publish it for single samples, or choose samples by it, without counting what that costs.

    Examples
    --------
    >>> import ntkdp
    >>> found = ntkdp.privacy.individual([[1.0, 0.1], [1.0, 0.2]], noise_multiplier=2.0)
    >>> found.mu.round(3).tolist(), found.epsilon(1e-5).round(2).tolist()
    ([0.707, 0.112], [2.94, 0.38])
    >>> found.most_exposed().tolist()
    [0]
    """
    sigma = number(noise_multiplier=validate.positive(noise_multiplier=noise_multiplier))
    drawn = resolve_batches(batches, sample_rate)
    if not isinstance(drawn, Full | Poisson):
        raise ValueError(
            f"batches must be full ones or Poisson sampling, got {drawn!r}, for which the cost of "
            "a single sample is not known"
        )
    squares, counts, number_of_steps = _record(sensitivities, steps)
    q = drawn.share(1)
    if q == 1:
        mu = np.sqrt(squares) / sigma
    else:
        gains = np.expm1(np.minimum((LEVELS / sigma) ** 2, _LARGEST))
        mu = q * np.sqrt(counts @ gains)
    return IndividualPrivacy(mu, q == 1, sigma, q, number_of_steps, counts)


def _record(
    given: ArrayLike | Sensitivities, steps: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Squares, counts by level and the number of steps."""
    if isinstance(given, Sensitivities):
        if steps is not None:
            raise ValueError("steps must be None with the record of a run, which has counted them")
        squares = np.asarray(given.squares, np.float64)
        return squares, np.asarray(given.counts), int(np.max(np.asarray(given.steps)))
    values = np.asarray(validate.non_negative(sensitivities=given), np.float64)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"sensitivities must have shape (T, n), got {values.shape}")
    if np.max(values) > 1 + 1e-3:
        raise ValueError(
            "sensitivities must be at most 1, in units of the clipping rule's sensitivity, got "
            f"{np.max(values):.6g}"
        )
    values = np.minimum(values, 1.0)
    lasts = np.ones(values.shape[-2], np.int64)
    if steps is not None:
        numbers = np.asarray(validate.increasing(steps=steps))
        if numbers.shape != lasts.shape:
            raise ValueError(f"steps must have shape {lasts.shape}, got {numbers.shape}")
        values, lasts = values[..., :-1, :], np.diff(numbers).astype(np.int64)
    squares = np.einsum("t,...tn->...n", lasts.astype(np.float64), values**2)
    place = np.searchsorted(LEVELS, values)
    counts = np.stack(
        [
            np.einsum("t,...tn->...n", lasts, (place == level) & (values > 0))
            for level in range(len(LEVELS))
        ],
        axis=-1,
    )
    return squares, counts, int(lasts.sum())


def _gaussian_epsilons(mu: np.ndarray, delta: float) -> np.ndarray:
    """Epsilons of mu-GDP, rounded up; the same as one by one, but all at once."""
    from scipy.special import log_ndtr

    log_delta = math.log(delta)
    safe = np.where(mu > 0, mu, 1.0)
    low = np.zeros_like(safe)
    # From delta <= Phi(mu/2 - epsilon/mu) and the tail bound exp(-x^2/2).
    high = safe * (safe / 2 + math.sqrt(-2 * log_delta))

    def exceeds(epsilon: np.ndarray) -> np.ndarray:
        hit = log_ndtr(safe / 2 - epsilon / safe)
        miss = epsilon + log_ndtr(-safe / 2 - epsilon / safe)
        with np.errstate(divide="ignore"):
            logs = hit + np.log(-np.expm1(np.minimum(miss - hit, 0.0)))
        above: np.ndarray = logs > log_delta
        return above

    needed = (mu > 0) & exceeds(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = exceeds(middle)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(needed, high * (1 + 2e-12), 0.0)


def _alike(mu: np.ndarray, n_bounds: int) -> list[np.ndarray]:
    """Indices of samples with similar mu, in at most so many parts, none with mu of zero."""
    indices = np.flatnonzero(mu > 0)
    if not indices.size:
        return []
    width = np.ptp(mu[indices]) / n_bounds
    places = np.zeros(len(indices), np.int64)
    if width > 0:
        places = (mu[indices] - mu[indices].min()) / width
        places = np.minimum(places, n_bounds - 1).astype(np.int64)
    return [indices[places == place] for place in np.unique(places)]


def _over_seeds(values: np.ndarray) -> np.ndarray:
    means: np.ndarray = values.reshape(-1, values.shape[-1]).mean(axis=0)
    return means
