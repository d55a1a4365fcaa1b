"""Checks of arguments, whose errors name the argument, its value and a way out.

A check takes one value as a keyword argument, ``positive(clip_norm=R)``, and returns it. If the
value is known before a program runs, a check raises ``ValueError`` or ``TypeError``. A value that
exists only inside a JAX transformation comes back wrapped in :func:`equinox.error_if`, so callers
must go on with the value that the check returns.
"""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array, is_traced

#: An argument, whose check returns it.
Value = TypeVar("Value")
Option = TypeVar("Option", bound=str)
Entry = TypeVar("Entry")
#: Numbers that are known, or traced.
Numbers: TypeAlias = Array | np.ndarray

#: An array of more entries is checked on its device, without a copy on the host.
_LARGE = 2**20


def _single(named: Mapping[str, Value]) -> tuple[str, Value]:
    ((name, value),) = named.items()
    return name, value


def _shape(value: object) -> tuple[int, ...]:
    numbers: Any = value
    return np.shape(numbers)


def _numeric(name: str, value: Value) -> Value:
    if isinstance(value, bool | str) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if is_traced(value):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or an array, got {value!r}") from error
    if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a real number or array, got {value!r}")
    return value


def _require(
    name: str,
    value: Value,
    holds: Callable[[Numbers], Array | np.ndarray],
    requirement: str,
    way_out: str = "",
) -> Value:
    value = _numeric(name, value)
    message = f"{name} must be {requirement}"
    if is_traced(value):
        checked: Value = eqx.error_if(value, ~jnp.all(holds(jnp.asarray(value))), message + way_out)
        return checked
    if not bool(np.all(holds(np.asarray(value)))):
        shown = np.asarray(value).item() if len(_shape(value)) == 0 else value
        raise ValueError(f"{message}, got {shown!r}{way_out}")
    return value


def positive(**named: Value) -> Value:
    """A finite number above zero, or an array of them."""
    name, value = _single(named)
    return _require(name, value, lambda v: (v > 0) & (v < np.inf), "positive and finite")


def positive_number(**named: Value) -> Value:
    """A single finite number above zero."""
    name, _ = _single(named)
    return scalar(**{name: positive(**named)})


def non_negative(**named: Value) -> Value:
    """A finite number of at least zero, or an array of them."""
    name, value = _single(named)
    return _require(name, value, lambda v: (v >= 0) & (v < np.inf), "at least 0 and finite")


def fraction(**named: Value) -> Value:
    """A number in (0, 1]."""
    name, value = _single(named)
    return _require(name, value, lambda v: (v > 0) & (v <= 1), "in (0, 1]")


def share(**named: Value) -> Value:
    """A number in [0, 1]."""
    name, value = _single(named)
    return _require(name, value, lambda v: (v >= 0) & (v <= 1), "in [0, 1]")


def decay(**named: Value) -> Value:
    """A number in [0, 1)."""
    name, value = _single(named)
    return _require(name, value, lambda v: (v >= 0) & (v < 1), "in [0, 1)")


def flag(**named: object) -> bool:
    """True or False, known before the program runs."""
    name, value = _single(named)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def scalar(**named: Value) -> Value:
    """A single number, not an array of several."""
    name, value = _single(named)
    if len(_shape(value)):
        raise ValueError(f"{name} must be a single number, got shape {_shape(value)}")
    return value


def count(minimum: int = 1, /, **named: object) -> int:
    """A whole number of at least ``minimum``, known before the program runs."""
    name, value = _single(named)
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from error
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return number


def real(**named: Value) -> Value:
    """An array of real numbers, of any library; integers and booleans are allowed."""
    name, value = _single(named)
    try:
        is_jax = isinstance(value, jax.Array) or is_traced(value)
        dtype = jnp.asarray(value).dtype if is_jax else np.asarray(value).dtype
    except ValueError as error:
        raise ValueError(f"{name} must be an array, got rows of unequal length") from error
    kinds = (np.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        shown = f"an array of {dtype}" if len(_shape(value)) else repr(value)
        raise TypeError(f"{name} must be real numbers, got {shown}")
    return value


def array(**named: object) -> Array:
    """A JAX array of real numbers; integers and booleans are allowed."""
    return jnp.asarray(real(**named))


def keys(**named: object) -> Array:
    """JAX PRNG keys of the new style, one ``()`` or several ``(S,)``; old ones are wrapped."""
    name, value = _single(named)
    if value is None or isinstance(value, str):
        raise TypeError(f"{name} must be a JAX PRNG key, e.g. jax.random.key(0), got {value!r}")
    key = jnp.asarray(value)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim == 0:
            raise TypeError(f"{name} must be a JAX PRNG key, e.g. jax.random.key(0), got {key!r}")
        width = jax.random.key_data(jax.random.key(0)).shape[-1]
        if key.shape[-1] != width:
            raise ValueError(f"{name} must hold {width} numbers a key, got shape {key.shape}")
        key = jax.random.wrap_key_data(key)
    if key.ndim > 1 or key.size == 0:
        raise ValueError(f"{name} must be one key or an array (S,) of keys, got shape {key.shape}")
    return key


def key(**named: object) -> Array:
    """A single JAX PRNG key of the new style; an old one is wrapped."""
    name, _ = _single(named)
    single = keys(**named)
    if single.ndim:
        raise ValueError(f"{name} must be a single key, got shape {single.shape}")
    return single


def finite(**named: Value) -> Value:
    """A pytree of real arrays without NaN or inf; an error names the leaf and counts entries."""
    name, value = _single(named)
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if is_traced(leaf):
            continue
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            continue  # PRNG keys
        large = np.size(leaf) > _LARGE
        if isinstance(leaf, jax.Array) and (large or len(leaf.sharding.device_set) > 1):
            bad = int(jnp.sum(~jnp.isfinite(leaf)))  # on its devices: the host may be too small
        else:
            array = np.asarray(leaf)
            bad = int(np.size(array) - np.sum(np.isfinite(array.astype(np.float64))))
        if bad:
            where = name + jax.tree_util.keystr(path)
            raise ValueError(
                f"{where} must be finite, got {bad} NaN or infinite of {np.size(leaf)} entries; "
                "remove or impute them first"
            )
    return value


def parameters(**named: Value) -> Value:
    """A pytree of at least one real floating-point array; an error names the leaf that is none."""
    name, value = _single(named)
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise ValueError(f"{name} must hold at least one array, got an empty pytree")
    for path, leaf in leaves:
        if isinstance(leaf, float):
            continue
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            continue
        kind = type(leaf).__name__ if dtype is None else dtype
        where = name + jax.tree_util.keystr(path)
        raise TypeError(
            f"{where} must be a floating-point array, got {kind}; {_way_out_for(dtype)}"
        )
    return value


def _way_out_for(dtype: object) -> str:
    if isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.complexfloating):
        return "pass its real and imaginary parts as two arrays"
    return (
        "close over what is not trained: trained, rest = equinox.partition(params, "
        "equinox.is_inexact_array), then equinox.combine(trained, rest) inside apply_fn"
    )


def increasing(**named: Value) -> Value:
    """A one-dimensional array of at least two finite numbers, strictly increasing."""
    name, value = _single(named)
    value = _numeric(name, value)
    shape = _shape(value)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"{name} must be a one-dimensional array of two or more, got {shape=}")
    if is_traced(value):
        return _require(name, value, lambda v: jnp.diff(v) > 0, "strictly increasing")
    array = np.asarray(value)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {value!r}")
    fails = np.flatnonzero(np.diff(array) <= 0)
    if fails.size:
        k = int(fails[0])
        raise ValueError(
            f"{name} must be strictly increasing, got {name}[{k}] = {array[k]} "
            f"before {name}[{k + 1}] = {array[k + 1]}"
        )
    return value


def times_from(start: object, times: object) -> tuple[Array, Array]:
    """``start``, the time of the initial state, and increasing times, none of them before it."""
    dtype = jnp.result_type(float)
    start = jnp.asarray(finite(start=_numeric("start", scalar(start=start))), dtype)
    times = jnp.asarray(increasing(times=times), dtype)
    if is_traced((start, times)):
        message = "times must not begin before start, the time of the initial state"
        return start, eqx.error_if(times, times[0] < start, message)
    if times[0] < start:
        raise ValueError(
            f"times must not begin before start = {start:g}, the time of the initial state, "
            f"got times[0] = {times[0]:g}; pass start=times[0] if that is the initial state's time"
        )
    return start, times


def choice(options: Iterable[Option], /, **named: object) -> Option:
    """One of ``options``; an error names the nearest."""
    name, value = _single(named)
    known = list(options)
    for option in known:
        if option == value:
            return option
    raise ValueError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")


def lookup(table: Mapping[str, Entry], /, **named: object) -> Entry:
    """The entry of a table under a name; an error names the nearest."""
    return table[choice(table, **named)]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known name, then all of them."""
    names = [str(option) for option in known]
    lowered = {option.lower(): option for option in names}
    near = difflib.get_close_matches(given.lower(), lowered, n=1, cutoff=0.5)
    hint = f"; did you mean {lowered[near[0]]!r}?" if near else ";"
    return f"{hint} known: {', '.join(names)}"
