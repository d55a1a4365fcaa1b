r"""A kernel of all samples as features of low rank and a diagonal.

.. math:: H \approx \Phi \Phi^\top + \mathrm{diag}(d), \qquad \Phi \in R^{N \times r}.

Such a kernel is that of a linear model, so that steps of DP-SGD under it are exact in law, at a
cost of n r in place of n^2. The diagonal is that of the whole kernel: norms, and so clipping, are
not approximated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ntkdp import ntk
from ntkdp._backend import memory
from ntkdp._backend.types import Array, Float
from ntkdp.models import Model
from ntkdp.stochastic_flow import ResponseFlow

#: Landmarks for each feature that is kept, and the least number of them.
_LANDMARKS, _LEAST_LANDMARKS = 2, 1024
#: Eigenvalues below this share of the largest count as zero; single precision has no better ones.
_SMALLEST = 1e-6
#: Part of the kernel's trace that features may leave to the diagonal before more are kept.
_LEFT = 1e-3
#: Rows of the kernel whose diagonal is computed at once.
_ROWS = 32


class Features(NamedTuple):
    """Features ``(N, r)`` of all points, training samples first, and what they leave ``(N,)``."""

    values: Float[Array, "N r"]
    left: Float[Array, " N"]

    @property
    def share_left(self) -> float:
        """Part of the trace of the kernel that the features leave to the diagonal."""
        kept = jnp.sum(self.values**2)
        return float(jnp.sum(self.left) / (kept + jnp.sum(self.left)))


def features_of(flow: ResponseFlow, model: Model | None, rank: int, seed: int) -> Features:
    r"""Features of a network at the start, at infinite width if it has such a kernel.

    A kernel :math:`\Theta` of the points with landmarks L among the training samples gives
    :math:`\Phi = \Theta_{\cdot L} \Theta_{LL}^{-1/2}` (Nyström; Williams and Seeger 2001), turned
    to its principal directions, of which the first ``rank`` are kept. With no more samples than
    landmarks it is the whole kernel of the training samples.
    """
    n, n_points = flow.n_samples, flow.points.shape[0]
    n_landmarks = min(n, max(_LANDMARKS * rank, _LEAST_LANDMARKS))
    itemsize = np.dtype(np.float64).itemsize
    memory.require(
        3 * n_points * n_landmarks * itemsize,
        f"the kernel of {n_points:,} points with {n_landmarks:,} landmarks",
        "lower max_samples or rank",
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:n_landmarks])
    across = np.asarray(_kernel(flow, model, flow.x[chosen]), np.float64)
    diagonal = np.asarray(_diagonal(flow, model), np.float64)
    values, vectors = np.linalg.eigh(_symmetric(across[chosen]))
    usable = values > _SMALLEST * values[-1]
    whole = across @ (vectors[:, usable] / np.sqrt(values[usable]))
    spread, directions = np.linalg.eigh(_symmetric(whole[:n].T @ whole[:n]))
    kept = _n_kept(spread[::-1], float(diagonal[:n].sum()), rank)
    turned = whole @ directions[:, ::-1][:, :kept]
    left = np.maximum(diagonal - np.sum(turned**2, axis=1), 0.0)
    return Features(jnp.asarray(turned, flow.dtype), jnp.asarray(left, flow.dtype))


def _n_kept(spread: np.ndarray, trace: float, rank: int) -> int:
    """How many directions, of falling size, leave next to nothing; at most the rank."""
    enough = np.flatnonzero(trace - np.cumsum(spread) <= _LEFT * trace)
    wanted = int(enough[0]) + 1 if enough.size else len(spread)
    return max(1, min(wanted, rank))


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    symmetric: np.ndarray = (matrix + matrix.T) / 2
    return symmetric


def _kernel(flow: ResponseFlow, model: Model | None, landmarks: Array) -> Array:
    """Kernel of all points with the landmarks, the mean over outputs."""
    if model is not None and model.kernel_fn is not None:
        return ntk.infinite_ntk(model, flow.points, landmarks)
    kernel = ntk.empirical_ntk(flow.apply_fn, flow.params, flow.points, landmarks)
    mean: Array = jnp.trace(kernel, axis1=2, axis2=3) / flow.n_outputs
    return mean


def _diagonal(flow: ResponseFlow, model: Model | None) -> Array:
    """Kernel of each point with itself, the mean over outputs."""
    points = flow.points
    if model is not None and model.kernel_fn is not None:
        n_blocks = -(-len(points) // _ROWS)
        filled = points[np.arange(n_blocks * _ROWS) % len(points)]
        blocks = filled.reshape(n_blocks, -1, *points.shape[1:])
        of_blocks = lax.map(lambda block: jnp.diagonal(ntk.infinite_ntk(model, block)), blocks)
        diagonal: Array = of_blocks.ravel()[: len(points)]
        return diagonal
    unit = jnp.eye(flow.n_outputs, dtype=flow.output_dtype)
    norms = [
        ntk.per_sample_gradient_norms(
            flow.apply_fn, flow.params, points, jnp.broadcast_to(row, (len(points), len(row)))
        )
        for row in unit
    ]
    mean: Array = jnp.mean(jnp.stack(norms) ** 2, axis=0)
    return mean


def rows_in_order(n: int, most: int, seed: int) -> np.ndarray:
    """At most so many training samples in a random order: the first m are a random subset."""
    return np.random.default_rng(seed).permutation(n)[: min(n, most)]


def with_rows(flow: ResponseFlow, rows: np.ndarray) -> ResponseFlow:
    """The flow with these of its training samples."""
    return ResponseFlow(
        flow.apply_fn,
        flow.params,
        flow.x[rows],
        jax.tree.map(lambda part: part[rows], flow.targets),
        flow.loss,
        flow.clipping,
        reduction=flow.reduction,
        test_x=flow.test_x,
        test_targets=flow.test_targets,
    )
