"""Kernels of blocks as matrices."""

from typing import TypeVar

import jax
import numpy as np

_Terms = TypeVar("_Terms", np.ndarray, jax.Array)


def as_matrices(terms: _Terms) -> _Terms:
    """Terms ``(R, m, n, K, K)`` as ``(R, m K, n K)``, samples outside and outputs inside.

    Terms ``(R, m, n)``, which mean ``(x) I_K``, are returned as they are.
    """
    if terms.ndim == 3:
        return terms
    n_terms, m, _, n_outputs, _ = terms.shape
    return terms.swapaxes(2, 3).reshape(n_terms, m * n_outputs, -1)
