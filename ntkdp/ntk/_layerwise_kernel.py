"""A kernel as a sum of terms, one for each parameter group."""

import os
from collections.abc import Iterable

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array


class LayerwiseKernel(eqx.Module):
    """A kernel as a sum of one term for each parameter group; a pytree.

    Parameters
    ----------
    names : tuple of str
        Names of the groups, in the order of the terms.
    values : array
        ``(R, n1, n2, K, K)``, or ``(R, n1, n2)`` meaning ``(x) I_K``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.LayerwiseKernel(("hidden", "output"), jnp.ones((2, 3, 3))).total[0, 0].item()
    2.0
    """

    names: tuple[str, ...] = eqx.field(static=True, converter=tuple)
    values: Array

    def __check_init__(self) -> None:
        ndim = getattr(self.values, "ndim", None)
        if ndim is None:
            return  # a pytree transformation put a placeholder here
        if ndim not in (3, 5):
            raise ValueError(
                f"values must have shape (R, n1, n2, K, K) or (R, n1, n2), got {self.values.shape}"
            )
        if self.values.shape[0] != len(self.names):
            raise ValueError(
                f"values must hold one term for each of the {len(self.names)} names, "
                f"got {self.values.shape[0]}"
            )

    @property
    def total(self) -> Array:
        """The whole kernel, the sum of the terms: ``(n1, n2, K, K)`` or ``(n1, n2)``."""
        return jnp.sum(self.values, axis=0)

    def select(self, names: Iterable[str]) -> "LayerwiseKernel":
        """The kernel if only these groups are trained, in the order that they have here.

        Raises
        ------
        ValueError
            If a name is not known, with those that are, or if there is none at all.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> kernel = ntkdp.LayerwiseKernel(("hidden", "output"), jnp.ones((2, 3, 3)))
        >>> kernel.select(["output"]).total[0, 0].item()
        1.0
        """
        wanted = tuple(names)
        if not wanted:
            raise ValueError("names must hold at least one group, got ()")
        for name in wanted:
            validate.choice(self.names, group=name)
        kept = [i for i, name in enumerate(self.names) if name in wanted]
        if len(kept) == len(self.names):
            return self
        return LayerwiseKernel(tuple(self.names[i] for i in kept), self.values[np.array(kept)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a ``.npz`` file, as :func:`ntkdp.ntk.save_kernel` does."""
        from ntkdp.ntk import _storage

        _storage.save_kernel(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerwiseKernel":
        """Read what :meth:`save` wrote, as :func:`ntkdp.ntk.load_kernel` does."""
        from ntkdp.ntk import _storage

        return _storage.load_as(cls, path)
