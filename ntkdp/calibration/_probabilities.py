"""Probabilities and labels as calibration takes them, checked."""

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.precision import at_least_single
from ntkdp._backend.types import Array, ArrayLike, Float, is_traced


def checked(probs: ArrayLike, labels: ArrayLike) -> tuple[Float[Array, "n K"], Array]:
    """Probabilities ``(n, K)`` with K >= 2, and labels ``(n,)`` in 0..K-1."""
    probs, labels = validate.array(probs=probs), validate.array(labels=labels)
    validate.finite(probs=probs)
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        probs = probs.astype(jnp.result_type(float))
    rounding = _rounding(float(jnp.finfo(probs.dtype).eps))
    probs = at_least_single(probs)
    if probs.ndim not in (1, 2) or probs.size == 0:
        raise ValueError(
            f"probs must have shape (n, K), or (n,) or (n, 1) of P(y = 1), got {probs.shape}"
        )
    if labels.shape != probs.shape[:1]:
        raise ValueError(
            f"labels must be classes of shape ({probs.shape[0]},), one for each row of probs, "
            f"got {labels.shape}" + ("; for one-hot labels take argmax" if labels.ndim > 1 else "")
        )
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise TypeError(
            f"labels must be integers, got dtype {labels.dtype}; convert with labels.astype(int)"
        )
    columns = 1 if probs.ndim == 1 else probs.shape[1]
    if not is_traced(probs):
        values = np.asarray(probs, np.float64)
        if values.min() < -rounding or values.max() > 1 + rounding:
            raise ValueError(
                f"probs must lie in [0, 1], got values from {values.min():g} to {values.max():g}; "
                "take jax.nn.softmax of logits first (of a single logit jax.nn.sigmoid)"
            )
        if columns > 1 and np.max(np.abs(values.sum(axis=1) - 1)) > max(rounding, 1e-5):
            sums = values.sum(axis=1)
            raise ValueError(
                f"rows of probs must sum to 1, got sums from {sums.min():g} to {sums.max():g}"
            )
    n_classes = max(columns, 2)
    if not is_traced(labels):
        classes = np.asarray(labels)
        if classes.min() < 0 or classes.max() >= n_classes:
            raise ValueError(
                f"labels must be classes in 0..{n_classes - 1}, "
                f"got values from {classes.min()} to {classes.max()}"
            )
    probs = _within_unit_interval(probs, rounding)
    if columns == 1:
        positive = probs.reshape(-1)
        probs = jnp.stack([1 - positive, positive], axis=1)
    return probs, labels.astype(jnp.int32)


def _rounding(eps: float) -> float:
    """How far a probability may be off: 100 eps, or 4 in half precision, where eps is large."""
    return max(4 * eps, min(100 * eps, 1e-3))


def _within_unit_interval(probs: Array, rounding: float) -> Array:
    """Values with those outside [0, 1] by rounding moved to its ends, and others outside NaN."""
    near = jnp.where(probs < 0, 0.0, jnp.where(probs > 1, 1.0, probs)).astype(probs.dtype)
    return jnp.where((probs < -rounding) | (probs > 1 + rounding), jnp.nan, near)
