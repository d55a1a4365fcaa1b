"""Noise that is correlated over the steps, by a lower triangular strategy with a few bands."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, Float, PRNGKeyArray, PyTree
from ntkdp.noise._noise import Draw, Noise


@final
class Correlated(Noise):
    r"""Noise :math:`C^{-1} Z` for a strategy C, by its Toeplitz coefficients or as a matrix.

    With b bands, :math:`x_k = (z_k - \sum_{j=1}^{b-1} C_{k,k-j} x_{k-j}) / C_{kk}`, from a buffer
    of the last b - 1 noise vectors.

    Parameters
    ----------
    strategy : array
        Toeplitz coefficients ``(b,)``, the first positive: :math:`C_{jk} = c_{j-k}`. Or a lower
        triangular matrix ``(T, T)`` with a positive diagonal, for runs of at most T steps.

    Raises
    ------
    ValueError
        If the strategy has another shape, is not finite, not lower triangular, or not positive on
        its diagonal.

    Notes
    -----
    The matrix mechanism: Denisov et al. 2202.08312; bands: Choquette-Choo et al. 2306.08153.
    A matrix with more bands than half its steps needs no buffer: the noise of earlier steps is
    drawn again from their keys, which takes time that grows with the steps and no memory.

    Examples
    --------
    >>> import ntkdp
    >>> noise = ntkdp.noise.Correlated([1.0, 0.5])
    >>> noise.n_bands, round(noise.sensitivity(ntkdp.batches.Cyclic(10), 10), 4)
    (2, 1.118)
    """

    strategy: Float[np.ndarray, " b"] | Float[np.ndarray, "T T"]
    rows: Float[np.ndarray, "T b"] | Float[np.ndarray, "T T"]
    n_bands: int = eqx.field(static=True)

    def __init__(self, strategy: ArrayLike) -> None:
        values = np.asarray(validate.real(strategy=strategy), np.float64)
        if values.ndim not in (1, 2) or values.size == 0 or len(set(values.shape)) > 1:
            raise ValueError(
                "strategy must be Toeplitz coefficients (b,) or a square matrix, got shape "
                f"{values.shape}"
            )
        if not np.all(np.isfinite(values)):
            raise ValueError("strategy must be finite, got NaN or infinity")
        diagonal = values[:1] if values.ndim == 1 else np.diagonal(values)
        if not np.all(diagonal > 0):
            raise ValueError(
                f"strategy must be positive on its diagonal, got {float(diagonal.min()):g}"
            )
        if values.ndim == 2 and np.any(np.triu(values, 1)):
            raise ValueError("strategy must be lower triangular, got entries above the diagonal")
        self.strategy = values
        self.n_bands = _bands(values)
        self.rows = self.mixing(len(values)) if self._draws_again else _by_band(values)

    @classmethod
    def square_root(cls, n_bands: int) -> "Correlated":
        r"""The coefficients of :math:`(1 - z)^{-1/2}`, cut off: good for the sum of all gradients.

        Fichtenberger et al. 2202.11205; with bands: Kalinin and Lampert 2405.13763.

        Examples
        --------
        >>> import ntkdp
        >>> ntkdp.noise.Correlated.square_root(4).strategy.tolist()
        [1.0, 0.5, 0.375, 0.3125]
        """
        k = np.arange(1, validate.count(n_bands=n_bands))
        return cls(np.cumprod(np.append(1.0, (k - 0.5) / k)))

    def strategy_matrix(self, steps: int) -> Float[np.ndarray, "T T"]:
        """The strategy of so many steps."""
        if self.strategy.ndim == 2:
            if steps > len(self.strategy):
                raise ValueError(
                    f"steps must be at most the {len(self.strategy)} of the strategy, got {steps}"
                )
            return self.strategy[:steps, :steps]
        from scipy.linalg import toeplitz

        first = np.zeros(steps)
        first[: min(steps, self.n_bands)] = self.strategy[:steps]
        matrix: np.ndarray = np.tril(toeplitz(first))
        return matrix

    @property
    def _draws_again(self) -> bool:
        return self.strategy.ndim == 2 and 2 * self.n_bands > len(self.strategy) + 1

    def start(self, like: PyTree) -> PyTree:
        """The last noise vectors, or the keys of all steps."""
        if self._draws_again:
            return jax.random.split(jax.random.key(0), len(self.strategy))
        size = self.n_bands - 1
        return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), like)

    def next(
        self, draw: Draw, key: PRNGKeyArray, number: Array | int, carried: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The noise of a step: less what the last ones had in common with it."""
        if self._draws_again:
            return self._drawn_again(draw, key, number, carried)
        fresh = draw(key)
        size = self.n_bands - 1
        row = self._row(number)
        if size == 0:
            return jax.tree.map(lambda z: z / row[0].astype(z.dtype), fresh), carried
        # Slot s holds the step before this one by j, and this step takes the place of the oldest.
        back = (number - 1 - jnp.arange(size)) % size + 1
        past = row[back]

        def noise(z: Array, buffer: Array) -> Array:
            earlier = jnp.tensordot(past.astype(z.dtype), buffer, axes=1)
            return (z - earlier) / row[0].astype(z.dtype)

        current = jax.tree.map(noise, fresh, carried)
        place = number % size
        kept = jax.tree.map(lambda buffer, x: buffer.at[place].set(x), carried, current)
        return current, kept

    def _row(self, number: Array | int) -> Float[Array, " b"]:
        """The strategy's coefficients for this step and the last ones, backwards."""
        rows = jnp.asarray(self.rows)
        return rows if self.strategy.ndim == 1 else rows[number]

    def _drawn_again(
        self, draw: Draw, key: PRNGKeyArray, number: Array | int, keys: Array
    ) -> tuple[PyTree, PyTree]:
        keys = keys.at[number].set(key)
        row = jnp.asarray(self.rows)[number]

        def add(step: Array, total: PyTree) -> PyTree:
            return jax.tree.map(
                lambda sum, z: sum + row[step].astype(z.dtype) * z, total, draw(keys[step])
            )

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw, key)
        )
        return lax.fori_loop(0, number + 1, add, zeros), keys


def _bands(strategy: np.ndarray) -> int:
    """Bands of a strategy, the diagonal among them."""
    if strategy.ndim == 1:
        return len(strategy)
    rows, columns = np.nonzero(strategy)
    return int((rows - columns).max()) + 1


def _by_band(strategy: np.ndarray) -> np.ndarray:
    """Coefficients of a step and of those before it, backwards: for all, or for each."""
    if strategy.ndim == 1:
        return strategy
    steps = np.arange(len(strategy))[:, None]
    columns = steps - np.arange(_bands(strategy))
    return np.where(columns >= 0, strategy[steps, columns], 0.0)
