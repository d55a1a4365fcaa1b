"""What all optimizers share, and what runs and predictions do with any of them."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ntkdp._backend.norms import wide
from ntkdp._backend.types import Array, LearningRate, PyTree, ScalarLike


class Optimizer(eqx.Module):
    """A function of the learning rate that returns an optax transformation, and what it is.

    Subclasses are final: `SGD` and `Adam`, or your own.

    Parameters
    ----------
    average : float or None
        Decay d in [0, 1) of the average of the weights at which a run is measured; None for the
        weights themselves.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> transformation = ntkdp.optimizers.SGD(momentum=0.9)(0.1)
    >>> state = transformation.init(jnp.zeros(1))
    >>> updates, state = transformation.update(jnp.ones(1), state)
    >>> round(updates[0].item(), 4)
    -0.1
    """

    average: eqx.AbstractVar[ScalarLike | None]
    #: Whether updates are a linear function of all gradients and weights so far.
    is_linear: eqx.AbstractClassVar[bool]

    @property
    @abstractmethod
    def decays_weights(self) -> bool:
        """Whether a step depends on the weights besides their gradient."""

    @abstractmethod
    def __call__(self, learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
        """The optax transformation at a learning rate, a number or a schedule."""


#: Learning rate to optax transformation: one of this module, or any function like ``optax.lion``.
OptimizerLike: TypeAlias = Optimizer | Callable[[LearningRate], optax.GradientTransformation]


def average_of(optimizer: OptimizerLike) -> ScalarLike | None:
    """The decay of the average at which a run is measured, None for the weights themselves.

    Examples
    --------
    >>> import ntkdp
    >>> float(ntkdp.optimizers.average_of(ntkdp.optimizers.SGD(average=0.9)))
    0.9
    """
    return optimizer.average if isinstance(optimizer, Optimizer) else None


def start_average(optimizer: OptimizerLike, weights: PyTree) -> PyTree | None:
    """The average before the first step, in single precision at least; None if there is none.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> ntkdp.optimizers.start_average(ntkdp.optimizers.SGD(average=0.9), jnp.ones(1)).tolist()
    [1.0]
    """
    return None if average_of(optimizer) is None else jax.tree.map(wide, weights)


def next_average(optimizer: OptimizerLike, average: PyTree | None, weights: PyTree) -> PyTree:
    """The average after a step that led to ``weights``.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> sgd = ntkdp.optimizers.SGD(average=0.75)
    >>> ntkdp.optimizers.next_average(sgd, jnp.ones(1), jnp.zeros(1)).tolist()
    [0.75]
    """
    decay = average_of(optimizer)
    if average is None or decay is None:
        return average

    def mixed(old: Array, new: Array) -> Array:
        kept = jnp.asarray(decay, old.dtype)
        return kept * old + (1 - kept) * new.astype(old.dtype)

    return jax.tree.map(mixed, average, weights)


def updated(
    transformation: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    weights: PyTree,
    noise_variance: PyTree,
) -> tuple[PyTree, PyTree]:
    """Updates of a transformation and its next state, told the variance of the gradient's noise.

    Examples
    --------
    >>> import jax.numpy as jnp, ntkdp
    >>> sgd = ntkdp.optimizers.SGD()(0.5)
    >>> zeros = jnp.zeros(1)
    >>> ntkdp.optimizers.updated(sgd, jnp.ones(1), sgd.init(zeros), zeros, 0.0)[0].tolist()
    [-0.5]
    """
    # Optimizers rely on promotion, of their count of steps for one.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = optax.with_extra_args_support(transformation).update(
            gradient, state, weights, noise_variance=noise_variance
        )
    return updates, state
