"""Steps of DP-SGD, as accounting sees them, for either relation of neighbours."""

import math
from typing import NamedTuple

import numpy as np

from ntkdp.privacy import _sampled_gaussian
from ntkdp.privacy._sampled_gaussian import Array


class Mechanism(NamedTuple):
    r"""So many equal steps: Gaussian noise, in units of how far a sample moves the sum.

    A sample that is there or not takes part with probability q: outputs come from
    :math:`P = (1-q) N(0, 1) + q N(1/\sigma, 1)` or from :math:`Q = N(0, 1)`.

    If a sample is **replaced**, and batches have a fixed size, two neighbours are no easier to tell
    apart than this pair: the losses L > 0 of P against Q, the same with their signs turned, and a
    loss of 0 for the rest, which is the trade-off function :math:`\min(f_q, f_q^{-1})^{**}` of
    Dong, Roth, Su (1905.02383, section 4). For one step no bound can be smaller at any epsilon: if
    all other samples pull as hard as they can with one of the two, outputs come from Q or from P.
    For many steps P and Q still occur as a pair, so that their epsilon is a lower bound.
    """

    sigma: float
    q: float
    steps: int
    replaced: bool = False

    @property
    def differs_both_ways(self) -> bool:
        """Whether the pair is that of a replaced sample, and not P and Q."""
        return self.replaced and self.q < 1

    @property
    def scale(self) -> float:
        """A size of one step's losses that falls with sigma and grows with q."""
        return _sampled_gaussian.scale(self.sigma, self.q)

    def atoms(self, log_left_out: float, interval: float = math.inf) -> tuple[Array, Array, Array]:
        """Losses of a step as atoms, with their masses under both data sets; a rest loses 0."""
        losses, present, absent = _sampled_gaussian.atoms(
            self.sigma, self.q, log_left_out, interval
        )
        if not self.differs_both_ways:
            return losses, present, absent
        speaks = losses > 0
        losses, present, absent = losses[speaks], present[speaks], absent[speaks]
        return (
            np.concatenate([losses, -losses]),
            np.concatenate([present, absent]),
            np.concatenate([absent, present]),
        )

    def renyi_moments(self) -> Array:
        r"""Bounds of the log moments of all orders of one step.

        With :math:`u = P/Q - 1 > 0`, what the mirror image adds to a moment is at most what the
        outputs themselves do, :math:`(1 + u)^{1 - \alpha} - 1 + (\alpha - 1) u \le
        (1 + u)^\alpha - 1 - \alpha u`, so the moment exceeds one by at most twice what that of P
        and Q does. It is never above the moment of full batches. *Derived.*
        """
        moments = _sampled_gaussian.renyi_moments(self.sigma, self.q)
        if not self.differs_both_ways:
            return moments
        whole = _sampled_gaussian.renyi_moments(self.sigma, 1.0)
        # log(2 e^m - 1), with the digits of a small m.
        doubled = moments + np.log1p(-np.expm1(-moments))
        bounds: Array = np.minimum(doubled, whole)
        return bounds
