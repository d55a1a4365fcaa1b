"""Predicted statistics over time."""

from typing import NamedTuple

import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array
from ntkdp.trajectory import Outcome, message, succeeded

#: Steps of the solver before it gives up.
MAX_STEPS = 100_000
#: How a solve may end early, and what to do about it.
_ADVICE = {
    Outcome.MAX_STEPS: (
        f"the solver made {MAX_STEPS:,} steps before the last time; loosen rtol and atol, shorten "
        "the horizon, or use stochastic_flow.moments, which makes steps of the learning rate"
    ),
    Outcome.STEP_TOO_SMALL: (
        "the solver's step size shrank to rounding; the moments may blow up near there, or the "
        "tolerances are below what this dtype resolves: loosen rtol and atol, or use float64"
    ),
    Outcome.SOLVER_FAILED: "the solver gave up; loosen rtol and atol, or shorten the horizon",
}


class Moments(NamedTuple):
    """Predicted statistics over time; a pytree.

    ``loss`` and ``loss_std`` are the mean and standard deviation of the reduced training loss and
    ``accuracy`` is the mean accuracy; ``test_loss``, ``test_loss_std`` and ``test_accuracy`` are
    those of the test points. ``mean`` ``(T, N, K)`` and ``covariance`` ``(T, N K, N K)`` are those
    of the outputs, train before test, on request. ``truncation`` is the share of the variance whose
    correlations are dropped, 0 with the whole covariance. ``steps`` is None in flow time.
    ``outcome`` is a :class:`ntkdp.trajectory.Outcome`; at times that a solver did not reach the
    statistics are NaN, and ``message`` says what to do.

    Made by :func:`moments`, :func:`moment_flow` and :func:`fixed_privacy_flow`.
    """

    times: Array
    steps: Array | None
    loss: Array
    loss_std: Array
    accuracy: Array | None
    test_loss: Array | None
    test_loss_std: Array | None
    test_accuracy: Array | None
    mean: Array | None
    covariance: Array | None
    truncation: Array
    outcome: Array | int = int(Outcome.SUCCESS)

    @property
    def successful(self) -> bool:
        """Whether all times were reached."""
        return succeeded(self.outcome)

    @property
    def message(self) -> str:
        """Why times were not reached and what to do about it, or ``"success"``."""
        return message(self.outcome, _ADVICE)

    def band(self, level: float = 0.9, *, test: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper quantile of the loss, by the gamma law with its mean and deviation."""
        from scipy.stats import gamma

        level = float(validate.fraction(level=level))
        chosen = (self.test_loss, self.test_loss_std) if test else (self.loss, self.loss_std)
        if chosen[0] is None:
            raise ValueError("test=True needs a flow with test targets")
        mean, std = (np.asarray(values) for values in chosen)
        certain = std <= 0
        shape = (mean / np.where(certain, 1.0, std)) ** 2
        low, high = (
            np.where(certain, mean, gamma.ppf(part, shape, scale=mean / shape))
            for part in ((1 - level) / 2, (1 + level) / 2)
        )
        return low, high
