"""Checks of a model against its inputs: shapes, finiteness, independence of the samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp import _validate
from ntkdp._types import ApplyFn, Array, Params, is_traced


def check_inputs(apply_fn: ApplyFn, params: Params, x: Any, name: str = "x") -> Array:
    """``x`` as an array that ``apply_fn`` maps to ``(n, K)`` outputs sample by sample, or raise."""
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n, ...) with n >= 1, got {x.shape}")
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
    if x.shape[0] > 1 and not is_traced((params, x)):
        _check_independent(apply_fn, params, x[:2])
    return x


def _check_independent(apply_fn: ApplyFn, params: Params, pair: Array) -> None:
    both, one = apply_fn(params, pair), apply_fn(params, pair[:1])
    if is_traced((both, one)):
        return  # constants of a program that is being traced have no values yet
    together, alone = (np.asarray(f, dtype=np.float64) for f in (both, one))
    scale = np.max(np.abs(together)) + np.finfo(np.float64).tiny
    dtype = jnp.result_type(*jax.tree.leaves(params))
    # Written so that NaN, as of a normalised batch of one, does not pass.
    if not np.max(np.abs(together[:1] - alone)) <= scale * float(jnp.finfo(dtype).eps) ** 0.5:
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
