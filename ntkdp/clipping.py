r"""Per-sample clipping: rules that map gradient norms to factors.

The **rule** is the factor :math:`C = w(s)` as a function of a norm :math:`s`; the **scope** says of
what: ``"flat"``, one norm over all parameters, or ``"layerwise"``, one a parameter group (a layer,
or the user's groups). A rule never sees a gradient, so one object serves the kernel flow and the
discrete run.

===============  ==============================  ===========  ====================================
rule             factor w(s)                     sensitivity  source
===============  ==============================  ===========  ====================================
`NoClipping`     1                               unbounded
`Abadi`          min(1, R/s)                     R            Abadi et al. 2016
`Global`         1[s <= R]; (R/Z) 1[s <= Z]      R            Bu et al. 2023 (v3)
`Automatic`      R/(s + gamma)                   R            Bu et al. 2206.07136
`PSAC`           R / (s + r/(s + r))             R            2212.00328
`Batch`          min(1, R/||sum_i g_i||), one    unbounded    Bu et al. 2023, Table 1
`Custom`         any w with s w(s) <= R          R
===============  ==============================  ===========  ====================================

Layerwise, the sensitivity is :math:`\sqrt{\sum_r R_r^2}`.

Edge cases, the same for every rule: a norm of **zero** gives the limit of w at zero (1 for
`NoClipping`, `Abadi` and `Batch`, R/Z or 1 for `Global`, R/gamma for `Automatic`, or 0 if gamma is
0, R for `PSAC`); an **infinite** norm gives 0, except for `NoClipping`; a **NaN** norm gives NaN,
so that trouble is seen. (:mod:`ntkdp.dp_sgd` drops samples whose gradient norm is not finite.)
A factor beyond the dtype of the norms is its largest number.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp._backend import norms as _norms
from ntkdp._backend import validate
from ntkdp._backend.types import Array, Float, as_constant, is_traced

Scope = Literal["flat", "layerwise"]
SCOPES = ("flat", "layerwise")


def _checked(check: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    return lambda value: as_constant(check(**{name: value}))


def _checked_number(check: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    return lambda value: as_constant(validate.scalar(**{name: check(**{name: value})}))


def _checked_R(R: Any) -> Any:
    R = _checked(validate.positive, "R")(R)
    if np.size(R) == 0:
        raise ValueError("R must be one number, or one a group, got an empty array")
    return R


def _in_range(value: Any, dtype: Any) -> Array:
    """``value`` in ``dtype``; the largest number of that if it is beyond."""
    with np.errstate(over="ignore"):
        found = jnp.asarray(value, dtype=dtype)
    return jnp.minimum(found, jnp.finfo(dtype).max)


def norms_from_squares(squares: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square roots, zero for ``squares`` that rounding left below zero; derivative zero at zero.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.norms_from_squares(jnp.array([4.0, -1e-18])).tolist()
    [2.0, 0.0]
    """
    return _norms.from_squares(squares)


def clip_fraction(factors: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Share of ``factors`` below one: of samples, or layerwise of samples and groups.

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
        ``scope="layerwise"`` one number (R in every group) or one a group.
    scope : {"flat", "layerwise"}

    Raises
    ------
    ValueError
        R not positive and finite, an unknown scope, or several R with flat scope.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Abadi(1.0).factors(jnp.array([0.5, 2.0])).tolist()
    [1.0, 0.5]
    >>> round(ntkdp.clipping.Abadi(1.0, scope="layerwise").sensitivity(4), 12)
    2.0
    """

    R: eqx.AbstractVar[Any]  # a field, or a property where it means nothing
    scope: eqx.AbstractVar[Any]
    #: Whether the factors bound each sample's part, i.e. whether noise can make the sum private.
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
            Per-sample gradient norms, ``(n,)`` flat or ``(R, n)`` layerwise.
        total_norm : array, optional
            :math:`\|\sum_i g_i\|`, a scalar flat or ``(R,)`` layerwise; needed by `Batch` only.
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
        return self._weight(s, _over_samples(self.R, s))

    def by_group(
        self, norms: Float[Array, "R n"], total_norms: Float[Array, " R"] | None = None
    ) -> Float[Array, "R n"]:
        """The same for either scope, with a row for each group: a single one with flat scope."""
        if self.scope == "layerwise":
            return self.factors(norms, total_norms)
        return self.factors(norms[0], None if total_norms is None else total_norms[0])[None]

    def sensitivity(self, n_groups: int = 1) -> Any:
        r"""Largest norm of a clipped gradient: R flat, :math:`\sqrt{\sum_r R_r^2}` layerwise.

        It is how far the clipped sum moves when one sample is added or removed; replacing one
        moves it by at most twice that. Infinite for rules that bound no single sample.
        """
        if not self.bounds_each_sample:
            return float("inf")
        if self.scope == "flat":
            return self.R if is_traced(self.R) else float(self.R)
        R = self.group_norms(n_groups)
        if not is_traced(R):
            return math.hypot(*R)
        # Scaled, as hypot does it: squares may leave the range of the dtype.
        largest = lax.stop_gradient(jnp.max(R))
        return largest * jnp.sqrt(jnp.sum((R / largest) ** 2))

    def group_norms(self, n_groups: int) -> Any:
        """R of each group, shape ``(n_groups,)``."""
        self.check_groups(n_groups)
        if is_traced(self.R):
            return jnp.broadcast_to(self.R, (n_groups,))
        return np.broadcast_to(np.asarray(self.R), (n_groups,))

    def check_groups(self, n_groups: int) -> None:
        """Raise unless R fits ``n_groups`` groups."""
        validate.count(n_groups=n_groups)
        if np.ndim(self.R) == 1 and np.shape(self.R)[0] != n_groups:
            raise ValueError(
                f"R has {np.shape(self.R)[0]} entries for {n_groups} parameter groups; "
                "give one number, or one a group"
            )


def _over_samples(value: Any, s: Array) -> Array:
    """One number, or one a group, for each norm in ``s``."""
    found = _in_range(value, s.dtype)
    return jnp.broadcast_to(found[:, None] if found.ndim == 1 else found, s.shape)


def _shortening(s: Array, R: Array) -> Array:
    """min(1, R/s), also where R is below the range of the dtype, and so zero."""
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

    @property  # type: ignore[misc]
    def R(self) -> Any:
        """Not used; one, so that every rule has a clipping norm."""
        return np.asarray(1.0)

    def _weight(self, s: Array, R: Array) -> Array:
        return jnp.where(jnp.isnan(s), s, 1.0)


class Abadi(ClippingRule):
    """min(1, R/s): gradients longer than R are shortened to R (Abadi et al. 2016)."""

    R: Any = eqx.field(converter=_checked_R)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        return _shortening(s, R)


class Global(ClippingRule):
    """The 0/1 rule of Bu et al. (2023): samples with s > Z are dropped, the others scaled by R/Z.

    Without ``Z`` the cut is at R and nothing is scaled.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Global(1.0, Z=4.0).factors(jnp.array([0.5, 2.0, 5.0])).tolist()
    [0.25, 0.25, 0.0]
    """

    R: Any = eqx.field(converter=_checked_R)
    Z: Any = eqx.field(
        default=None,
        converter=lambda Z: None if Z is None else _checked(validate.positive, "Z")(Z),
    )
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def __check_init__(self) -> None:
        if np.ndim(self.Z) > 0 and np.shape(self.Z) != np.shape(self.R):
            raise ValueError(
                f"Z must be one number or have the shape of R, got {np.shape(self.Z)} "
                f"for R of shape {np.shape(self.R)}"
            )

    def _weight(self, s: Array, R: Array) -> Array:
        if self.Z is None:
            factor = (s <= R).astype(s.dtype)
        else:
            with np.errstate(over="ignore"):  # Of the numbers as given: both may be out of range.
                ratio = self.R / self.Z
            factor = jnp.where(s <= _over_samples(self.Z, s), _over_samples(ratio, s), 0.0)
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

    R: Any = eqx.field(converter=_checked_R)
    gamma: Any = eqx.field(default=0.01, converter=_checked_number(validate.non_negative, "gamma"))
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        denominator = s + _in_range(self.gamma, s.dtype)
        is_zero = denominator == 0
        factor = jnp.where(is_zero, 0.0, R / jnp.where(is_zero, 1.0, denominator))
        # Where the quotient overflows, s w(s) is below R with the largest number too.
        return jnp.minimum(factor, jnp.finfo(s.dtype).max)


class PSAC(ClippingRule):
    """R / (s + r/(s + r)): small gradients are not blown up as `Automatic` does (2212.00328).

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.PSAC(3.0, r=1.0).factors(jnp.array([0.0, 1.0])).tolist()
    [3.0, 2.0]
    """

    R: Any = eqx.field(converter=_checked_R)
    r: Any = eqx.field(default=0.1, converter=_checked_number(validate.positive, "r"))
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        # Below the smallest normal number r would be taken for zero, and zero over zero is NaN.
        r = jnp.maximum(_in_range(self.r, s.dtype), jnp.finfo(s.dtype).tiny)
        return jnp.minimum(R / (s + r / (s + r)), jnp.finfo(s.dtype).max)


class Batch(ClippingRule):
    """One factor for all samples, min(1, R/||sum_i g_i||): no privacy; Table 1's comparison.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Batch(1.0).factors(jnp.array([3.0, 1.0]), jnp.asarray(4.0)).tolist()
    [0.25, 0.25]
    """

    R: Any = eqx.field(converter=_checked_R)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = False
    needs_total_norm: ClassVar[bool] = True

    def _weight(self, s: Array, R: Array) -> Array:
        return _shortening(s, R)


class Custom(ClippingRule):
    r"""Any factor ``function(s)`` with :math:`|s\,w(s)| \le R`.

    The bound is checked on norms from 1e-6 R to 1e6 R, within the dtype, when the rule is made, and
    enforced at every norm afterwards by capping the factor at R/s, so the sensitivity holds
    whatever the function does between.

    Parameters
    ----------
    function : callable
        Norms to factors, elementwise, in JAX.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> rule = ntkdp.clipping.Custom(lambda s: 1 / (1 + s), 1.0)
    >>> rule.factors(jnp.array([0.0, 1.0])).tolist()
    [1.0, 0.5]
    """

    function: Callable[[Array], Array] = eqx.field(static=True)  # type: ignore[misc]
    R: Any = eqx.field(converter=_checked_R)
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
        with jax.ensure_compile_time_eval():  # The rule may be made while a program is traced.
            s = _in_range(norms, jnp.result_type(float))
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


_CLASSES: dict[str, type[ClippingRule]] = {
    "none": NoClipping,
    "abadi": Abadi,
    "global": Global,
    "automatic": Automatic,
    "psac": PSAC,
    "batch": Batch,
}


def names() -> tuple[str, ...]:
    """The names of all rules, as :func:`from_name` takes them.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.clipping.names()
    ('none', 'abadi', 'global', 'automatic', 'psac', 'batch')
    """
    return tuple(_CLASSES)


def class_of(rule: str) -> type[ClippingRule]:
    """The class of the rule called ``rule``.

    Raises
    ------
    ValueError
        If the name is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.clipping.class_of("abadi") is ntkdp.clipping.Abadi
    True
    """
    return validate.lookup(_CLASSES, rule=rule)


def name_of(rule: ClippingRule) -> str:
    """The name under which :func:`from_name` makes a rule like ``rule``.

    Raises
    ------
    TypeError
        If the rule has no name, as :class:`Custom` has none.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.clipping.name_of(ntkdp.clipping.Abadi(1.0))
    'abadi'
    """
    for name, known in _CLASSES.items():
        if type(rule) is known:
            return name
    raise TypeError(
        f"rule must be one of {', '.join(sorted(_CLASSES))}, got {type(rule).__name__}: "
        "a function cannot be written down as data"
    )


def from_name(rule: str, **options: Any) -> ClippingRule:
    """The rule called ``rule``: none, abadi, global, automatic, psac or batch.

    ``options`` are the fields of the rule: R, scope and its own.

    Raises
    ------
    ValueError
        If the name is not known; the message gives the nearest one.

    Examples
    --------
    >>> import ntkdp
    >>> type(ntkdp.clipping.from_name("abadi", R=1.0)).__name__
    'Abadi'
    """
    return class_of(rule)(**options)
