"""Covariance that the choice of samples gives to the gradient of a step."""

from typing import NamedTuple

from ntkdp.batches import Batches, FixedSize


class Sampling(NamedTuple):
    r"""How the covariance of a batch's sum depends on how samples are drawn.

    A batch adds up :math:`b_i d_i/q`, where :math:`b_i` says whether sample i is drawn and
    :math:`d_i` what it contributes. With :math:`D = \sum_i d_i` its covariance is

    .. math:: \text{alone} \sum_i d_i d_i^\top - \text{together}\, D D^\top .

    If each sample is drawn on its own, the two are :math:`1/q - 1` and 0. In a batch of a fixed
    size a sample that is drawn keeps another out,
    :math:`\operatorname{Cov}(b_i, b_j) = -q(1 - q)/(n - 1)`, so that the two are
    :math:`(1/q - 1)` times :math:`n/(n - 1)` and :math:`1/(n - 1)`. *Derived*. The excess of the
    loss's variance takes ``alone`` and neglects ``together``.
    """

    alone: float
    together: float

    @classmethod
    def of(cls, batches: Batches, n_samples: int) -> "Sampling":
        """The two numbers for batches; both are zero if batches are not drawn at random."""
        share = batches.share(n_samples) if batches.is_random else 1.0
        alone = 1 / share - 1
        if not isinstance(batches, FixedSize) or share == 1:
            return cls(alone, 0.0)
        together = alone / (n_samples - 1)
        return cls(n_samples * together, together)
