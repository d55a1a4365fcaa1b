"""Arrays of a trajectory in a data set of xarray, and their checks on the way back."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from ntkdp._backend import validate
from ntkdp._backend.types import Array
from ntkdp.privacy import Sensitivities

if TYPE_CHECKING:
    import xarray

#: Parts of the record of sensitivities, which have no axis of time.
RECORD: dict[str, tuple[str, ...]] = {
    "squares": ("sample",),
    "counts": ("sample", "level"),
    "clipped": ("sample",),
    "steps": (),
}


def record_of(dataset: "xarray.Dataset", seed: tuple[str, ...]) -> Sensitivities:
    """The record of sensitivities in a data set that has one."""
    parts = {}
    for part, trailing in RECORD.items():
        name = f"sensitivity_{part}"
        if name not in dataset:
            raise ValueError(f"not a trajectory: lacks {name}")
        check_dimensions(dataset, name, [(*seed, *trailing)])
        parts[part] = validate.array(**{name: dataset[name].values})
    return Sensitivities(**parts)


def storable(value: Array) -> tuple[np.ndarray, dict[str, str]]:
    """An array in a dtype of netCDF; an attribute keeps the dtype of one in half precision."""
    array = np.asarray(value)
    if array.dtype.itemsize >= 4 or not jnp.issubdtype(array.dtype, jnp.floating):
        return array, {}
    return array.astype(np.float32), {"computed_in": str(array.dtype)}


def check_dimensions(dataset: "xarray.Dataset", name: str, allowed: list[tuple[str, ...]]) -> None:
    """Raise unless a variable has the dimensions of one of the lists."""
    found = tuple(map(str, dataset[name].dims))
    if found not in allowed:
        expected = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(
            f"not a trajectory: {name} must have dimensions {expected}, got {found}; all have a "
            "leading seed if loss has one"
        )


def in_order(**named: np.ndarray) -> Array:
    """Times or steps that do not go back; some are equal while the learning rate is 0."""
    ((name, values),) = named.items()
    found = validate.array(**named)
    # Of NaN nothing holds.
    ordered = np.append(values[:1] == values[:1], values[1:] >= values[:-1])
    if not ordered.all():
        place = int(np.argmin(ordered))
        raise ValueError(
            f"not a trajectory: {name} must not decrease or be NaN, got {values[place]} at place "
            f"{place}"
        )
    return found
