r"""Spectra of clipped kernels: dense, matrix-free, and the sharpness along a run.

Clipping turns the kernel H into the operator :math:`HC` (flat) or :math:`\sum_r H_r C_r`
(layerwise), which is not symmetric. Two spectra matter: its eigenvalues say whether the linearised
outputs settle, and those of its symmetric part whether the loss can rise on the way,
:math:`\dot L = -a^\top \mathrm{sym}(\sum_r H_r C_r)\, a`.

Everything that takes a kernel works under ``jit``. General eigenvalues (layerwise) exist in JAX on
the CPU and on GPUs only.
"""

from ntkdp.spectrum._dense import as_matrices as as_matrices
from ntkdp.spectrum._dense import (
    clipped_operator,
    condition_number,
    eigenvalues,
    has_positive_eigenvalues,
    has_positive_quadratic_form,
    symmetric_eigenvalues,
)
from ntkdp.spectrum._dense import is_positive_definite as is_positive_definite
from ntkdp.spectrum._dense import symmetric_part as symmetric_part
from ntkdp.spectrum._dense import to_unit_diagonal as to_unit_diagonal
from ntkdp.spectrum._matrix_free import (
    ExtremeEigenvalues,
    Sharpness,
    extreme_eigenvalues,
    sharpness,
    sharpness_along,
)

__all__ = [
    "ExtremeEigenvalues",
    "Sharpness",
    "clipped_operator",
    "condition_number",
    "eigenvalues",
    "extreme_eigenvalues",
    "has_positive_eigenvalues",
    "has_positive_quadratic_form",
    "sharpness",
    "sharpness_along",
    "symmetric_eigenvalues",
]
