"""Noise that is correlated over all steps, through a few sums that are carried on."""

from typing import final

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, Float, PRNGKeyArray, PyTree
from ntkdp.noise._noise import Draw, Noise
from ntkdp.noise._recursion import Recursion


@final
class BufferedToeplitz(Noise):
    r"""Toeplitz noise of which a few sums are carried, however many steps it reaches back.

    The strategy has the coefficients :math:`c_0 = 1` and :math:`c_t = \sum_i w_i \theta_i^{t-1}`,
    so that :math:`x_k = z_k - \sum_i w_i s_i` with :math:`s_i \leftarrow \theta_i s_i + x_k`.

    Parameters
    ----------
    decays, weights : array
        :math:`\theta_i` in [0, 1) and :math:`w_i`, one of each for a buffer.

    Raises
    ------
    ValueError
        If they differ in length, or a decay is out of its range.

    Notes
    -----
    Buffered linear Toeplitz matrices: Dvijotham, McMahan et al. 2404.16706.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.noise.BufferedToeplitz([0.5], [0.5]).strategy_matrix(3).tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    decays: Float[np.ndarray, " d"]
    weights: Float[np.ndarray, " d"]

    def __init__(self, decays: ArrayLike, weights: ArrayLike) -> None:
        theta = np.atleast_1d(np.asarray(validate.real(decays=decays), np.float64))
        omega = np.atleast_1d(np.asarray(validate.real(weights=weights), np.float64))
        if theta.ndim != 1 or theta.shape != omega.shape:
            raise ValueError(
                "weights must have the length of decays, got shapes "
                f"{omega.shape} and {theta.shape}"
            )
        if not np.all((theta >= 0) & (theta < 1)):
            raise ValueError(f"decays must be in [0, 1), got {theta}")
        if not np.all(np.isfinite(omega)):
            raise ValueError(f"weights must be finite, got {omega}")
        self.decays, self.weights = theta, omega

    def strategy_matrix(self, steps: int) -> Float[np.ndarray, "T T"]:
        """The strategy of so many steps."""
        from scipy.linalg import toeplitz

        powers = self.decays[None] ** np.arange(max(steps - 1, 0))[:, None]
        matrix: np.ndarray = np.tril(toeplitz(np.append(1.0, powers @ self.weights)[:steps]))
        return matrix

    def recursion(self, steps: int) -> Recursion:
        """The sums s."""
        reads = np.broadcast_to(-self.weights, (steps, len(self.weights)))
        return Recursion(reads, np.ones(steps), np.diag(self.decays), np.ones(len(self.decays)))

    def start(self, like: PyTree) -> PyTree:
        """The sums s, on a leading axis."""
        size = len(self.decays)
        return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), like)

    def next(
        self, draw: Draw, key: PRNGKeyArray, number: Array | int, carried: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The noise of a step: less the weighted sums of what was before."""

        def noise(z: Array, sums: Array) -> Array:
            return z - jnp.tensordot(jnp.asarray(self.weights, z.dtype), sums, axes=1)

        def summed(x: Array, sums: Array) -> Array:
            decays = jnp.asarray(self.decays, x.dtype).reshape(-1, *[1] * x.ndim)
            return decays * sums + x

        current = jax.tree.map(noise, draw(key), carried)
        return current, jax.tree.map(summed, current, carried)
