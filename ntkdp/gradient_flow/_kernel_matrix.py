"""The terms of a kernel as one matrix, which knows whether it means ``(x) I_K``."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp import clipping
from ntkdp._backend import compiled, devices
from ntkdp._backend.types import Array, Float


class KernelMatrix(eqx.Module):
    """Terms of a kernel side by side, for a single product a step; a pytree."""

    matrix: eqx.AbstractVar[Array]

    @property
    @abstractmethod
    def per_point(self) -> int:
        """Rows of the matrix for each point: one, or one for each output."""

    @property
    def n_points(self) -> int:
        """Points m that the matrix moves."""
        return self.matrix.shape[0] // self.per_point

    def columns(self, n_outputs: int) -> int:
        """Columns that the matrix moves at once: one for each output, or one."""
        return n_outputs // self.per_point

    @abstractmethod
    def push(self, weighted: Float[Array, "R n K"]) -> Float[Array, "m K"]:
        """The change of the outputs that output gradients cause, each through its own term."""

    @abstractmethod
    def pushes_at(self, point: Array, weighted: Float[Array, "R n K"]) -> Float[Array, "n K"]:
        """How the output gradient of each sample moves the outputs of one point."""

    def norms_of_sum(self, a: Float[Array, "n K"]) -> Float[Array, " R"]:
        """Norms by term of the sum of all gradients, if the m points are the n samples."""
        rows = self.matrix.shape[0]
        vector = a.reshape(rows, -1)
        images = jnp.einsum("arb,bk->rak", self.matrix.reshape(rows, -1, rows), vector)
        return clipping.norms_from_squares(jnp.einsum("rak,ak->r", images, vector))

    @abstractmethod
    def terms(self) -> Array:
        """Terms ``(R, n, n, K, K)`` or ``(R, n, n)``, if the m points are the n samples."""


class SharedKernel(KernelMatrix):
    """A kernel ``(m, R n)`` that means ``(x) I_K``: all outputs share it."""

    matrix: Float[Array, "m Rn"]

    @property
    def per_point(self) -> int:
        """One row for each point."""
        return 1

    def push(self, weighted: Float[Array, "R n K"]) -> Float[Array, "m K"]:
        """The change of the outputs that output gradients cause, each through its own term."""
        return self.matrix @ weighted.reshape(-1, weighted.shape[-1])

    def pushes_at(self, point: Array, weighted: Float[Array, "R n K"]) -> Float[Array, "n K"]:
        """How the output gradient of each sample moves the outputs of one point."""
        row = self.matrix[point].reshape(weighted.shape[:2])
        return jnp.einsum("ri,rik->ik", row, weighted)

    def terms(self) -> Float[Array, "R n n"]:
        """Terms ``(R, n, n)``, if the m points are the n samples."""
        n = self.matrix.shape[0]
        return jnp.moveaxis(self.matrix.reshape(n, -1, n), 1, 0)


class BlockKernel(KernelMatrix):
    """A kernel ``(m K, R n K)`` with a ``K x K`` block for each pair of points."""

    matrix: Float[Array, "mK RnK"]
    n_outputs: int = eqx.field(static=True)

    @property
    def per_point(self) -> int:
        """A row for each output."""
        return self.n_outputs

    def push(self, weighted: Float[Array, "R n K"]) -> Float[Array, "m K"]:
        """The change of the outputs that output gradients cause, each through its own term."""
        return (self.matrix @ weighted.reshape(-1)).reshape(-1, self.n_outputs)

    def pushes_at(self, point: Array, weighted: Float[Array, "R n K"]) -> Float[Array, "n K"]:
        """How the output gradient of each sample moves the outputs of one point."""
        rows = self.matrix.reshape(-1, self.n_outputs, *weighted.shape)[point]
        return jnp.einsum("kril,ril->ik", rows, weighted)

    def terms(self) -> Float[Array, "R n n K K"]:
        """Terms ``(R, n, n, K, K)``, if the m points are the n samples."""
        n = self.n_points
        split = self.matrix.reshape(n, self.n_outputs, -1, n, self.n_outputs)
        return jnp.transpose(split, (2, 0, 3, 1, 4))


def kernel_matrix(terms: Array, layered: bool, mesh: Mesh | None) -> KernelMatrix:
    """Terms with a leading axis of groups if ``layered``, or one term, as a matrix."""
    matrix = _side_by_side(terms, layered, mesh)
    return (
        SharedKernel(matrix) if terms.ndim - layered == 2 else BlockKernel(matrix, terms.shape[-1])
    )


# Compiled, so that no copy is made but the result.
@compiled.jit(static_argnums=(1, 2))
def _side_by_side(terms: Array, layered: bool, mesh: Mesh | None) -> Array:
    """Terms as one matrix, ``(m K, R n K)`` or ``(m, R n)``."""

    def matrix_of(terms: Array) -> Array:
        by_group = terms if layered else terms[None]
        if by_group.ndim == 3:
            return jnp.moveaxis(by_group, 0, 1).reshape(by_group.shape[1], -1)
        rows = by_group.shape[1] * by_group.shape[3]
        return jnp.transpose(by_group, (1, 3, 0, 2, 4)).reshape(rows, -1)

    return devices.over_samples(matrix_of, mesh, (int(layered),), 0)(terms)
