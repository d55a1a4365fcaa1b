"""A clipping rule: what all rules share."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import norms as _norms
from ntkdp._backend import validate
from ntkdp._backend.types import Array, Float, ScalarLike, as_constant, is_traced

Scope = Literal["flat", "layerwise"]


SCOPES = ("flat", "layerwise")


#: One number, or one for each parameter group.
ByGroup: TypeAlias = ScalarLike | Sequence[float]


#: A checked number, or one for each parameter group.
Numbers: TypeAlias = np.ndarray | Array


def checked_clip_norm(R: ByGroup) -> Numbers:
    numbers: Numbers = as_constant(validate.positive(R=R))
    if np.size(numbers) == 0:
        raise ValueError("R must be one number, or one for each group, got an empty array")
    return numbers


def in_range(value: ByGroup, dtype: np.dtype) -> Array:
    """``value`` in ``dtype``, or the largest number of that dtype if it is beyond its range."""
    with np.errstate(over="ignore"):
        converted = jnp.asarray(value, dtype=dtype)
    return jnp.minimum(converted, jnp.finfo(dtype).max)


def norms_from_squares(squares: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square roots; ``squares`` that rounding left below zero give zero, with derivative zero.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.norms_from_squares(jnp.array([4.0, -1e-18])).tolist()
    [2.0, 0.0]
    """
    return _norms.from_squares(squares)


def clip_fraction(factors: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Share of ``factors`` below one, counted over samples, and over groups if layerwise.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.clip_fraction(jnp.array([1.0, 0.5])).item()
    0.5
    """
    return jnp.mean(factors < 1, dtype=factors.dtype)


class ClippingRule(eqx.Module):
    r"""A clipping rule: norms in, factors out.

    Parameters
    ----------
    R : float or array
        Clipping norm, positive, in units of a per-sample gradient's norm. With
        ``scope="layerwise"`` one number (R in every group) or one for each group.
    scope : {"flat", "layerwise"}

    Raises
    ------
    ValueError
        If R is not positive and finite, if the scope is unknown, or if there are several R with
        flat scope.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Abadi(1.0).factors(jnp.array([0.5, 2.0])).tolist()
    [1.0, 0.5]
    >>> round(ntkdp.clipping.Abadi(1.0, scope="layerwise").sensitivity(4), 12)
    2.0
    """

    if TYPE_CHECKING:
        # As fields they would come first among the arguments of every rule for a type checker.
        @property
        def R(self) -> ByGroup: ...

        @property
        def scope(self) -> Scope: ...
    else:
        R: eqx.AbstractVar[ByGroup]  # a field, or a property where it means nothing
        scope: eqx.AbstractVar[Scope]
    #: Whether the factors bound each sample's part, so that noise can make the sum private.
    bounds_each_sample: eqx.AbstractClassVar[bool]
    #: Whether ``factors`` needs ``total_norm``.
    needs_total_norm: eqx.AbstractClassVar[bool]

    @abstractmethod
    def _weight(self, s: Array, R: Array) -> Array:
        """w(s) elementwise, R of a shape that broadcasts against s."""

    def __check_init__(self) -> None:
        validate.choice(SCOPES, scope=self.scope)
        if np.ndim(self.R) > (1 if self.scope == "layerwise" else 0):
            raise ValueError(
                f"R must be one number with scope={self.scope!r}, got shape {np.shape(self.R)}"
                + ("" if self.scope == "layerwise" else "; several R need scope='layerwise'")
            )

    def factors(
        self,
        norms: Float[Array, "*groups n"],
        total_norm: Float[Array, "*groups"] | None = None,
    ) -> Float[Array, "*groups n"]:
        r"""Clipping factors :math:`C_i` (flat) or :math:`C_{ir}` (layerwise).

        Parameters
        ----------
        norms : array
            Per-sample gradient norms, ``(n,)`` if flat or ``(R, n)`` if layerwise.
        total_norm : array, optional
            :math:`\|\sum_i g_i\|`, a scalar if flat or ``(R,)`` if layerwise. Only `Batch` needs
            it.
        """
        expected = 1 if self.scope == "flat" else 2
        if norms.ndim != expected:
            shape = "(n,)" if self.scope == "flat" else "(groups, n)"
            raise ValueError(
                f"norms must have shape {shape} with scope={self.scope!r}, got {norms.shape}"
            )
        if self.scope == "layerwise":
            self.check_groups(norms.shape[0])
        if self.needs_total_norm:
            if total_norm is None:
                raise ValueError(
                    f"{type(self).__name__} needs total_norm, the norm of the summed gradient"
                )
            s = jnp.broadcast_to(jnp.asarray(total_norm)[..., None], norms.shape)
        else:
            s = norms
        return self._weight(s, over_samples(self.R, s))

    def by_group(
        self, norms: Float[Array, "R n"], total_norms: Float[Array, " R"] | None = None
    ) -> Float[Array, "R n"]:
        """Factors as a row for each group, whatever the scope: flat has a single row."""
        if self.scope == "layerwise":
            return self.factors(norms, total_norms)
        return self.factors(norms[0], None if total_norms is None else total_norms[0])[None]

    def sensitivity(self, n_groups: int = 1) -> float | Array:
        r"""Largest norm of a clipped gradient: R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise.

        The clipped sum moves this far at most when one sample is added or removed; replacing one
        moves it by at most twice that. It is infinite for rules that bound no single sample.
        """
        if not self.bounds_each_sample:
            return float("inf")
        if self.scope == "flat":
            return cast(Array, self.R) if is_traced(self.R) else float(np.asarray(self.R))
        R = self.group_norms(n_groups)
        if isinstance(R, np.ndarray):
            return math.hypot(*R)
        # As hypot does, scale first: squares may leave the range of the dtype.
        largest = lax.stop_gradient(jnp.max(R))
        return largest * jnp.sqrt(jnp.sum((R / largest) ** 2))

    def shares(
        self, norms: Float[Array, "R n"], noise_per_group: bool = False
    ) -> Float[Array, " n"]:
        r"""What each sample adds to a step, over the sensitivity: :math:`C_i \|g_i\| / S`.

        ``norms`` has a row for each group, and flat clipping has one. With ``noise_per_group``,
        noise of a group is in proportion to its own norm. A sample whose gradient is not finite
        adds nothing.

        Raises
        ------
        ValueError
            If the rule does not bound what a sample adds.

        Examples
        --------
        >>> import jax.numpy as jnp, ntkdp
        >>> ntkdp.clipping.Abadi(2.0).shares(jnp.array([[1.0, 5.0]])).tolist()
        [0.5, 1.0]
        """
        if not self.bounds_each_sample:
            raise ValueError(
                f"clipping must bound each sample, e.g. Abadi, got {type(self).__name__}"
            )
        clipped = self.by_group(norms) * norms
        clipped = jnp.where(jnp.isfinite(clipped), clipped, 0.0)
        n_groups = norms.shape[0]
        scale = jnp.asarray(self.sensitivity(n_groups), clipped.dtype)
        if noise_per_group:
            # Equal shares of the budget, whatever the norms are.
            of_groups = jnp.asarray(self.group_norms(n_groups), clipped.dtype)
            scale = of_groups[:, None] * n_groups**0.5
        shares: Array = jnp.linalg.norm(clipped / scale, axis=0)
        return shares

    def group_norms(self, n_groups: int) -> np.ndarray | Array:
        """R of each group, shape ``(n_groups,)``."""
        self.check_groups(n_groups)
        if is_traced(self.R):
            return jnp.broadcast_to(cast(Array, self.R), (n_groups,))
        return np.broadcast_to(np.asarray(self.R), (n_groups,))

    def check_groups(self, n_groups: int) -> None:
        """Raise unless R fits ``n_groups`` groups."""
        validate.count(n_groups=n_groups)
        if np.ndim(self.R) == 1 and np.shape(self.R)[0] != n_groups:
            raise ValueError(
                f"R has {np.shape(self.R)[0]} entries for {n_groups} parameter groups; "
                "give one number, or one for each group"
            )


def over_samples(value: ByGroup, s: Array) -> Array:
    """One number, or one for each group, repeated for each norm in ``s``."""
    numbers = in_range(value, s.dtype)
    return jnp.broadcast_to(numbers[:, None] if numbers.ndim == 1 else numbers, s.shape)
