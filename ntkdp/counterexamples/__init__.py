r"""States and instances on which a clipped flow fails, found by search and kept as data.

Clipping can make training under a frozen kernel fail in three ways (Bu, Wang, Dai, Long, TMLR
2023, Table 1, say which rules exclude which):

- the loss **rises**: :math:`dL/dt = -\sum_r a^\top H_r C_r a > 0` (:func:`find_rise` for a given
  kernel, :func:`find_smallest_rise` over kernels);
- the flow is **stuck** at non-zero loss although :math:`\sum_r H_r` is positive definite
  (:func:`find_stuck`);
- the loss **diverges** although every :math:`H_r` is positive definite (:func:`find_divergent`).

Each search starts from many random points at once and returns the failure with the fewest samples
and the fewest digits, as a `Counterexample` that replays, or ``None``. **None is not a proof**: it
says that this search found nothing. The loss and the rule must have names, since a function cannot
be kept as data: SquaredError, Huber, Logistic or SoftmaxCrossEntropy, and any rule but Custom.
The searches themselves are *derived* for this library.
"""

from ntkdp.counterexamples._counterexample import Counterexample
from ntkdp.counterexamples._find import find_divergent, find_rise, find_smallest_rise, find_stuck

__all__ = ["Counterexample", "find_divergent", "find_rise", "find_smallest_rise", "find_stuck"]
