"""Where a gradient lies in its leaf: undoing the rearrangements between the leaf and its use."""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax

from ntkdp._backend.types import Array


class Reshaped(NamedTuple):
    """A leaf of this shape was reshaped."""

    shape: tuple[int, ...]

    def undo(self, gradient: Array) -> Array:
        """The gradient in the shape before."""
        return gradient.reshape(self.shape)


class Transposed(NamedTuple):
    """The axes were permuted; this is the inverse permutation."""

    inverse: tuple[int, ...]

    def undo(self, gradient: Array) -> Array:
        """The gradient in the order before."""
        return jnp.transpose(gradient, self.inverse)


class Cut(NamedTuple):
    """A box was cut out of an array of shape ``whole``."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    whole: tuple[int, ...]

    def undo(self, gradient: Array) -> Array:
        """The gradient in the whole array, zero outside the box."""
        return lax.dynamic_update_slice(jnp.zeros(self.whole, gradient.dtype), gradient, self.start)

    def apart(self, other: "Cut") -> bool:
        """Whether the boxes have no entry in common."""
        sides = zip(self.start, self.size, other.start, other.size, strict=True)
        return any(a + m <= b or b + n <= a for a, m, b, n in sides)


Rearrangement: TypeAlias = Reshaped | Transposed | Cut


class Layout(NamedTuple):
    """How a gradient ``(g, p, q)`` lies in its leaf: axes split and permuted, then rearranged."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    rearranged: tuple[Rearrangement, ...]

    def restore(self, gradient: Array) -> Array:
        """The gradient in the shape of the leaf, zero outside the part that was used."""
        gradient = jnp.transpose(gradient.reshape(self.shape), self.permutation)
        for step in reversed(self.rearranged):
            gradient = step.undo(gradient)
        return gradient

    def apart(self, other: "Layout") -> bool:
        """Whether both certainly hold different entries, because their first cuts do not meet."""
        if not self.rearranged or not other.rearranged:
            return False
        first, second = self.rearranged[0], other.rearranged[0]
        return isinstance(first, Cut) and isinstance(second, Cut) and first.apart(second)
