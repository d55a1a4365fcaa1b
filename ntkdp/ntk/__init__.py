r"""Neural tangent kernels, empirical and infinite-width, whole and by layer.

The empirical kernel at parameters w is :math:`H(x, x') = J(x) J(x')^\top` with the Jacobian
:math:`J = \partial f / \partial w`, a ``K x K`` block for each pair of samples, and is a sum of one
positive semi-definite term a parameter group, :math:`H = \sum_r H_r`. At infinite width it becomes
:math:`\Theta(x, x') \otimes I_K`. For a linear head on features :math:`\phi(x)` it is
:math:`\phi(x) \phi(x')^\top \otimes I_K` at all parameters, which :func:`linear_ntk` keeps in
factored form.
"""

from ntkdp.ntk._empirical import (
    between_parameters,
    empirical_ntk,
    layerwise_ntk,
    preconditioned_ntk,
)
from ntkdp.ntk._feature_kernel import FeatureKernel, linear_ntk
from ntkdp.ntk._fewer_features import fewer_features
from ntkdp.ntk._infinite import infinite_ntk, layerwise_infinite_ntk
from ntkdp.ntk._layerwise_kernel import LayerwiseKernel
from ntkdp.ntk._matrices import as_matrices as as_matrices
from ntkdp.ntk._norms import gradient_structure, per_sample_gradient_norms
from ntkdp.ntk._storage import load_kernel, save_kernel
from ntkdp.ntk._two_time import TwoTimeKernel, between_times, check_two_time, two_time_kernel
from ntkdp.ntk._two_time import under_laws as under_laws

__all__ = [
    "FeatureKernel",
    "LayerwiseKernel",
    "TwoTimeKernel",
    "between_parameters",
    "between_times",
    "check_two_time",
    "empirical_ntk",
    "fewer_features",
    "gradient_structure",
    "infinite_ntk",
    "layerwise_infinite_ntk",
    "layerwise_ntk",
    "linear_ntk",
    "load_kernel",
    "per_sample_gradient_norms",
    "preconditioned_ntk",
    "save_kernel",
    "two_time_kernel",
]
