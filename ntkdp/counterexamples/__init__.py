r"""States and instances on which a clipped flow fails, found by search and kept as data.

Three failures of training that clipping can cause under a frozen kernel
(Bu, Wang, Dai, Long, TMLR 2023, Table 1, say which rules guarantee against which):

- the loss **rises**: :math:`dL/dt = -\sum_r a^\top H_r C_r a > 0` (:func:`find_rise` for a given
  kernel, :func:`find_smallest_rise` over kernels);
- the flow is **stuck** at non-zero loss although :math:`\sum_r H_r` is positive definite
  (:func:`find_stuck`);
- the loss **diverges** although every :math:`H_r` is (:func:`find_divergent`).

Each search starts from many random points at once and returns the one with the fewest samples and
the fewest digits, as a `Counterexample` that replays, or ``None``. **None is not a proof**: it says
that this search found nothing. The losses are those with names, SquaredError, Huber, Logistic and
SoftmaxCrossEntropy; the rules those with names, so not Custom: a function is no data.
The searches themselves are *derived* for this library.
"""

from ntkdp.counterexamples._counterexample import Counterexample
from ntkdp.counterexamples._find import find_divergent, find_rise, find_smallest_rise, find_stuck

__all__ = ["Counterexample", "find_divergent", "find_rise", "find_smallest_rise", "find_stuck"]
