r"""Per-sample clipping: rules that map gradient norms to factors.

The **rule** is the factor :math:`C = w(s)` as a function of a norm :math:`s`; the **scope** says
which norm: with ``"flat"`` one over all parameters, with ``"layerwise"`` one for each parameter
group (a layer, or a group that the user names). A rule never sees a gradient, so one object serves
the kernel flow and the discrete run.

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

Edge cases are treated alike by every rule. A norm of **zero** gives the limit of w at zero (1 for
`NoClipping`, `Abadi` and `Batch`, R/Z or 1 for `Global`, R/gamma for `Automatic`, or 0 if gamma is
0, R for `PSAC`). An **infinite** norm gives 0, except for `NoClipping`. A **NaN** norm gives NaN,
so that trouble is seen. (:mod:`ntkdp.dp_sgd` drops samples whose gradient norm is not finite.)
A factor beyond the range of the norms' dtype becomes the largest number of that dtype.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import equinox as eqx
import jax
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
_Numbers: TypeAlias = np.ndarray | Array


def _checked_R(R: ByGroup) -> _Numbers:
    numbers: _Numbers = as_constant(validate.positive(R=R))
    if np.size(numbers) == 0:
        raise ValueError("R must be one number, or one for each group, got an empty array")
    return numbers


def _checked_Z(Z: ByGroup | None) -> _Numbers | None:
    return None if Z is None else as_constant(validate.positive(Z=Z))


def _checked_gamma(gamma: ScalarLike) -> _Numbers:
    number: _Numbers = as_constant(validate.scalar(gamma=validate.non_negative(gamma=gamma)))
    return number


def _checked_r(r: ScalarLike) -> _Numbers:
    number: _Numbers = as_constant(validate.positive_number(r=r))
    return number


def _in_range(value: ByGroup, dtype: np.dtype) -> Array:
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
        return self._weight(s, _over_samples(self.R, s))

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


def _over_samples(value: ByGroup, s: Array) -> Array:
    """One number, or one for each group, repeated for each norm in ``s``."""
    numbers = _in_range(value, s.dtype)
    return jnp.broadcast_to(numbers[:, None] if numbers.ndim == 1 else numbers, s.shape)


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

    @property  # type: ignore[misc]
    def R(self) -> np.ndarray:  # type: ignore[override]
        """One, so that every rule has a clipping norm; it is not used."""
        return np.asarray(1.0)

    def _weight(self, s: Array, R: Array) -> Array:
        return jnp.where(jnp.isnan(s), s, 1.0)


class Abadi(ClippingRule):
    """min(1, R/s): gradients longer than R are shortened to R (Abadi et al. 2016)."""

    R: ByGroup = eqx.field(converter=_checked_R)
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

    R: ByGroup = eqx.field(converter=_checked_R)
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
                ratio = cast(_Numbers, self.R) / cast(_Numbers, self.Z)
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

    R: ByGroup = eqx.field(converter=_checked_R)
    gamma: ScalarLike = eqx.field(default=0.01, converter=_checked_gamma)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        denominator = s + _in_range(self.gamma, s.dtype)
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

    R: ByGroup = eqx.field(converter=_checked_R)
    r: ScalarLike = eqx.field(default=0.1, converter=_checked_r)
    scope: Scope = eqx.field(default="flat", static=True)
    bounds_each_sample: ClassVar[bool] = True
    needs_total_norm: ClassVar[bool] = False

    def _weight(self, s: Array, R: Array) -> Array:
        # Processors may take an r below the smallest normal number for zero, and 0 / 0 is NaN.
        r = jnp.maximum(_in_range(self.r, s.dtype), jnp.finfo(s.dtype).tiny)
        return jnp.minimum(R / (s + r / (s + r)), jnp.finfo(s.dtype).max)


class Batch(ClippingRule):
    """One factor for all samples, min(1, R/||sum_i g_i||): not private, but compared in Table 1.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.clipping.Batch(1.0).factors(jnp.array([3.0, 1.0]), jnp.asarray(4.0)).tolist()
    [0.25, 0.25]
    """

    R: ByGroup = eqx.field(converter=_checked_R)
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

    function: Callable[[Array], Array] = eqx.field(static=True)  # type: ignore[misc]
    R: ByGroup = eqx.field(converter=_checked_R)
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

    ``options`` are the fields of the rule: R, scope and those of its own.

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
