"""Noise of the summed gradient over the steps of a run."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias, final

import equinox as eqx
import numpy as np

from ntkdp._backend.types import Array, Float, PRNGKeyArray, PyTree
from ntkdp.batches import Batches
from ntkdp.noise import _sensitivity
from ntkdp.noise._recursion import Recursion

#: Standard normal numbers of a step, by its key, in the shapes of the gradient.
Draw: TypeAlias = Callable[[PRNGKeyArray], PyTree]


class Noise(eqx.Module):
    r"""Noise of all steps, in units of :math:`\sigma S`: the rows of :math:`C^{-1} Z`.

    C is the lower triangular strategy of a matrix mechanism, and the rows of Z are independent
    standard normal vectors, one for each step. Subclasses are final.

    Examples
    --------
    >>> import jax, ntkdp
    >>> noise = ntkdp.noise.Correlated([1.0, 0.5])
    >>> noise.mixing(3).tolist()
    [[1.0, 0.0, 0.0], [-0.5, 1.0, 0.0], [0.25, -0.5, 1.0]]
    """

    @abstractmethod
    def start(self, like: PyTree) -> PyTree:
        """What is carried from step to step, before the first, for noise of these shapes."""

    @abstractmethod
    def next(
        self, draw: Draw, key: PRNGKeyArray, number: Array | int, carried: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The noise of a step, by its key and its number, and what is carried on."""

    @abstractmethod
    def strategy_matrix(self, steps: int) -> Float[np.ndarray, "T T"]:
        """The strategy C of so many steps."""

    @abstractmethod
    def recursion(self, steps: int) -> Recursion:
        """What :meth:`next` does in so many steps, as matrices."""

    def mixing(self, steps: int) -> Float[np.ndarray, "T T"]:
        """The inverse of the strategy: row k makes the noise of step k."""
        from scipy.linalg import solve_triangular

        rows: np.ndarray = solve_triangular(self.strategy_matrix(steps), np.eye(steps), lower=True)
        return rows

    def sensitivity(self, batches: Batches, steps: int) -> float:
        r"""How far one sample of sensitivity one moves :math:`C G`, over all steps.

        Parameters
        ----------
        batches : batches.Batches
            Full, cyclic or shuffled ones: those of which it is certain when a sample takes part.
        steps : int
            Number of steps.

        Returns
        -------
        float
            The run is :math:`\mu`-GDP with :math:`\mu` this over the noise multiplier.

        Raises
        ------
        ValueError
            If the batches are drawn at random in each step.

        Notes
        -----
        :math:`\max_u \sqrt{\sum_{jk \in u} |(C^\top C)_{jk}|}` over the sets u of steps in which a
        sample may take part. It is exact where :math:`C^\top C` has no negative entry, and for
        shuffled epochs an upper bound. Neighbours have nothing in the place of one sample, so that
        the others keep their batches. Choquette-Choo et al. 2211.06530.

        Examples
        --------
        >>> import ntkdp
        >>> ntkdp.noise.Independent().sensitivity(ntkdp.batches.Cyclic(25), 100)
        2.0
        """
        return _sensitivity.of_batches(self.strategy_matrix(steps), batches)

    def separated_sensitivity(
        self, steps: int, separation: int, participations: int | None = None
    ) -> float:
        r"""The same if all that is certain is how far apart the steps of a sample lie.

        Parameters
        ----------
        steps : int
            Number of steps.
        separation : int
            b: a sample that takes part in step k takes part in step k + b again, or later.
        participations : int, optional
            How often it may take part; by default as often as the separation lets it.

        Raises
        ------
        ValueError
            If it is not known: the strategy has more than b bands, and is not Toeplitz with
            coefficients that are positive and do not grow.

        Notes
        -----
        With at most b bands, the columns of those steps are orthogonal (Choquette-Choo et al.
        2306.08153). Decreasing Toeplitz coefficients: Kalinin and Lampert 2405.13763, theorem 2.

        Examples
        --------
        >>> import ntkdp
        >>> ntkdp.noise.Independent().separated_sensitivity(100, 25, participations=3)
        1.7320508075688772
        """
        return _sensitivity.with_separation(self.strategy_matrix(steps), separation, participations)


def resolve(noise: Noise | None) -> Noise:
    """Noise as it is given, or independent noise.

    Parameters
    ----------
    noise : Noise or None
        None for independent noise.

    Returns
    -------
    Noise
        That of a run.

    Examples
    --------
    >>> from ntkdp import noise
    >>> type(noise.resolve(None)).__name__
    'Independent'
    """
    if noise is None:
        return Independent()
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be one of ntkdp.noise or None, got {type(noise).__name__}")
    return noise


@final
class Independent(Noise):
    """Noise of its own in each step, as in DP-SGD: C is the identity.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.noise.Independent().sensitivity(ntkdp.batches.Full(), 100)
    10.0
    """

    def start(self, like: PyTree) -> PyTree:
        """Nothing."""
        return None

    def next(
        self, draw: Draw, key: PRNGKeyArray, number: Array | int, carried: PyTree
    ) -> tuple[PyTree, PyTree]:
        """What is drawn in the step."""
        return draw(key), carried

    def strategy_matrix(self, steps: int) -> Float[np.ndarray, "T T"]:
        """The identity."""
        return np.eye(steps)

    def recursion(self, steps: int) -> Recursion:
        """Nothing is carried."""
        return Recursion(np.zeros((steps, 0)), np.ones(steps), np.zeros((0, 0)), np.zeros(0))
