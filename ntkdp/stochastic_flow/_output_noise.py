"""The noise of DP-SGD in the outputs: its covariance, a function of the kernel."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkdp import privacy
from ntkdp._backend import devices, distributed_eigh, memory, validate
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import KernelFlow
from ntkdp.ntk import LayerwiseKernel, as_matrices
from ntkdp.stochastic_flow import _sharded_points
from ntkdp.stochastic_flow._weight_noise import deviations

#: Eigenvalues below this part of the largest, and below zero, are what rounding made of zero.
_NEGATIVE = 1e-6
#: Matrices alive while a square root is found, the covariance included: eigenvectors and workspace
#: of LAPACK, or parts that go round on several devices.
_ROOT_COPIES = 4
_ROOT_COPIES_IN_PARTS = 6


def sampling(flow: Any, sample_rate: Any) -> tuple[float, float]:
    """The sampling rate, and the divisor of the noisy sum."""
    rate = float(validate.scalar(sample_rate=validate.fraction(sample_rate=sample_rate)))
    return rate, rate * (flow.targets.shape[0] if flow.reduction == "mean" else 1)


def noise_covariance(
    flow: KernelFlow, sigma: Any, noise_kernel: Any, per_group: bool
) -> Array | None:
    """Covariance of the noise in the outputs of the summed gradient, None if there is none."""
    sigma = privacy.as_noise_multiplier(sigma, steps=None)
    stds = deviations(flow.clipping, sigma, flow.n_terms, per_group)
    if not bool(jnp.any(stds > 0)):
        return None
    if flow.preconditioned:
        raise ValueError(
            "flow must have no preconditioned_kernel: the noise of a preconditioned step is not a "
            "function of the kernels"
        )
    memory.require(
        bytes_of_noise(flow),
        "noise of the outputs, whose covariance and its square root are matrices over all points,",
        "use fewer samples, float32, or ensemble with a LinearisedFlow, which needs no covariance",
    )
    if noise_kernel is not None:
        return _weighted(_given_terms(flow, noise_kernel), stds**2)
    if flow.test_drive is not None:
        raise ValueError(
            "noise_kernel must be the kernel of train and test points with each other, since "
            "the flow has a test_kernel, got None"
        )
    return _weighted_of_flow(flow, stds**2)


def bytes_of_noise(flow: KernelFlow) -> int:
    """Bytes on this host at the peak of finding the covariance and its square root."""
    rows = flow.drive.per_point * _sharded_points.of_flow(flow).n_points
    copies = _ROOT_COPIES if flow.mesh is None else _ROOT_COPIES_IN_PARTS
    return devices.bytes_on_host(flow.mesh, copies * rows**2 * flow.operator.matrix.dtype.itemsize)


def _given_terms(flow: KernelFlow, noise_kernel: Any) -> Array:
    """Terms of a given kernel over all points that are followed, checked."""
    if isinstance(noise_kernel, LayerwiseKernel):
        layered = flow.clipping.scope == "layerwise"
        terms = noise_kernel.values if layered else noise_kernel.total[None]
    else:
        terms = validate.array(noise_kernel=noise_kernel)[None]
    followed = _sharded_points.of_flow(flow).n_points
    expected = (flow.n_terms, followed, followed, *flow.diagonal.shape[2:])
    if terms.shape != expected:
        raise ValueError(
            f"noise_kernel must have terms of shape {expected}, train before test, "
            f"got {terms.shape}"
        )
    finite: Array = validate.finite(noise_kernel=terms)
    return finite.astype(flow.operator.matrix.dtype)


# Compiled, so that no copy is made but the result.
@jax.jit
def _weighted(terms: Array, weights: Float[Array, " R"]) -> Float[Array, "N N"]:
    """Weighted sum of the terms of a kernel, as a matrix."""
    kernel = jnp.tensordot(weights.astype(terms.dtype), terms, axes=1)
    return as_matrices(kernel[None])[0]


@eqx.filter_jit
def _weighted_of_flow(flow: KernelFlow, weights: Float[Array, " R"]) -> Float[Array, "N N"]:
    return _weighted(flow.terms(), weights)


def square_root(matrix: Float[Array, "N N"], mesh: Mesh | None = None) -> Float[Array, "N N"]:
    """The symmetric square root of a matrix, which may be singular.

    Of all F with F F^T the matrix it is the one that does not depend on who finds the eigenvectors.
    With a mesh, its rows are over the devices.
    """
    values, vectors = eigh(matrix, mesh)
    if not bool(values[0] >= -_NEGATIVE * values[-1]):
        raise ValueError(
            "the kernel must be positive semi-definite to be a covariance, got an eigenvalue "
            f"{float(values[0]):.3g} beside {float(values[-1]):.3g}"
        )
    return symmetric(values.clip(min=0) ** 0.5, vectors, mesh)


def eigh(matrix: Array, mesh: Mesh | None = None) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and vectors; with a mesh its devices find them together."""
    if mesh is None:
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors
    return distributed_eigh.eigh(mesh, devices.spread(mesh, matrix))


@partial(jax.jit, static_argnums=2)
def symmetric(values: Array, vectors: Array, mesh: Mesh | None = None) -> Array:
    """The matrix of these eigenvalues and vectors."""

    def rows(values: Array, vectors: Array) -> Array:
        return devices.outer(mesh, vectors * values[None], vectors)

    matrix: Array = devices.over_samples(rows, mesh, (None, 0), 0)(values, vectors)
    return matrix
