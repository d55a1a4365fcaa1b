r"""Accounting: the epsilon of a noise multiplier, and the noise multiplier for an epsilon.

One step releases :math:`\sum_{i \in batch} C_i g_i + \sigma S z` with :math:`z \sim N(0, I)`; the
batch is the whole data set (``sample_rate=1``), or takes every sample on its own with probability
``sample_rate`` (Poisson sampling), or is a share ``sample_rate`` of the samples, drawn without
replacement (``sampling="fixed_size"``). All steps together are
:math:`(\varepsilon, \delta)`-private. Full batches and Poisson sampling are so for data sets that
differ by **adding or removing one sample**, and batches of a fixed size for those that differ by
**replacing one**, which moves a sum by up to 2 S. Full batches with a sample replaced are
``sampling="fixed_size"`` with a share of one.

Epsilon does not depend on the clipping rule, its norm R or the groups: the noise is in proportion
to the sensitivity S (R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise), so only :math:`\sigma`
counts. Learning rate, optimizer and reduction come after the noise and cost nothing. If a sample is
*replaced* under Poisson sampling, use group privacy,
:math:`(2\varepsilon, (1 + e^\varepsilon)\delta)`.

==========  ==================================================================  =================
accountant  method                                                              epsilon
==========  ==================================================================  =================
``"pld"``   privacy loss distribution, exact formula for full batches (Balle    an upper bound,
            and Wang 2018), else discretised pessimistically (Doroshenko et     nearly tight
            al. 2207.04380)
``"rdp"``   Renyi divergence (Mironov 2017; sampling: Mironov, Talwar, Zhang    an upper bound
            1908.10530), converted to epsilon by Google's ``dp-accounting``
==========  ==================================================================  =================

For batches of a fixed size both begin with a step's trade-off function (Dong, Roth, Su 1905.02383,
section 4), which is exact. Both bounds fall as :math:`\sigma` or delta grows, and grow with the
sampling rate and the steps. :func:`gaussian_dp` has the central limit theorem's figure, which is
**not a guarantee** for sampled batches. :func:`composed_epsilon` counts steps that differ, as in
phases of training. A :class:`Budget` may stand where a run or a prediction asks for :math:`\sigma`,
which then follows from the number of steps; cyclic and shuffled batches and correlated noise have
their accountant there. :func:`neighbours` says for which data sets a run's guarantee holds.
:func:`individual` says what a run, or a prediction of one, costs each sample, and
:func:`last_iterate` what the last weights alone give away. :func:`audit` says what an attack found,
which bounds epsilon from below.
"""

from ntkdp.privacy._audit import Advantage, Audit, advantage, audit, audit_one_run
from ntkdp.privacy._budget import Budget, as_noise_multiplier
from ntkdp.privacy._budget import spent as spent
from ntkdp.privacy._epsilon import composed_epsilon, delta, epsilon, noise_multiplier
from ntkdp.privacy._individual import GroupExposure, IndividualPrivacy, individual
from ntkdp.privacy._last_iterate import last_iterate, last_iterate_estimate
from ntkdp.privacy._neighbours import neighbours
from ntkdp.privacy._report import GaussianDP, PrivacyReport, gaussian_dp, report
from ntkdp.privacy._sensitivities import Sensitivities

__all__ = [
    "Advantage",
    "Audit",
    "Budget",
    "GaussianDP",
    "GroupExposure",
    "IndividualPrivacy",
    "PrivacyReport",
    "Sensitivities",
    "advantage",
    "as_noise_multiplier",
    "audit",
    "audit_one_run",
    "composed_epsilon",
    "delta",
    "epsilon",
    "gaussian_dp",
    "individual",
    "last_iterate",
    "last_iterate_estimate",
    "neighbours",
    "noise_multiplier",
    "report",
]
