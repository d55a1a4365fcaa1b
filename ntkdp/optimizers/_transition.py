"""A step of a linear optimizer as a matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntkdp._backend.types import Array, Float, PyTree, ScalarLike
from ntkdp.optimizers._optimizer import Optimizer, next_average, start_average, updated


class Transition(NamedTuple):
    r"""A step of a linear optimizer on one weight, :math:`z^+ = M z + b\,g + p\,w_\text{zero}`.

    z holds the weight, what the optimizer remembers of it, and its average if there is one, which
    is last; g is the gradient. Weight decay draws to ``w_zero``, which is zero for a weight, and
    for an output that of the linear model at zero weights.

    Made by :func:`transition`.
    """

    of_state: Float[Array, "C C"]
    of_gradient: Float[Array, " C"]
    of_zero: Float[Array, " C"]


def size_of_state(optimizer: Optimizer) -> int:
    """Numbers that a linear optimizer holds of a weight, its average among them.

    Examples
    --------
    >>> import ntkdp
    >>> ntkdp.optimizers.size_of_state(ntkdp.optimizers.SGD(momentum=0.9))
    2
    """
    return len(jax.eval_shape(lambda: start_state(optimizer, jnp.ones(()))))


def start_state(optimizer: Optimizer, weight: Array) -> list[Array]:
    """What a linear optimizer holds of weights before the first step, each like ``weight``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> sgd = ntkdp.optimizers.SGD(momentum=0.9, average=0.5)
    >>> [part.item() for part in ntkdp.optimizers.start_state(sgd, jnp.ones(()))]
    [1.0, 0.0, 1.0]
    """
    return jax.tree.leaves(_start(optimizer, weight))


def transition(
    optimizer: Optimizer, learning_rate: ScalarLike, dtype: np.dtype | None = None
) -> Transition:
    """The step of a linear optimizer at a learning rate, by derivatives of the step itself.

    Examples
    --------
    >>> import ntkdp
    >>> step = ntkdp.optimizers.transition(ntkdp.optimizers.SGD(momentum=0.5), 0.1)
    >>> [round(entry, 4) for entry in (*step.of_state[0].tolist(), *step.of_gradient.tolist())]
    [1.0, -0.05, -0.1, 1.0]
    """
    zero = jnp.zeros((), jnp.result_type(float) if dtype is None else dtype)
    start, structure = jax.tree.flatten(_start(optimizer, zero))
    transformation = optimizer(jnp.asarray(learning_rate, zero.dtype))

    def step(state: Array, gradient: Array, origin: Array) -> Array:
        weight, inner, average = jax.tree.unflatten(structure, list(state))
        updates, inner = updated(transformation, gradient, inner, weight - origin, 0.0)
        weight = optax.apply_updates(weight, updates)
        after = (weight, inner, next_average(optimizer, average, weight))
        return jnp.stack(jax.tree.leaves(after))

    return Transition(*jax.jacfwd(step, argnums=(0, 1, 2))(jnp.stack(start), zero, zero))


def _start(optimizer: Optimizer, weight: Array) -> tuple[Array, PyTree, Array | None]:
    """Weight, state of the optimizer, and average."""
    inner = optimizer(jnp.ones((), weight.dtype)).init(weight)
    return weight, inner, start_average(optimizer, weight)
