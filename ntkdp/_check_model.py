"""Checks of a model against its inputs: shapes, finiteness, independence of the samples."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ntkdp import _validate
from ntkdp._types import ApplyFn, Array, Params, is_traced


def check_inputs(apply_fn: ApplyFn, params: Params, x: Any, name: str = "x") -> Array:
    """``x`` as an array that ``apply_fn`` maps to ``(n, K)`` outputs sample by sample, or raise."""
    return check_model(apply_fn, params, x, name)[0]


def check_model(
    apply_fn: ApplyFn, params: Params, x: Any, name: str = "x"
) -> tuple[Array, jax.ShapeDtypeStruct]:
    """The same, and what the outputs look like, ``(n, K)``."""
    x = _validate.array(**{name: x})
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function (params, x) -> (n, K), got {apply_fn!r}")
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n, ...) with n >= 1, got {x.shape}")
    if not is_traced((params, x)):
        known = _pass_at_once(apply_fn, params, x)
        if known is not None:
            return x, known
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = _validate.finite(**{name: x})
    _validate.finite(params=params)
    try:
        outputs = jax.eval_shape(apply_fn, params, x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"apply_fn(params, {name}) fails for {name} of shape {x.shape}: {error}"
        ) from error
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != x.shape[0]:
        raise ValueError(
            f"apply_fn(params, {name}) must have shape (n, K) with n = {x.shape[0]}, got {shape}"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(
            f"apply_fn(params, {name}) must be floating-point outputs, got {outputs.dtype}"
        )
    if x.shape[0] > 1 and not is_traced((params, x)):
        _check_independent(apply_fn, params, x[:2])
    return x, outputs


def _pass_at_once(apply_fn: ApplyFn, params: Params, x: Array) -> jax.ShapeDtypeStruct | None:
    """What the outputs look like if all is well: one compiled program, quick when called again.

    None if anything is not, or cannot be known here; the checks one by one then say what.
    """
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return None
    try:
        well, outputs = _all_well(apply_fn, params, x)
    except Exception:  # of the model's own, whatever it is: raised again where it can be named
        return None
    if is_traced(well) or not well:
        return None
    return jax.ShapeDtypeStruct((x.shape[0], outputs.shape[1]), outputs.dtype)


@eqx.filter_jit
def _all_well(apply_fn: ApplyFn, params: Params, x: Array) -> tuple[Array, Array]:
    well = jnp.array(True)
    for values in (*jax.tree.leaves(params), x):
        if jnp.issubdtype(values.dtype, jnp.floating):
            well &= jnp.all(jnp.isfinite(values))
    together, alone = apply_fn(params, x[:2]), apply_fn(params, x[:1])
    if together.ndim != 2 or together.shape[0] != x[:2].shape[0]:
        raise ValueError("not (n, K)")
    if not jnp.issubdtype(together.dtype, jnp.floating):
        raise TypeError("not floating-point")
    well &= _differ(together, alone) <= _tolerance(params)
    return well, together


def _differ(together: Array, alone: Array) -> Array:
    """How far the first sample's outputs move when it has company, relative to the outputs."""
    scale = jnp.max(jnp.abs(together)) + jnp.finfo(together.dtype).tiny
    return jnp.max(jnp.abs(together[:1] - alone)) / scale


def _tolerance(params: Params) -> float:
    return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5


def _check_independent(apply_fn: ApplyFn, params: Params, pair: Array) -> None:
    together, alone = apply_fn(params, pair), apply_fn(params, pair[:1])
    if is_traced((together, alone)):
        return  # constants of a program that is being traced have no values yet
    if not jnp.all(jnp.isfinite(together)):
        raise ValueError(
            "apply_fn(params, x) must be finite, got NaN or infinity; the model overflows, or "
            "divides by zero, at these parameters"
        )
    # Written so that NaN, as of a normalised batch of one, does not pass.
    if not _differ(together, alone) <= _tolerance(params):
        raise ValueError(
            "apply_fn couples the samples of a batch (batch normalisation in training mode?): the "
            "output of a sample changes with its neighbours, so it has no per-sample gradient; "
            "use running statistics, or layer or group normalisation"
        )


def check_preconditioner(params: Params, preconditioner: Params) -> Params:
    """The preconditioner if it is positive and has the structure and shapes of the parameters."""
    expected: Any = jax.tree.structure(params)
    given: Any = jax.tree.structure(preconditioner)
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
        checked.append(_validate.positive(**{name: diagonal}))
    return jax.tree.unflatten(expected, checked)
