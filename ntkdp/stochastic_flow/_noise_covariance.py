"""The outputs' noise that the noise of DP-SGD causes under a frozen kernel: covariance, factors."""

import equinox as eqx
import jax.numpy as jnp

from ntkdp import privacy
from ntkdp._backend import compiled, devices, memory, validate
from ntkdp._backend.types import Array, Float
from ntkdp.gradient_flow import Features, KernelFlow, KernelLike
from ntkdp.ntk import FeatureKernel, LayerwiseKernel, as_matrices
from ntkdp.stochastic_flow import _sharded_points
from ntkdp.stochastic_flow._matrix_root import square_root
from ntkdp.stochastic_flow._weight_noise import NoiseMultiplier, deviations

#: Matrices alive while a square root is found on one device: the covariance, its eigenvectors and
#: the workspace of LAPACK.
_ROOT_COPIES = 4
#: Matrices alive while a square root is found on several devices, which pass parts around.
_ROOT_COPIES_IN_PARTS = 6


def noise_covariance(
    flow: KernelFlow,
    noise_multiplier: NoiseMultiplier,
    noise_kernel: KernelLike | None,
    per_group: bool,
) -> Float[Array, "N N"] | None:
    """Covariance of the outputs' noise from a noisy summed gradient; None without noise."""
    stds = _deviations(flow, noise_multiplier, per_group)
    return None if stds is None else covariance_of_weights(flow, stds, noise_kernel)


def noise_in_features(
    flow: KernelFlow,
    noise_multiplier: NoiseMultiplier,
    noise_kernel: KernelLike | None,
    per_group: bool,
) -> Float[Array, "N D"] | None:
    """A factor of it, the features of a head; None without noise or without features."""
    stds = _deviations(flow, noise_multiplier, per_group)
    return None if stds is None else factor_of_features(flow, stds, noise_kernel)


def _deviations(
    flow: KernelFlow, noise_multiplier: NoiseMultiplier, per_group: bool
) -> Float[Array, " R"] | None:
    sigma = privacy.as_noise_multiplier(noise_multiplier, steps=None)
    stds = deviations(flow.clipping, sigma, flow.n_terms, per_group)
    return stds if bool(jnp.any(stds > 0)) else None


def covariance_of_weights(
    flow: KernelFlow,
    stds: Float[Array, " R"],
    noise_kernel: KernelLike | None,
) -> Float[Array, "N N"]:
    """Covariance of what moves the outputs if weights move at random, with deviations by group."""
    factor = factor_of_features(flow, stds, noise_kernel)
    memory.require(
        bytes_of_noise(flow),
        "noise of the outputs, whose covariance and its square root are matrices over all points,",
        "use fewer samples, float32, or ensemble with a LinearisedFlow, which needs no covariance",
    )
    if factor is not None:
        return factor @ factor.T
    if noise_kernel is not None:
        return _weighted(_given_terms(flow, noise_kernel), stds**2)
    _require_no_other_points(flow)
    return _weighted_of_flow(flow, stds**2)


def noise_factor(
    flow: KernelFlow, stds: Float[Array, " R"], noise_kernel: KernelLike | None
) -> Float[Array, "N columns"]:
    """A factor F of that covariance, F F^T: the features of a head, or else a square root.

    Its rows are spread over the devices of a mesh.
    """
    factor = factor_of_features(flow, stds, noise_kernel)
    if factor is not None:
        return devices.spread(flow.mesh, factor)
    return square_root(covariance_of_weights(flow, stds, noise_kernel), flow.mesh)


def factor_of_features(
    flow: KernelFlow, stds: Float[Array, " R"], noise_kernel: KernelLike | None
) -> Float[Array, "N D"] | None:
    """Features of all points times the deviation of weights, or None without features."""
    _require_plain_steps(flow)
    features = _features_of_points(flow, noise_kernel)
    if features is None:
        return None
    if flow.n_terms > 1:
        raise ValueError(
            "noise_kernel must have the groups of the flow, got a FeatureKernel, which is one group"
        )
    return features * jnp.sum(stds).astype(features.dtype)


def has_features(flow: KernelFlow, noise_kernel: KernelLike | None) -> bool:
    """Whether noise is drawn in the weights of a head, through the features of all points."""
    if noise_kernel is None:
        return isinstance(flow.drive, Features)
    return isinstance(noise_kernel, FeatureKernel)


def _features_of_points(flow: KernelFlow, noise_kernel: KernelLike | None) -> Array | None:
    """Features of all points, train before test, from the noise's kernel or from the flow's."""
    if isinstance(noise_kernel, FeatureKernel):
        n_points = _sharded_points.points_of(flow).n_points
        if noise_kernel.shape != (n_points, n_points):
            raise ValueError(
                f"noise_kernel must be of {n_points} points with each other, train before test, "
                f"got shape {noise_kernel.shape}"
            )
        finite: FeatureKernel = validate.finite(noise_kernel=noise_kernel)
        return finite.rows.astype(flow.drive.dtype)
    if noise_kernel is not None or not isinstance(flow.drive, Features):
        return None
    rows = flow.drive.rows
    if isinstance(flow.test_drive, Features):
        rows = jnp.concatenate([rows, flow.test_drive.rows])
    return rows


def noise_variances(
    flow: KernelFlow,
    noise_multiplier: NoiseMultiplier,
    noise_kernel: KernelLike | None,
    per_group: bool,
) -> Float[Array, "N ..."]:
    """Covariance of the outputs' noise at each point with itself, ``(N,)`` or ``(N, K, K)``."""
    _require_plain_steps(flow)
    sigma = privacy.as_noise_multiplier(noise_multiplier, steps=None)
    weights = deviations(flow.clipping, sigma, flow.n_terms, per_group) ** 2
    features = _features_of_points(flow, noise_kernel)
    if features is not None:
        diagonal = jnp.sum(features**2, axis=1)[None]
    elif noise_kernel is None:
        _require_no_other_points(flow)
        diagonal = flow.diagonal
    else:
        diagonal = devices.diagonal(flow.mesh, _given_terms(flow, noise_kernel))
    return jnp.tensordot(weights.astype(diagonal.dtype), diagonal, axes=1)


def _require_plain_steps(flow: KernelFlow) -> None:
    if flow.preconditioned:
        raise ValueError(
            "flow must have no preconditioned_kernel: the noise of a preconditioned step is not a "
            "function of the kernels"
        )


def _require_no_other_points(flow: KernelFlow) -> None:
    """Raise if noise moves points of which no kernel with each other is given."""
    if flow.test_drive is not None:
        raise ValueError(
            "noise_kernel must be the kernel of train and test points with each other, since "
            "the flow has a test_kernel, got None"
            if flow.public is None
            else "noise_kernel must be the kernel of train, public and test points with each "
            "other, since noise moves public samples too, got None"
        )


def bytes_of_noise(flow: KernelFlow) -> int:
    """Bytes on this host at the peak of finding the noise's covariance and its square root."""
    if isinstance(flow.drive, Features):
        return 0  # of which the factor is made, in place of the two
    rows = flow.drive.per_point * _sharded_points.points_of(flow).n_points
    copies = _ROOT_COPIES if flow.mesh is None else _ROOT_COPIES_IN_PARTS
    return devices.bytes_on_host(flow.mesh, copies * rows**2 * flow.operator.dtype.itemsize)


def _given_terms(flow: KernelFlow, noise_kernel: KernelLike) -> Array:
    """Terms of a given kernel over all points, train before test, checked."""
    if isinstance(noise_kernel, LayerwiseKernel):
        layered = flow.clipping.scope == "layerwise"
        terms = noise_kernel.values if layered else noise_kernel.total[None]
    else:
        terms = validate.array(noise_kernel=noise_kernel)[None]
    n_points = _sharded_points.points_of(flow).n_points
    expected = (flow.n_terms, n_points, n_points, *flow.diagonal.shape[2:])
    if terms.shape != expected:
        raise ValueError(
            f"noise_kernel must have terms of shape {expected}, train before test, "
            f"got {terms.shape}"
        )
    finite: Array = validate.finite(noise_kernel=terms)
    return finite.astype(flow.operator.dtype)


# Compiled, so that the result is the only copy that is made.
@compiled.jit()
def _weighted(terms: Array, weights: Float[Array, " R"]) -> Float[Array, "N N"]:
    """Weighted sum of the terms of a kernel, as a matrix."""
    kernel = jnp.tensordot(weights.astype(terms.dtype), terms, axes=1)
    return as_matrices(kernel[None])[0]


@eqx.filter_jit
def _weighted_of_flow(flow: KernelFlow, weights: Float[Array, " R"]) -> Float[Array, "N N"]:
    return _weighted(flow.terms(), weights)
