"""Mean margins of the classes, in which a prediction may err although its loss is right."""

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend.types import Array, Float, Real
from ntkdp.experiment._problem import Problem
from ntkdp.trajectory import Trajectory

#: Bytes that the outputs of all runs, which margins are made of, may take.
_MOST_BYTES = 2**29


def labels_of(problem: Problem) -> Real[np.ndarray, " n"] | None:
    """Classes of the training samples; None for a regression or a single output."""
    targets = np.asarray(problem.targets)
    if problem.outputs.shape[1] < 2:
        return None
    if targets.ndim == 1:
        return targets
    is_one_hot = bool(np.all((targets == 0) | (targets == 1)) and np.all(targets.sum(1) == 1))
    return targets.argmax(axis=1) if is_one_hot else None


def keeps_outputs(problem: Problem, n_runs: int, n_recorded: int) -> bool:
    """Whether outputs can be recorded, for margins and for numbers by subgroup."""
    n_points = len(problem.outputs) + len(problem.test_outputs)
    size = n_points * problem.outputs.shape[1] * problem.outputs.dtype.itemsize
    wanted = labels_of(problem) is not None or problem.groups is not None
    return wanted and n_runs * n_recorded * size <= _MOST_BYTES


def margins(
    path: Trajectory, labels: Real[np.ndarray, " n"] | None
) -> Float[np.ndarray, "T C"] | None:
    """A class's own output less the mean of the others, over its samples and all runs."""
    if labels is None or path.outputs is None:
        return None
    classes, of_class = np.unique(labels, return_inverse=True)
    members = jax.nn.one_hot(of_class, len(classes), dtype=path.outputs.dtype)
    return np.asarray(_margins(path.outputs, jnp.asarray(labels), members))


@jax.jit
def _margins(outputs: Array, labels: Array, members: Array) -> Array:
    outputs = outputs.reshape(-1, *outputs.shape[-3:])
    n_outputs = outputs.shape[-1]
    own = jnp.take_along_axis(outputs, labels[None, None, :, None], axis=-1)[..., 0]
    others = (jnp.sum(outputs, axis=-1) - own) / (n_outputs - 1)
    result: Array = jnp.mean(own - others, axis=0) @ members / jnp.sum(members, axis=0)
    return result


def check(margins: object, n_times: int) -> None:
    """Raise unless these are margins at so many times, or None."""
    if margins is None:
        return
    if not isinstance(margins, np.ndarray) or margins.ndim != 2 or margins.dtype.kind != "f":
        raise ValueError("margins must be numbers with axes of times and classes")
    if len(margins) != n_times:
        raise ValueError(f"margins must be at {n_times} times, got {len(margins)}")


def error_of_margins(
    predicted: Float[np.ndarray, "T C"] | None, observed: Float[np.ndarray, "T C"] | None
) -> float | None:
    """Mean error of the margins at the end, relative to their mean size."""
    if predicted is None or observed is None:
        return None
    size = float(np.abs(observed[-1]).mean())
    return float(np.abs(predicted[-1] - observed[-1]).mean()) / size if size > 0 else None
