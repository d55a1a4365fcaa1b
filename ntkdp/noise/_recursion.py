"""Noise of a run as a linear recursion, for predictions that carry it in closed form."""

from typing import NamedTuple

import numpy as np

from ntkdp._backend.types import Float


class Recursion(NamedTuple):
    r"""How the noise of a step comes from a few numbers that are carried for each weight.

    .. math:: x_k = r_k \cdot s_k + d_k z_k, \qquad s_{k+1} = M s_k + e\, x_k, \qquad s_0 = 0 .

    Attributes
    ----------
    reads, draws
        r ``(T, c)`` and d ``(T,)``; the z are independent and standard normal.
    carries, enters
        M ``(c, c)`` and e ``(c,)``.
    """

    reads: Float[np.ndarray, "T c"]
    draws: Float[np.ndarray, " T"]
    carries: Float[np.ndarray, "c c"]
    enters: Float[np.ndarray, " c"]
