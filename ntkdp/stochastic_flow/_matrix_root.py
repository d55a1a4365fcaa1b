"""Square roots and eigenvectors of covariances, on one device or on all of a mesh."""

from jax.sharding import Mesh

from ntkdp._backend import compiled, decompositions, devices
from ntkdp._backend.types import Array, Float
from ntkdp.stochastic_flow import _distributed_eigh as distributed_eigh

#: Eigenvalues between zero and minus this part of the largest one are rounding errors of zero.
_NEGATIVE = 1e-6


def square_root(matrix: Float[Array, "N N"], mesh: Mesh | None = None) -> Float[Array, "N N"]:
    """The symmetric square root of a positive semi-definite matrix, which may be singular.

    Among all F with F F^T equal to the matrix, it is the one that does not depend on the choice of
    eigenvectors. With a mesh, its rows are spread over the devices.
    """
    values, vectors = eigh(matrix, mesh)
    if not bool(values[0] >= -_NEGATIVE * values[-1]):
        raise ValueError(
            "the kernel must be positive semi-definite to be a covariance, got an eigenvalue of "
            f"{float(values[0]):.3g}, with {float(values[-1]):.3g} the largest"
        )
    return symmetric(values.clip(min=0) ** 0.5, vectors, mesh)


def eigh(matrix: Array, mesh: Mesh | None = None) -> tuple[Float[Array, " N"], Float[Array, "N N"]]:
    """Eigenvalues, ascending, and vectors; the devices of a mesh find them together."""
    if mesh is None:
        values, vectors = decompositions.eigh(matrix)
        return values, vectors
    return distributed_eigh.eigh(mesh, devices.spread(mesh, matrix))


@compiled.jit(static_argnums=2)
def symmetric(
    values: Float[Array, " N"], vectors: Float[Array, "N N"], mesh: Mesh | None = None
) -> Float[Array, "N N"]:
    """The symmetric matrix that has these eigenvalues and vectors."""

    def rows(values: Array, vectors: Array) -> Array:
        return devices.outer(mesh, vectors * values[None], vectors)

    return devices.over_samples(rows, mesh, (None, 0), 0)(values, vectors)
