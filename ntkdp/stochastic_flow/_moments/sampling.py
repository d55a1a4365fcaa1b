"""Covariance that the choice of samples gives to the gradient of a step."""

from typing import NamedTuple

from ntkdp.batches import Batches, FixedSize


class Sampling(NamedTuple):
    r"""Of the sum :math:`D = \sum_i d_i` of what samples do, over their share of a batch.

    .. math:: \operatorname{Cov} = \text{alone} \sum_i d_i d_i^\top - \text{together}\, D D^\top

    Samples that are drawn each by itself have :math:`1/q - 1` and 0. In a batch of a fixed size one
    that is drawn keeps another out, :math:`\operatorname{Cov}(b_i, b_j) = -q(1 - q)/(n - 1)`: the
    two are :math:`(1/q - 1)` times :math:`n/(n - 1)` and :math:`1/(n - 1)`. *Derived*. Only in the
    excess of the loss's variance they count as if each were drawn by itself, ``alone``.
    """

    alone: float
    together: float

    @classmethod
    def of(cls, batches: Batches, n_samples: int) -> "Sampling":
        """That of batches of so many samples: nothing if they are not drawn at random."""
        share = batches.share(n_samples) if batches.is_random else 1.0
        alone = 1 / share - 1
        if not isinstance(batches, FixedSize) or share == 1:
            return cls(alone, 0.0)
        together = alone / (n_samples - 1)
        return cls(n_samples * together, together)
