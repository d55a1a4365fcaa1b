r"""Noise of the summed gradient, independent or correlated over the steps.

In units of :math:`\sigma S`, the noise of step k is row k of :math:`C^{-1} Z`, with Z standard
normal and C a lower triangular strategy (the matrix mechanism, DP-FTRL). A run is
:math:`\mu`-GDP with :math:`\mu` the sensitivity of the strategy over :math:`\sigma`, where the
sensitivity depends on the steps in which a sample may take part: see :meth:`Noise.sensitivity`.
With C the identity it is the independent noise of DP-SGD.
"""

from ntkdp.noise._buffered import BufferedToeplitz
from ntkdp.noise._correlated import Correlated
from ntkdp.noise._noise import Draw as Draw
from ntkdp.noise._noise import Independent, Noise, resolve
from ntkdp.noise._recursion import Recursion as Recursion

__all__ = ["BufferedToeplitz", "Correlated", "Independent", "Noise", "resolve"]
