"""Numbers that change from step to step: a function of the step, or an array."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array, ArrayLike, Float, ScalarLike, is_traced

#: A number for each step: an array ``(steps,)``, or a function of the step's number.
Schedule: TypeAlias = Array | np.ndarray | Sequence[float] | Callable[[Array], ArrayLike]


def is_schedule(value: object) -> TypeGuard[Schedule]:
    """Whether a value changes from step to step: it is a function or an array."""
    numbers: Any = value
    return callable(value) or (not isinstance(value, str) and np.ndim(numbers) > 0)


def values(steps: int | None, **named: Schedule) -> Float[Array, "T ..."]:
    """The numbers of all steps, one for each or one for each group; none is negative.

    If the number of steps is not known, an array tells it.

    Raises
    ------
    ValueError
        If there is another number of them, or one is negative or not finite.
    """
    ((name, schedule),) = named.items()
    if callable(schedule):
        assert steps is not None
        found = jax.vmap(schedule)(jnp.arange(steps))
    else:
        found = validate.array(**{name: schedule})
        steps = len(found) if steps is None else steps
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) not in (1, 2) or shape[0] != steps:
        raise ValueError(
            f"{name} must be a schedule with one number for each of {steps} steps, got "
            + (f"shape {shape}" if shape is not None else str(found))
        )
    numbers: Array = validate.non_negative(**{name: jnp.asarray(found)})
    if not jnp.issubdtype(numbers.dtype, jnp.floating):
        numbers = numbers.astype(jnp.result_type(float))
    return numbers


def constant(numbers: Float[Array, "T ..."]) -> np.ndarray | None:
    """The numbers of the first step if they are known to be those of all, or None."""
    if is_traced(numbers):
        return None
    known = np.asarray(numbers)
    return np.asarray(known[0]) if bool(np.all(known == known[:1])) else None


def at(schedule: ScalarLike | Schedule, step: Array | int) -> Any:
    """The number of a step, of a constant too; past the end of an array the last one."""
    if callable(schedule):
        # As optimizers count, in 32 bits: schedules divide by it, and so round in its precision.
        return schedule(jnp.asarray(step, jnp.int32))
    if not is_schedule(schedule):
        return schedule
    numbers = jnp.asarray(schedule)
    return numbers[jnp.minimum(step, len(numbers) - 1)]


def in_words(schedule: Schedule) -> str:
    """The numbers of the steps 0, 1, 2, 4, ... for comparisons; a question mark if not known."""
    if callable(schedule) or is_traced(schedule):
        return "?"
    numbers = np.asarray(schedule)
    doubling = [0, *(2**k for k in range(len(numbers).bit_length()))]
    shown = [numbers[step] for step in doubling if step < len(numbers)]
    each = (":".join(f"{part:g}" for part in np.ravel(value)) for value in shown)
    return f"{', '.join(each)} at steps 0, 1, 2, 4, ..."


def multiplier(steps: int | None, noise_multiplier: Any) -> ScalarLike | Schedule:
    """A noise multiplier that may change: checked, and one number if all steps have the same.

    Without a number of steps a function stays as it is.
    """
    if not is_schedule(noise_multiplier):
        return cast(ScalarLike, noise_multiplier)
    if steps is None and callable(noise_multiplier):
        return noise_multiplier
    found = values(steps, noise_multiplier=noise_multiplier)
    if found.ndim > 1:
        raise ValueError(
            f"noise_multiplier must be one number in each step, got an array {found.shape}"
        )
    same = constant(found)
    return found if same is None else same


def largest(
    noise_multiplier: ScalarLike | Schedule,
) -> tuple[ScalarLike, Float[Array, " T"] | None]:
    """The largest number of a checked multiplier, and the sizes of all steps relative to it."""
    if not is_schedule(noise_multiplier):
        return cast(ScalarLike, noise_multiplier), None
    numbers = jnp.asarray(noise_multiplier)
    most = jnp.max(numbers)
    return most, numbers / jnp.where(most > 0, most, 1)
