"""Noise that is correlated over the steps, by a lower triangular strategy with a few bands."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import validate
from ntkdp._backend.types import (
    Array,
    ArrayLike,
    Float,
    LearningRate,
    PRNGKeyArray,
    PyTree,
    ScalarLike,
)
from ntkdp.batches import Batches
from ntkdp.noise import _least_error, _workload
from ntkdp.noise._noise import Draw, Noise
from ntkdp.noise._recursion import Recursion


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
        return cls(_least_error.root(1.0, validate.count(n_bands=n_bands)))

    @classmethod
    def optimal(
        cls,
        kernel: ArrayLike,
        *,
        learning_rate: LearningRate,
        steps: int,
        n_bands: int,
        batches: Batches,
        scale: ScalarLike | None = None,
        weights: ArrayLike | None = None,
        momentum: float = 0.0,
    ) -> "Correlated":
        r"""The strategy that adds least to the final loss under a kernel, at equal privacy.

        Without noise a mode of the kernel shrinks by :math:`a = 1 - \eta s \lambda` a step, and
        noise of step j has shrunk by :math:`a^{T-1-j}` in the end. The strategy C makes

        .. math:: \operatorname{sens}(C)^2 \sum_\lambda w_\lambda \| A_\lambda C^{-1} \|^2

        least, where :math:`A_\lambda` is the row of these numbers, over Toeplitz strategies of so
        many bands without negative coefficients, the first of them one.

        Parameters
        ----------
        kernel : array
            The empirical kernel ``(n, n, K, K)``, or ``(n, n)`` meaning ``(x) I_K``, or its
            eigenvalues :math:`\lambda`, ``(m,)``; of a LayerwiseKernel its ``total``.
        learning_rate : float or optax schedule
            :math:`\eta`, the step size.
        steps : int
            T, of the whole run.
        n_bands : int
            A run carries one noise vector less than this.
        batches : batches.Batches
            Full, cyclic or shuffled ones, for the sensitivity.
        scale : float, optional
            s: what the kernel is multiplied with in a step. By default 1 / n, that of the mean of
            n squared errors without clipping, or 1 if eigenvalues are given. Clipping multiplies it
            by the mean factor. For other losses see :func:`ntkdp.stochastic_flow.optimal_noise`.
        weights : array, optional
            :math:`w_\lambda`, for given eigenvalues: the noise that a mode gets, which is in
            proportion to its eigenvalue, times its weight in the loss. By default the eigenvalues,
            for the squared error on the training set.
        momentum : float
            Of the heavy ball, in [0, 1).

        Returns
        -------
        Correlated
            Never worse than independent noise or :meth:`square_root` of so many bands.

        Raises
        ------
        ValueError
            If the kernel has another shape or a negative eigenvalue, the learning rate is unstable,
            or no strategy has a sensitivity under the batches.

        Notes
        -----
        *Derived*. For one mode and samples that take part once, C tends to
        :math:`(1 - a z)^{-1/2}` in a long run. With full batches it is independent noise, up to
        modes that hardly shrink in the run. Without negative coefficients the sensitivity is exact
        for full and cyclic batches. L-BFGS-B finds the minimum from the best of five roots; for
        1000 steps and 32 bands it takes about a second.

        Examples
        --------
        >>> import ntkdp
        >>> once = ntkdp.noise.Correlated.optimal(
        ...     [1.0], learning_rate=0.1, steps=100, n_bands=3, batches=ntkdp.batches.Cyclic(100))
        >>> once.strategy.round(3).tolist()
        [1.0, 0.509, 0.358]
        """
        steps, n_bands = validate.count(steps=steps), validate.count(n_bands=n_bands)
        beta = _momentum(momentum)
        workload = _workload.of_kernel(kernel, weights, scale, learning_rate, steps, beta)
        return cls(_least_error.coefficients(workload, n_bands, batches))

    @classmethod
    def optimal_for_rows(cls, rows: ArrayLike, *, n_bands: int, batches: Batches) -> "Correlated":
        r"""The strategy that adds least to some numbers after a run, at equal privacy.

        It makes :math:`\operatorname{sens}(C)^2 \| A C^{-1} \|_F^2` least for a workload A, over
        Toeplitz strategies of so many bands without negative coefficients, the first of them one.

        Parameters
        ----------
        rows : array
            A, ``(m, T)``: what noise of each of T steps does to each of m numbers.
        n_bands : int
            A run carries one noise vector less than this.
        batches : batches.Batches
            Full, cyclic or shuffled ones, for the sensitivity.

        Returns
        -------
        Correlated
            Never worse than independent noise or :meth:`square_root` of so many bands.

        Raises
        ------
        ValueError
            If the rows have another shape or are zero, or no strategy has a sensitivity under the
            batches.

        Notes
        -----
        *Derived*, as :meth:`optimal`, which has the rows of a kernel's modes. Those of a predicted
        run with clipping, any loss and any linear optimizer are in
        :func:`ntkdp.stochastic_flow.optimal_noise`.

        Examples
        --------
        >>> import numpy as np, ntkdp
        >>> row = 0.9 ** np.arange(100)[::-1]
        >>> noise = ntkdp.noise.Correlated.optimal_for_rows(
        ...     row[None], n_bands=3, batches=ntkdp.batches.Cyclic(100))
        >>> noise.strategy.round(3).tolist()
        [1.0, 0.509, 0.358]
        """
        workload, n_bands = _workload.of_rows(rows), validate.count(n_bands=n_bands)
        return cls(_least_error.coefficients(workload, n_bands, batches))

    @classmethod
    def optimal_for_sums(
        cls, *, steps: int, n_bands: int, batches: Batches, momentum: float = 0.0
    ) -> "Correlated":
        r"""The strategy of least mean squared error over all running sums of the gradients.

        It makes :math:`\operatorname{sens}(C)^2 \| A C^{-1} \|_F^2 / T` least, where A adds up,
        over Toeplitz strategies of so many bands without negative coefficients, the first of them
        one.
        It knows nothing of a loss: this is the standard of the matrix mechanism.

        Parameters
        ----------
        steps : int
            T, of the whole run.
        n_bands : int
            A run carries one noise vector less than this.
        batches : batches.Batches
            Full, cyclic or shuffled ones, for the sensitivity.
        momentum : float
            In [0, 1): A is what the heavy ball makes of gradients at a constant learning rate.

        Returns
        -------
        Correlated
            Never worse than independent noise or :meth:`square_root` of so many bands.

        Raises
        ------
        ValueError
            If no strategy has a sensitivity under the batches.

        Notes
        -----
        Banded strategies: Choquette-Choo et al. 2306.08153; Toeplitz: McKenna 2405.15913.

        Examples
        --------
        >>> import ntkdp
        >>> noise = ntkdp.noise.Correlated.optimal_for_sums(
        ...     steps=100, n_bands=3, batches=ntkdp.batches.Cyclic(25))
        >>> noise.strategy.round(3).tolist()
        [1.0, 0.739, 0.622]
        """
        steps, n_bands = validate.count(steps=steps), validate.count(n_bands=n_bands)
        workload = _workload.of_sums(steps, _momentum(momentum))
        return cls(_least_error.coefficients(workload, n_bands, batches))

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

    def recursion(self, steps: int) -> Recursion:
        """The noise of the last steps, one less than there are bands."""
        strategy = self.strategy if self.strategy.ndim == 1 else self.strategy_matrix(steps)
        rows = _by_band(strategy)
        if strategy.ndim == 1:
            rows = np.broadcast_to(rows, (steps, len(rows)))
        size = rows.shape[1] - 1
        enters = (np.arange(size) == 0).astype(float)
        return Recursion(-rows[:, 1:] / rows[:, :1], 1 / rows[:, 0], np.eye(size, k=-1), enters)

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


def _momentum(momentum: float) -> float:
    return float(validate.scalar(momentum=validate.decay(momentum=momentum)))


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
