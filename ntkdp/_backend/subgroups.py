"""Subgroups of the samples: a label for each, and means over those that share one.

Wherever results are shown by subgroup, for the parts of a step, for what privacy costs each sample
or along a run, a subgroup is the samples with one label, and subgroups come in the order of their
sorted labels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ntkdp._backend.types import Array, ArrayLike

#: A label for each sample, numbers or text.
Labels: TypeAlias = ArrayLike | Sequence[str]


class Subgroups(NamedTuple):
    """Sorted labels ``(G,)``, the subgroup of each sample ``(n,)``, and how many are in each."""

    labels: np.ndarray
    places: np.ndarray
    counts: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """The labels as text."""
        return tuple(str(label) for label in self.labels.tolist())

    def means(self, values: Any) -> Any:
        """Means ``(..., G)`` of values ``(..., n)``, in their dtype; NumPy and JAX arrays alike."""
        shares = np.eye(len(self.labels))[self.places] / self.counts
        dtype = values.dtype if np.issubdtype(values.dtype, np.floating) else shares.dtype
        means: Array = values @ shares.astype(dtype)
        return means


def subgroups(labels: Labels, n_samples: int, name: str = "labels") -> Subgroups:
    """The subgroups of so many samples by their labels ``(n,)``, which are numbers or text.

    Raises
    ------
    ValueError
        If there is not one label for each sample, naming the argument.
    """
    given = np.asarray(labels)
    if given.shape != (n_samples,):
        raise ValueError(
            f"{name} must have shape ({n_samples},), one for each sample, got {given.shape}"
        )
    return Subgroups(*np.unique(given, return_inverse=True, return_counts=True))
