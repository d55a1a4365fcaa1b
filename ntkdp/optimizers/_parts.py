"""The numbers of an optimizer, and the precision in which they are used."""

from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntkdp._backend import validate
from ntkdp._backend.types import Array, PyTree, ScalarLike, as_constant, common_dtype, is_traced

#: Of numbers in the precision of the gradients, a transformation.
_Parts: TypeAlias = Callable[[Callable[[ScalarLike], Array]], optax.GradientTransformation]


def part(value: ScalarLike) -> ScalarLike:
    """A number, a Python zero if it is zero: it is no array, so that programs leave it out."""
    if is_traced(value) or float(np.asarray(value)):
        return cast(ScalarLike, as_constant(value))
    return 0.0


def is_present(value: ScalarLike) -> bool:
    return not (isinstance(value, float) and value == 0)


def checked_average(average: ScalarLike | None) -> ScalarLike | None:
    if average is None:
        return None
    checked = validate.scalar(average=validate.decay(average=average))
    return cast(ScalarLike, as_constant(checked))


def in_precision_of_gradients(parts: _Parts) -> optax.GradientTransformationExtraArgs:
    """A transformation whose numbers and state keep the dtype of the gradients."""

    def of(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        dtype = common_dtype(*jax.tree.leaves(tree))
        made = parts(lambda value: jnp.asarray(value, dtype))
        return optax.with_extra_args_support(made)

    def init(weights: PyTree) -> PyTree:
        return of(weights).init(weights)

    def update(
        gradient: PyTree, state: PyTree, weights: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        updates, after = of(gradient).update(gradient, state, weights, **extra)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformationExtraArgs(init, update)
