"""A kernel that moves outputs: a matrix that may mean ``(x) I_K``, or features."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from ntkdp import clipping
from ntkdp._backend import compiled, devices
from ntkdp._backend import norms as _norms
from ntkdp._backend.types import Array, Float, common_dtype
from ntkdp.ntk import FeatureKernel

#: Entries of the rows of a kernel that is not written out which are held at once.
_BLOCK_ENTRIES = 2**22


class KernelMatrix(eqx.Module):
    """A kernel for a single product a step; a pytree."""

    @property
    @abstractmethod
    def per_point(self) -> int:
        """Rows of the matrix for each point: one, or one for each output."""

    @property
    @abstractmethod
    def n_points(self) -> int:
        """Points m that the matrix moves."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype:
        """The precision of the kernel."""

    def columns(self, n_outputs: int) -> int:
        """Columns that the matrix moves at once: one for each output, or one."""
        return n_outputs // self.per_point

    @abstractmethod
    def push(self, weighted: Float[Array, "R n K"]) -> Float[Array, "m K"]:
        """The change of the outputs that output gradients cause, each through its own term."""

    @abstractmethod
    def spreads(
        self, weighted: Float[Array, "R n K"], bend: Float[Array, "m K K"]
    ) -> Float[Array, " m"]:
        r"""Sums of squares :math:`\sum_i v_{ji}^\top M_j v_{ji}` at each point j.

        :math:`v_{ji}` is how the output gradient of sample i moves the outputs of point j, and
        ``bend`` has the matrices M.
        """

    @abstractmethod
    def norms_of_sum(self, a: Float[Array, "n K"]) -> Float[Array, " R"]:
        """Norms by term of the sum of all gradients, if the m points are the n samples."""

    @abstractmethod
    def written_out(self) -> Float[Array, "rows columns"]:
        """The terms side by side as one matrix, ``(m K, R n K)``, or ``(m, R n)``."""

    @abstractmethod
    def terms(self) -> Array:
        """Terms ``(R, n, n, K, K)`` or ``(R, n, n)``, if the m points are the n samples."""


class WrittenOut(KernelMatrix):
    """Terms of a kernel side by side, as one matrix."""

    matrix: eqx.AbstractVar[Array]

    @property
    def n_points(self) -> int:
        """Points m that the matrix moves."""
        return self.matrix.shape[0] // self.per_point

    @property
    def dtype(self) -> np.dtype:
        """The precision of the matrix."""
        return self.matrix.dtype

    @abstractmethod
    def pushes_at(self, point: Array, weighted: Float[Array, "R n K"]) -> Float[Array, "n K"]:
        """How the output gradient of each sample moves the outputs of one point."""

    def spreads(
        self, weighted: Float[Array, "R n K"], bend: Float[Array, "m K K"]
    ) -> Float[Array, " m"]:
        """Sums of squares at each point, one after the other."""

        def at(point: Array) -> Array:
            v = self.pushes_at(point, weighted)
            return jnp.einsum("ik,kl,il->", v, bend[point], v)

        sums: Array = lax.map(at, jnp.arange(self.n_points))
        return sums

    def norms_of_sum(self, a: Float[Array, "n K"]) -> Float[Array, " R"]:
        """Norms by term of the sum of all gradients, if the m points are the n samples."""
        rows = self.matrix.shape[0]
        vector = a.reshape(rows, -1)
        images = jnp.einsum("arb,bk->rak", self.matrix.reshape(rows, -1, rows), vector)
        return clipping.norms_from_squares(jnp.einsum("rak,ak->r", images, vector))

    def written_out(self) -> Float[Array, "rows columns"]:
        """The matrix."""
        return self.matrix


class SharedKernel(WrittenOut):
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


class BlockKernel(WrittenOut):
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


class Features(KernelMatrix):
    r"""A kernel :math:`\phi(x_*) \phi(x)^\top \otimes I_K`, of which only the factors are kept."""

    rows: Float[Array, "m D"]
    samples: Float[Array, "n D"]

    @property
    def per_point(self) -> int:
        """One row for each point."""
        return 1

    @property
    def n_points(self) -> int:
        """Points m whose features are the rows."""
        return self.rows.shape[0]

    @property
    def dtype(self) -> np.dtype:
        """The precision of the features."""
        return common_dtype(self.rows, self.samples)

    def push(self, weighted: Float[Array, "R n K"]) -> Float[Array, "m K"]:
        """The change of the outputs that output gradients cause, through that of the weights."""
        return self.rows @ (self.samples.T @ weighted[0])

    def spreads(
        self, weighted: Float[Array, "R n K"], bend: Float[Array, "m K K"]
    ) -> Float[Array, " m"]:
        """Sums of squares at each point, from blocks of rows of the kernel."""
        pairs = weighted[0][:, :, None] * weighted[0][:, None, :]
        by_sample = pairs.reshape(len(pairs), -1)

        def of_row(point: tuple[Array, Array]) -> Array:
            row, bend_j = point
            return bend_j.ravel() @ ((self.samples @ row) ** 2 @ by_sample)

        size = max(1, _BLOCK_ENTRIES // len(self.samples))
        sums: Array = lax.map(of_row, (self.rows, bend), batch_size=size)
        return sums

    def norms_of_sum(self, a: Float[Array, "n K"]) -> Float[Array, " R"]:
        """The norm of the sum of all gradients, which is one of weights."""
        return _norms.of_all(self.samples.T @ a)[None]

    def written_out(self) -> Float[Array, "m n"]:
        """The kernel."""
        return self.rows @ self.samples.T

    def terms(self) -> Float[Array, "1 n n"]:
        """The kernel as its one term."""
        return self.written_out()[None]


def kernel_matrix(terms: Array | FeatureKernel, layered: bool, mesh: Mesh | None) -> KernelMatrix:
    """Terms with a leading axis of groups if ``layered``, or one term, or features."""
    if isinstance(terms, FeatureKernel):
        return Features(terms.rows, terms.columns)
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
