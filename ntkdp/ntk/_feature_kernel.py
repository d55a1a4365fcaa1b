"""The kernel of a model that is linear in fixed features, as a product that is not written out."""

import os

import equinox as eqx
import jax.numpy as jnp

from ntkdp._backend import memory, validate
from ntkdp._backend.types import Array, ArrayLike, Float, is_traced
from ntkdp.models import Model

_WAYS_OUT = "keep it in factored form, or use fewer samples or float32"


class FeatureKernel(eqx.Module):
    r"""A kernel :math:`\phi(x_1) \phi(x_2)^\top \otimes I_K` in factored form; a pytree.

    It is the tangent kernel of every linear head :math:`f = \phi(x) W`, at all weights. With D
    features it takes :math:`(n_1 + n_2) D` numbers in place of :math:`n_1 n_2`, and a product with
    it takes as many operations for each output. :class:`ntkdp.KernelFlow` and what takes one work
    with the factors alone.

    Parameters
    ----------
    rows : array
        Features ``(n1, D)`` of the points whose outputs move.
    columns : array, optional
        Features ``(n2, D)`` of the points that move them; by default those of ``rows``.

    Raises
    ------
    TypeError, ValueError
        If features are not matrices of real numbers with the same D, or have no entries.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    >>> kernel = ntkdp.FeatureKernel(x)
    >>> kernel.shape, kernel.written_out()[0].tolist()
    ((3, 3), [5.0, 2.0, 5.0])
    """

    rows: Float[Array, "n1 D"]
    columns: Float[Array, "n2 D"]

    def __init__(self, rows: ArrayLike, columns: ArrayLike | None = None) -> None:
        self.rows = _features(rows=rows)
        self.columns = self.rows if columns is None else _features(columns=columns)
        if self.rows.shape[1] != self.columns.shape[1]:
            raise ValueError(
                "rows and columns must have the same number of features, got shapes "
                f"{self.rows.shape} and {self.columns.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(n1, n2)``, as the kernel would have it if it was written out."""
        return self.rows.shape[0], self.columns.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """The precision of its entries."""
        return jnp.result_type(self.rows, self.columns)

    def written_out(self) -> Float[Array, "n1 n2"]:
        """The kernel as an array ``(n1, n2)``, which means ``(x) I_K``.

        Raises
        ------
        MemoryError
            If it does not fit.
        """
        if not is_traced((self.rows, self.columns)):
            n1, n2 = self.shape
            memory.require(n1 * n2 * self.dtype.itemsize, f"a kernel of {n1} x {n2}", _WAYS_OUT)
        return self.rows @ self.columns.T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a ``.npz`` file, as :func:`ntkdp.ntk.save_kernel` does."""
        from ntkdp.ntk import _storage

        _storage.save_kernel(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureKernel":
        """Read what :meth:`save` wrote, as :func:`ntkdp.ntk.load_kernel` does."""
        from ntkdp.ntk import _storage

        return _storage.load_as(cls, path)


def linear_ntk(model: Model, x1: ArrayLike, x2: ArrayLike | None = None) -> FeatureKernel:
    r"""The tangent kernel of a linear head, :math:`\phi(x_1) \phi(x_2)^\top \otimes I_K`.

    It does not depend on the weights, and is not written out.

    Parameters
    ----------
    model : Model
        From :func:`ntkdp.models.linear`, or another with ``features``.
    x1, x2 : array
        Inputs ``(n1, ...)`` and ``(n2, ...)``; without ``x2``, x1 against itself.

    Returns
    -------
    FeatureKernel
        Of shape ``(n1, n2)``.

    Raises
    ------
    ValueError
        If the model is not linear in fixed features, or inputs are empty.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> model = ntkdp.models.linear(10)
    >>> kernel = ntkdp.ntk.linear_ntk(model, jnp.ones((4, 3)))
    >>> kernel.rows.shape, kernel.written_out()[0, 1].item()  # three features and a bias
    ((4, 4), 4.0)
    """
    if model.features is None:
        raise ValueError(
            "model must be linear in fixed features, as that of models.linear, got one without "
            "features; use empirical_ntk"
        )
    rows = model.features(validate.array(x1=x1))
    return FeatureKernel(rows, None if x2 is None else model.features(validate.array(x2=x2)))


def _features(**named: ArrayLike) -> Float[Array, "n D"]:
    (name,) = named
    values = validate.array(**named)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"{name} must have shape (n, D), features of each point, not empty, got {values.shape}"
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.result_type(float))
    return values
