"""Checks of a model against its inputs: shapes, finiteness, independence of the samples."""

from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp

from ntkdp._backend import validate
from ntkdp._backend.types import ApplyFn, Array, ArrayLike, Params, is_traced
from ntkdp._gradients.batch_axis import trouble_with
from ntkdp._gradients.batch_probes import (
    changes_with_batch,
    changes_with_place,
    changes_with_size,
    rounding_in,
)
from ntkdp._gradients.same_program import same_program


class _Reading(NamedTuple):
    """A model as its program shows it: the outputs, and whether it must be tried with numbers.

    ``doubt`` is where the samples of a batch may meet, or None if they certainly do not. In that
    case ``counts`` says whether their number may still matter.
    """

    outputs: jax.ShapeDtypeStruct
    doubt: str | None
    counts: bool
    rounding: float

    @property
    def is_clear(self) -> bool:
        """Whether there is nothing to try."""
        return self.doubt is None and not self.counts


def check_inputs(apply_fn: ApplyFn, params: Params, x: ArrayLike, name: str = "x") -> Array:
    """``x`` as an array that ``apply_fn`` maps to ``(n, K)`` outputs sample by sample, or raise."""
    return check_model(apply_fn, params, x, name)[0]


def check_model(
    apply_fn: ApplyFn, params: Params, x: ArrayLike, name: str = "x"
) -> tuple[Array, jax.ShapeDtypeStruct]:
    """The array of :func:`check_inputs`, and shape and dtype of the outputs ``(n, K)``.

    Whether the samples are independent is read from the program, whatever the data. If it cannot be
    read, it is tried with numbers; inside a JAX transformation, once they are known.
    """
    samples = validate.array(**{name: x})
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function (params, x) -> (n, K), got {apply_fn!r}")
    if samples.ndim < 2 or samples.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n, ...) with n >= 1, got {samples.shape}")
    validate.parameters(params=params)
    if not is_traced((params, samples)):
        outputs = _pass_at_once(apply_fn, params, samples)
        if outputs is not None:
            return samples, outputs
    if jnp.issubdtype(samples.dtype, jnp.floating):
        samples = validate.finite(**{name: samples})
    validate.finite(params=params)
    reading = _read(apply_fn, params, samples, name)
    if not is_traced((params, samples)):
        _check_finite(apply_fn, params, samples)
    if not reading.is_clear:
        samples = _try(apply_fn, params, samples, reading)
    return samples, reading.outputs


def _pass_at_once(apply_fn: ApplyFn, params: Params, x: Array) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of the outputs, if one compiled program finds that all is well.

    The program is quick when it is called again. The result is None if anything is wrong or cannot
    be known here; the checks one by one then say what it is.
    """
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return None
    try:
        well, outputs = _all_well(apply_fn, params, x)
    except Exception:  # any error of the model: it is raised again where it can be named
        return None
    if is_traced(well) or not well:
        return None
    return jax.ShapeDtypeStruct((x.shape[0], outputs.shape[1]), outputs.dtype)


@eqx.filter_jit
def _all_well(apply_fn: ApplyFn, params: Params, x: Array) -> tuple[Array, Array]:
    reading = _read(apply_fn, params, x, "x")
    outputs = apply_fn(params, x[:2])
    well = jnp.array(True)
    for values in (*jax.tree.leaves(params), x, outputs):
        if jnp.issubdtype(values.dtype, jnp.floating):
            well &= jnp.all(jnp.isfinite(values))
    if not reading.is_clear:
        well &= ~_changes(apply_fn, params, x, reading)
    return well, outputs


def _read(apply_fn: ApplyFn, params: Params, x: Array, name: str) -> _Reading:
    """Trace the model for the batch and for one sample, and compare and follow the programs."""
    n = max(x.shape[0], 2)
    many, returned = _trace(apply_fn, params, x, n, name)
    outputs = _checked_outputs(returned, n, name)
    try:
        one, returned = _trace(apply_fn, params, x, 1, name)
        _checked_outputs(returned, 1, name)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"apply_fn must take batches of any size: it takes {n} samples, but for one it fails. "
            f"Write x.shape[0] where it says {n}, if it does. ({error})"
        ) from error
    doubt = trouble_with(many, n, len(many.jaxpr.invars) - 1)
    counts = doubt is None and not same_program(many, one, n)
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs.shape[1]), outputs.dtype)
    return _Reading(shape, doubt, counts, rounding_in(many))


def _changes(apply_fn: ApplyFn, params: Params, x: Array, reading: _Reading) -> Array:
    """Whether a sample's outputs or gradients change with its batch, tried with numbers."""
    changes = changes_with_size if reading.doubt is None else changes_with_batch
    return changes(apply_fn, params, x, reading.rounding)


def _trace(
    apply_fn: ApplyFn, params: Params, x: Array, n: int, name: str
) -> tuple[jex.ClosedJaxpr, object]:
    def shape_of(leaf: Array | float) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))

    batch = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    try:
        traced = jax.make_jaxpr(apply_fn, return_shape=True)(jax.tree.map(shape_of, params), batch)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"apply_fn(params, {name}) fails for {name} of shape {batch.shape}: {error}"
        ) from error
    jaxpr, outputs = traced
    return jaxpr, outputs


def _checked_outputs(outputs: object, n: int, name: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of outputs that are one array ``(n, K)``, or an error."""
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != n:
        raise ValueError(
            f"apply_fn(params, {name}) must have shape (n, K) with n = {n}, got {shape}"
        )
    if shape[1] == 0:
        raise ValueError(f"apply_fn(params, {name}) must have K >= 1 outputs, got shape {shape}")
    array = cast(jax.ShapeDtypeStruct, outputs)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"apply_fn(params, {name}) must be floating-point outputs, got {array.dtype}"
        )
    return array


def _check_finite(apply_fn: ApplyFn, params: Params, x: Array) -> None:
    outputs = apply_fn(params, x[:2])
    # While a program is traced, its constants have no values yet.
    if not is_traced(outputs) and not jnp.all(jnp.isfinite(outputs)):
        raise ValueError(
            "apply_fn(params, x) must be finite, got NaN or infinity; the model overflows, or "
            "divides by zero, at these parameters"
        )


_COUPLED = (
    "apply_fn couples the samples of a batch (batch normalisation in training mode?): the output "
    "or gradient of a sample changes with its neighbours"
)
_PLACED = (
    "apply_fn treats the samples of a batch by their place in it (dropout or noise with a fixed "
    "key, a table of one row a sample?): equal samples have different outputs"
)
_WAY_OUT = (
    "A sample then has no gradient of its own. Use running statistics, or layer or group "
    "normalisation; make what differs from sample to sample part of x"
)


def _try(apply_fn: ApplyFn, params: Params, x: Array, reading: _Reading) -> Array:
    """``x``, or an error if a sample's outputs change with its batch."""
    bad = eqx.filter_jit(_changes)(apply_fn, params, x, reading)
    where = "" if reading.doubt is None else f", at {reading.doubt}"
    if is_traced(bad):
        message = f"{_COUPLED}, or with its place among them{where}. {_WAY_OUT}"
        checked: Array = eqx.error_if(x, bad, message)
        return checked
    if not bad:
        return x
    if reading.doubt is None:
        raise ValueError(
            f"apply_fn gives a sample other outputs among {max(x.shape[0], 2)} than alone: it "
            f"couples the samples of a batch by their number. {_WAY_OUT}"
        )
    placed = bool(changes_with_place(apply_fn, params, x, reading.rounding))
    raise ValueError(f"{_PLACED if placed else _COUPLED}{where}. {_WAY_OUT}")


def check_preconditioner(params: Params, preconditioner: Params) -> Params:
    """The preconditioner if it is positive and has the structure and shapes of the parameters."""
    expected: jax.tree_util.PyTreeDef = jax.tree.structure(params)
    given: jax.tree_util.PyTreeDef = jax.tree.structure(preconditioner)
    if given != expected:
        raise ValueError(
            f"preconditioner must have the structure of params, {expected}, got {given}"
        )
    checked = []
    for (path, leaf), diagonal in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(preconditioner), strict=True
    ):
        name = "preconditioner" + jax.tree_util.keystr(path)
        if jnp.shape(diagonal) != jnp.shape(leaf):
            raise ValueError(f"{name} must have shape {jnp.shape(leaf)}, got {jnp.shape(diagonal)}")
        checked.append(validate.positive(**{name: diagonal}))
    positive: Params = jax.tree.unflatten(expected, checked)
    return positive
