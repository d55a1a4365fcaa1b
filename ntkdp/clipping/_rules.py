"""The clipping rules that come with the library, and rules of the user's own."""

from collections.abc import Callable
from typing import ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ScalarLike, as_constant, is_traced
from ntkdp.clipping._rule import (
    ByGroup,
    ClippingRule,
    Numbers,
    Scope,
    checked_clip_norm,
    in_range,
    over_samples,
)


def _checked_Z(Z: ByGroup | None) -> Numbers | None:
    return None if Z is None else as_constant(validate.positive(Z=Z))


def _checked_gamma(gamma: ScalarLike) -> Numbers:
    number: Numbers = as_constant(validate.scalar(gamma=validate.non_negative(gamma=gamma)))
    return number


def _checked_r(r: ScalarLike) -> Numbers:
    number: Numbers = as_constant(validate.positive_number(r=r))
    return number


def _shortening(s: Array, R: Array) -> Array:
    """min(1, R/s), also where R is zero because it is below the range of the dtype."""
    within = s <= R
    return jnp.where(within, 1.0, R / jnp.where(within, 1.0, s))


class NoClipping(ClippingRule):
    """Every factor is 1: plain gradient descent, unbounded sensitivity, no privacy.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.NoClipping().factors(jnp.array([0.5, 2.0])).tolist()
    [1.0, 1.0]
    """

    scope: Scope = eqx.field(static=True)
    bounds_each_sample: ClassVar[bool] = False
    needs_total_norm: ClassVar[bool] = False

    def __init__(self, scope: Scope = "flat") -> None:
        self.scope = scope

    @property
    def R(self) -> np.ndarray:
        """One, so that every rule has a clipping norm; it is not used."""
        return np.asarray(1.0)

    def _weight(self, s: Array, R: Array) -> Array:
        return jnp.where(jnp.isnan(s), s, 1.0)


class Abadi(ClippingRule):
    """min(1, R/s): gradients longer than R are shortened to R (Abadi et al. 2016)."""

    R: ByGroup = eqx.field(converter=checked_clip_norm)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        return _shortening(s, R)


class Global(ClippingRule):
    """The 0/1 rule of Bu et al. (2023): it drops samples with s > Z and scales the others by R/Z.

    Without ``Z`` it drops samples with s > R and scales nothing.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Global(1.0, Z=4.0).factors(jnp.array([0.5, 2.0, 5.0])).tolist()
    [0.25, 0.25, 0.0]
    """

    R: ByGroup = eqx.field(converter=checked_clip_norm)
    Z: ByGroup | None = eqx.field(default=None, converter=_checked_Z)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if self.Z is not None and np.ndim(self.Z) > 0 and np.shape(self.Z) != np.shape(self.R):
            raise ValueError(
                f"Z must be one number or have the shape of R, got {np.shape(self.Z)} "
                f"for R of shape {np.shape(self.R)}"
            )

    def _weight(self, s: Array, R: Array) -> Array:
        if self.Z is None:
            factor = (s <= R).astype(s.dtype)
        else:
            # In the precision that R and Z were given in: either may be beyond that of the norms.
            with np.errstate(over="ignore"):
                ratio = cast(Numbers, self.R) / cast(Numbers, self.Z)
            factor = jnp.where(s <= over_samples(self.Z, s), over_samples(ratio, s), 0.0)
        return jnp.where(jnp.isnan(s), s, factor)


class Automatic(ClippingRule):
    """R/(s + gamma): every gradient is normalised (Bu et al. 2206.07136).

    ``gamma = 0`` is AUTO-V (with factor 0 at s = 0), ``gamma > 0`` AUTO-S.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Automatic(1.0, gamma=0.0).factors(jnp.array([0.5, 2.0])).tolist()
    [2.0, 0.5]
    """

    R: ByGroup = eqx.field(converter=checked_clip_norm)
    gamma: ScalarLike = eqx.field(default=0.01, converter=_checked_gamma)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        denominator = s + in_range(self.gamma, s.dtype)
        is_zero = denominator == 0
        factor = jnp.where(is_zero, 0.0, R / jnp.where(is_zero, 1.0, denominator))
        # Where the quotient overflows, the largest number still keeps s w(s) below R.
        return jnp.minimum(factor, jnp.finfo(s.dtype).max)


class PSAC(ClippingRule):
    """R / (s + r/(s + r)): unlike `Automatic` it does not blow up small gradients (2212.00328).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.PSAC(3.0, r=1.0).factors(jnp.array([0.0, 1.0])).tolist()
    [3.0, 2.0]
    """

    R: ByGroup = eqx.field(converter=checked_clip_norm)
    r: ScalarLike = eqx.field(default=0.1, converter=_checked_r)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        # Processors may take an r below the smallest normal number for zero, and 0 / 0 is NaN.
        r = jnp.maximum(in_range(self.r, s.dtype), jnp.finfo(s.dtype).tiny)
        return jnp.minimum(R / (s + r / (s + r)), jnp.finfo(s.dtype).max)


class Batch(ClippingRule):
    """One factor for all samples, min(1, R/||sum_i g_i||): not private, but compared in Table 1.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Batch(1.0).factors(jnp.array([3.0, 1.0]), jnp.asarray(4.0)).tolist()
    [0.25, 0.25]
    """

    R: ByGroup = eqx.field(converter=checked_clip_norm)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = False
    needs_total_norm: ClassVar[bool] = True

    def _weight(self, s: Array, R: Array) -> Array:
        return _shortening(s, R)


class Custom(ClippingRule):
    r"""Any factor ``function(s)`` with :math:`|s\,w(s)| \le R`.

    When the rule is made, the bound is checked on norms from 1e-6 R to 1e6 R within the dtype.
    Afterwards it is enforced at every norm by capping the factor at R/s, so the sensitivity holds
    whatever the function does in between.

    Parameters
    ----------
    function : callable
        A function in JAX that maps norms to factors, element by element.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> rule = ntkdp.clipping.Custom(lambda s: 1 / (1 + s), 1.0)
    >>> rule.factors(jnp.array([0.0, 1.0])).tolist()
    [1.0, 0.5]
    """

    function: Callable[[Array], Array] = eqx.field(static=True)
    R: ByGroup = eqx.field(converter=checked_clip_norm)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must map norms to factors, got {self.function!r}")
        if is_traced(self.R):
            return
        smallest = float(np.min(self.R))
        with np.errstate(over="ignore"):
            norms = smallest * np.logspace(-6, 6, 1201)
        # The rule may be made while a program is traced.
        with jax.ensure_compile_time_eval():
            s = in_range(norms, jnp.result_type(float))
            factors = self.function(s)
        if getattr(factors, "shape", None) != s.shape:
            raise ValueError(
                f"function must map norms of shape {s.shape} to factors of that shape, "
                f"got {getattr(factors, 'shape', factors)!r}"
            )
        clipped = np.asarray(s, np.float64) * np.asarray(factors, np.float64)
        worst = int(np.argmax(np.where(np.isnan(clipped), np.inf, np.abs(clipped))))
        tolerance = 100 * float(jnp.finfo(s.dtype).eps)
        if not abs(clipped[worst]) <= smallest * (1 + tolerance):
            raise ValueError(
                f"a custom rule must keep |s w(s)| <= R = {smallest}, "
                f"got s w(s) = {clipped[worst]} at s = {float(s[worst])}"
            )

    def _weight(self, s: Array, R: Array) -> Array:
        is_zero, factor = s == 0, self.function(s)
        cap = jnp.minimum(R / jnp.where(is_zero, 1.0, s), jnp.finfo(s.dtype).max)
        # 0 * inf is NaN, so a non-finite factor at norm 0 is set to 0.
        at_zero = jnp.where(jnp.isfinite(factor), factor, 0.0)
        factor = jnp.where(is_zero, at_zero, jnp.clip(factor, -cap, cap))
        return jnp.where(jnp.isinf(s), 0.0, jnp.where(jnp.isnan(s), s, factor))
